"""The runtime folder: where a daemon leaves its token and its pid, and where its user's clients find them.

One folder per user and port, by one rule that does not look at the environment: below the home folder that the
system has on record, else below the system's folder for temporary files. A lock in it tells a live daemon from
what a dead one left.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core import AuthenticationError, PortInUse

_TOKEN = "token"  # noqa: S105 (a file's name)
_FACTS = "daemon.json"


def runtime_folder(port: int, override: Path | None = None) -> Path:
    """The runtime folder of this user's daemon on ``port``."""
    if override is not None:
        return override / str(port)
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "luna-daemon" / str(port)
    import pwd

    uid = os.getuid()
    try:
        home = Path(pwd.getpwuid(uid).pw_dir)
        usable = home.is_dir() and home.stat().st_uid == uid and os.access(home, os.W_OK)
    except (KeyError, OSError):
        usable = False
    if usable:
        return home / ".local" / "state" / "luna-daemon" / str(port)
    return Path("/tmp") / f"luna-daemon-{uid}" / str(port)


def state_folder(port: int, override: Path | None = None) -> Path:
    """The folder that holds the runtime folders of all ports, made if it is missing: for what outlives a daemon.

    Raises:
        AuthenticationError: it is a link or somebody else's.
    """
    folder = runtime_folder(port, override).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if override is None:
        check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a runtime folder that another user could replace or read.

    Raises:
        AuthenticationError: the folder is a link, a file or another user's; names folder and owner.
    """
    if sys.platform == "win32":
        return
    facts = folder.lstat()
    if stat.S_ISLNK(facts.st_mode) or not stat.S_ISDIR(facts.st_mode):
        raise AuthenticationError(f"runtime folder {folder} is not a plain folder", "Remove it and start again")
    if facts.st_uid != os.getuid():
        raise AuthenticationError(
            f"runtime folder {folder} belongs to uid {facts.st_uid}, not to uid {os.getuid()}",
            "Remove it, or choose another port",
        )


def find_token(port: int, folder: Path | None = None, environ: Mapping[str, str] | None = None) -> str:
    """The token to present: ``LUNA_TOKEN``, ``LUNA_TOKEN_FILE``, or the one in this user's runtime folder.

    Returns an empty string where there is none: the daemon's refusal then says what to do.
    """
    environ = os.environ if environ is None else environ
    if environ.get("LUNA_TOKEN"):
        return environ["LUNA_TOKEN"]
    named = environ.get("LUNA_TOKEN_FILE")
    if not named and folder is None and (place := runtime_folder(port).parent).exists():
        check_folder(place)
    path = Path(named) if named else runtime_folder(port, folder) / _TOKEN
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if named:
            why = getattr(error, "strerror", None) or "not text"
            raise AuthenticationError(
                f"LUNA_TOKEN_FILE {named!r} cannot be read: {why}", "Name a readable file"
            ) from error
        return ""


def read_facts(port: int, folder: Path | None = None) -> dict[str, Any]:
    """What the running daemon wrote about itself (``pid``, ``port``, ``ws_port``); empty if there is none."""
    try:
        facts: dict[str, Any] = json.loads((runtime_folder(port, folder) / _FACTS).read_text())
    except (OSError, ValueError):
        return {}
    return facts


def has_ended(pid: int, folder: Path) -> bool:
    """Whether the daemon of this runtime folder is gone; its number may be another process' by now."""
    import psutil

    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return dead or (folder.exists() and process.create_time() > folder.stat().st_mtime + 1)
    except (psutil.NoSuchProcess, OSError):
        return True
    except psutil.AccessDenied:
        return False


def dial_host(host: str) -> str:
    """Where a process of this machine finds a daemon that listens on ``host``, every address included."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def page_address(tls: bool, host: str, port: int) -> str:
    """The status page of a daemon that is dialled at ``host``, without a slash at its end."""
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether an IP address is of this host alone; anything else is not."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)


class Runtime:
    """The daemon's side: takes the folder, writes a fresh token, removes both on ``close``.

    Raises:
        PortInUse: a live daemon of this user holds the folder.
        AuthenticationError: the folder is a link or somebody else's.
    """

    def __init__(self, port: int, override: Path | None = None) -> None:
        self.folder = runtime_folder(port, override)
        self.port = port
        self._by_rule = override is None
        self.token = secrets.token_urlsafe(32)

    def open(self, facts: dict[str, Any]) -> None:
        """Take the folder; sweep what a dead daemon left in it."""
        from filelock import FileLock, Timeout

        with suppress(FileExistsError):  # a file or a link in its place: said below
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_folder(self.folder)
        if self._by_rule:  # below /tmp somebody else may have made the parent, and could swap what is in it
            check_folder(self.folder.parent)
        self.folder.chmod(0o700)
        self._lock = FileLock(str(self.folder.with_suffix(".lock")), thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise PortInUse(
                f"another daemon of yours already uses port {self.port}",
                "See 'luna-daemon status', or choose another --port",
            ) from error
        for stale in self.folder.iterdir():
            shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
        self._write(_TOKEN, self.token)
        self._write(_FACTS, json.dumps(facts))

    def renew(self) -> str:
        """Another token in place of the old one."""
        self.token = secrets.token_urlsafe(32)
        fresh = self._write(_TOKEN + ".new", self.token)
        fresh.replace(self.folder / _TOKEN)
        return self.token

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(text)
        return path

    def close(self) -> None:
        """Remove the folder and give the lock back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
