"""The runtime folder: a daemon writes its token and pid there, and the clients of the same user read both.

There is one folder per user and port. Its path does not depend on environment variables: below the home folder in the
user database, else below ``/tmp``. A locked file beside the folder shows that its daemon is running.
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
_ATTRIBUTES = "daemon.json"


def runtime_folder(port: int, override: Path | None = None) -> Path:
    """Give the runtime folder of this user's daemon on ``port``, whether it exists or not."""
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
    """Make the parent of the runtime folders of all ports, for files that outlive a daemon, and return its path.

    Raises:
        AuthenticationError: the folder is a link or another user's.
    """
    folder = runtime_folder(port, override).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if override is None:
        check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise for a runtime folder that another user could replace or read.

    Raises:
        AuthenticationError: the folder is a link, a file or another user's; names folder and owner.
    """
    if sys.platform == "win32":
        return
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):  # nor is a link to a folder
        raise AuthenticationError(f"runtime folder {folder} is not a plain folder", "Remove it and start again")
    if status.st_uid != os.getuid():
        raise AuthenticationError(
            f"runtime folder {folder} belongs to uid {status.st_uid}, not to uid {os.getuid()}",
            "Remove it, or choose another port",
        )


def find_token(port: int, folder: Path | None = None, environ: Mapping[str, str] | None = None) -> str:
    """Find the token to send: ``LUNA_TOKEN``, ``LUNA_TOKEN_FILE``, or the file in this user's runtime folder.

    Returns:
        The token; empty if there is none, since the daemon's refusal says what to do.

    Raises:
        AuthenticationError: ``LUNA_TOKEN_FILE`` cannot be read, or the runtime folder is another user's.
    """
    environ = os.environ if environ is None else environ
    if environ.get("LUNA_TOKEN"):
        return environ["LUNA_TOKEN"]
    named = environ.get("LUNA_TOKEN_FILE")
    if not named and folder is None and (parent := runtime_folder(port).parent).exists():
        check_folder(parent)
    path = Path(named) if named else runtime_folder(port, folder) / _TOKEN
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if named:
            why = getattr(error, "strerror", None) or "not text"
            message = f"LUNA_TOKEN_FILE {named!r} cannot be read: {why}"
            raise AuthenticationError(message, "Name a readable file") from error
        return ""


def read_facts(port: int, folder: Path | None = None) -> dict[str, Any]:
    """Read the attributes of the running daemon (``pid``, ``port``, ``ws_port``); empty without a daemon."""
    try:
        attributes: dict[str, Any] = json.loads((runtime_folder(port, folder) / _ATTRIBUTES).read_text())
    except (OSError, ValueError):
        return {}
    return attributes


def has_ended(pid: int, folder: Path) -> bool:
    """Return whether the daemon of a runtime folder has ended, even if another process has the same pid by now."""
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
    """Give the address at which a process on this machine reaches a daemon that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def page_address(tls: bool, host: str, port: int) -> str:
    """Give the URL of the status page at ``host``, without a slash at the end."""
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Return whether ``address`` is an IP address that only this host can reach."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


class Runtime:
    """The runtime folder of this daemon: ``open`` locks it and writes a new token, ``close`` removes it."""

    def __init__(self, port: int, override: Path | None = None) -> None:
        self.folder = runtime_folder(port, override)
        self.port = port
        self._by_rule = override is None
        self.token = secrets.token_urlsafe(32)

    def open(self, attributes: dict[str, Any]) -> None:
        """Lock the folder, remove the files of a dead daemon, and write token and ``attributes``.

        Raises:
            PortInUse: a running daemon of this user holds the folder.
            AuthenticationError: the folder is a link or another user's.
        """
        from filelock import FileLock, Timeout

        with suppress(FileExistsError):  # a file or a link has this path, which the check below reports
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_folder(self.folder)
        if self._by_rule:  # below /tmp another user may have made the parent, and could replace the folder
            check_folder(self.folder.parent)
        self.folder.chmod(0o700)
        self._lock = FileLock(str(self.folder.with_suffix(".lock")), thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise PortInUse(
                f"another daemon of this user already uses port {self.port}",
                "See 'luna-daemon status', or choose another --port",
            ) from error
        for stale in self.folder.iterdir():
            shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
        self._write(_TOKEN, self.token)
        self._write(_ATTRIBUTES, json.dumps(attributes))

    def renew(self) -> str:
        """Replace the token, and return the new token."""
        self.token = secrets.token_urlsafe(32)
        self._write(_TOKEN + ".new", self.token).replace(self.folder / _TOKEN)
        return self.token

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(text)
        return path

    def close(self) -> None:
        """Remove the folder and release the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
