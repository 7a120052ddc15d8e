"""Which ComfyUI a worker runs for a client: the client's own if its code can be trusted, else none.

The daemon's own folder and interpreter (``comfyui_path``, ``comfyui_python``), and those below ``comfyui_roots``, are
always accepted. Any other folder or interpreter is accepted only if the client is on this host and only the daemon's
user and root could have written code there. Flags must be in a fixed list.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from ..comfyui.flags import bits_of, checked
from ..config import Settings
from ..core import ComfyRefused
from ..files.resolver import NeedsIO
from ..wire.messages import ComfyId

_DATA = ("models", "input", "output", "temp", "user", "custom_nodes")
"""Folders in ComfyUI's folder from which workers import no code."""
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib", ".pth")
_MAX_LINKS = 40
_MAX_KNOWN = 64
"""Limit of ComfyUIs remembered per connection; a client usually runs one."""
_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_CURE = "Add it to the daemon's comfyui_roots (LUNA_COMFYUI_ROOTS) if you trust it, or fix its owner or permissions"


class ComfyRoots:
    """The ComfyUIs that workers may run, by the settings ``comfyui_*``, ``client_roots`` and ``backend``."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.own = _own(settings)
        """The daemon's own ComfyUI, for clients without one; ``None`` if ``comfyui_path`` is not set."""
        self._registered = [Path(os.path.realpath(folder)) for folder in settings.comfyui_roots]

    def for_client(self, comfy: ComfyId | None, known: dict[ComfyId, ComfyId], is_local: bool) -> ComfyId | None:
        """The ComfyUI that a worker runs for a client that runs ``comfy``; ``None`` if another backend computes.

        Args:
            known: results for this connection so far; a new connection checks again, since files may change.
            is_local: whether the client is on this host.

        Raises:
            NeedsIO: ``comfy`` has not been checked yet; ``NeedsIO.look`` calls ``check``.
        """
        if comfy is None or self.settings.backend == "diffusers":
            return self.own
        if comfy not in known:
            raise NeedsIO(f"ComfyUI {comfy.root}", lambda: self._remember(comfy, known, is_local))
        return known[comfy]

    def _remember(self, comfy: ComfyId, known: dict[ComfyId, ComfyId], is_local: bool) -> None:
        accepted = self.check(comfy, is_local)
        if len(known) >= _MAX_KNOWN:
            known.clear()
        known[comfy] = accepted

    def check(self, comfy: ComfyId, is_local: bool) -> ComfyId:
        """Decide which ComfyUI a worker runs for a client that runs ``comfy``. Reads many files: call it in a thread.

        Args:
            is_local: whether the client is on this host.

        Raises:
            ComfyRefused: names the folder or file, why it is refused, and what to do.
            BadRequest: clients may not set one of the flags.
        """
        flags = checked(comfy.flags)
        if not (_is_plain(comfy.root) and _is_plain(comfy.python)):
            raise ComfyRefused(
                f"ComfyUI {comfy.root!r} with interpreter {comfy.python!r}: a path is not absolute",
                "Use absolute paths",
            )
        try:
            root, python = Path(os.path.realpath(comfy.root)), canonical_python(Path(comfy.python))
            foreign_root, foreign_python = not self._is_registered(root), not self._is_registered(python)
            if foreign_root or foreign_python:
                self._check_client_roots(f"ComfyUI {root}" if foreign_root else f"interpreter {python}", is_local)
            _check_is_comfyui(root, python)
            if foreign_root:
                _refuse(why_unsafe_root(Path(comfy.root)))
            if foreign_python:
                _refuse(why_unsafe_python(Path(comfy.python)))
            _check_version(root, comfy.version)
        except OSError as error:
            raise ComfyRefused(f"{error.filename or comfy.root}: {error.strerror or error}", _CURE) from error
        return ComfyId(str(root), str(python), comfy.version, comfy.torch, flags)

    def _is_registered(self, path: Path) -> bool:
        """Whether the settings name this ComfyUI or interpreter, or a folder around it."""
        own = self.own is not None and str(path) in (self.own.root, self.own.python)
        return own or any(path.is_relative_to(folder) for folder in self._registered)

    def _check_client_roots(self, what: str, is_local: bool) -> None:
        if not self.settings.client_roots:
            raise ComfyRefused(f"{what} is not the daemon's, and client_roots is off", _CURE)
        if not is_local:
            raise ComfyRefused(f"{what} is not the daemon's, and the client is not on the daemon's host", _CURE)


def _own(settings: Settings) -> ComfyId | None:
    if settings.comfyui_path is None or settings.backend == "diffusers":
        return None
    python = canonical_python(Path(settings.comfyui_python or sys.executable))
    root = os.path.realpath(settings.comfyui_path)
    return ComfyId(root, str(python), flags=bits_of(settings.comfyui_args))


def canonical_python(path: Path) -> Path:
    """Return one path for the ``python``, ``python3`` and ``python3.12`` of one environment.

    Links to other folders are not followed: an environment is the folder of its ``python``, not of the link's target.
    """
    place = Path(os.path.realpath(path.parent)) / path.name
    for _ in range(_MAX_LINKS):
        if not place.is_symlink():
            break
        target = place.parent / os.readlink(place)
        if os.path.realpath(target.parent) != str(place.parent):
            break
        place = place.parent / target.name
    return place


def _is_plain(path: str) -> bool:
    return bool(path) and "\0" not in path and Path(path).is_absolute()


def _refuse(why: str) -> None:
    if why:
        raise ComfyRefused(f"{why}, so no worker runs it", _CURE)


def is_comfyui(root: Path) -> bool:
    """Return whether a folder holds ComfyUI's code."""
    return (root / "comfy" / "sd.py").is_file()


def version_of(root: Path) -> str:
    """Read the version of the ComfyUI in a folder; empty if its files do not say."""
    file = root / "comfyui_version.py"
    version = _VERSION.search(file.read_text("utf-8", errors="replace")) if file.is_file() else None
    return version[1] if version else ""


def _check_is_comfyui(root: Path, python: Path) -> None:
    if not is_comfyui(root):
        raise ComfyRefused(f"{root} is not ComfyUI: it has no comfy/sd.py", "Start ComfyUI from its own folder")
    if not python.is_file() or not os.access(python, os.X_OK):
        raise ComfyRefused(f"interpreter {python} is not an executable file", "Use the interpreter that runs ComfyUI")


def _check_version(root: Path, version: str) -> None:
    """Refuse a client that was started before ComfyUI was updated: a worker would run the new files."""
    now = version_of(root) if version else ""
    if now not in ("", version):
        raise ComfyRefused(
            f"the instance runs ComfyUI {version}, but the files in {root} are of {now}",
            "Restart that ComfyUI",
        )


# --- whether other users could have written code there -------------------------------------------------------------


def why_unsafe_root(root: Path) -> str:
    """Why other users could change code in this folder; empty if they cannot."""
    if sys.platform == "win32":
        return _why_outside_the_profile(root)
    return _why_unsafe_path(root) or _first(map(_why_unsafe_code, _code_below(Path(os.path.realpath(root)))))


def why_unsafe_python(python: Path) -> str:
    """Why other users could change this interpreter, a link to it, or its packages; empty if they cannot."""
    if sys.platform == "win32":
        return _why_outside_the_profile(python)
    prefix = Path(os.path.realpath(python.parent)).parent
    packages = [place for pattern in ("lib*/python*", "lib*/python*/*-packages") for place in prefix.glob(pattern)]
    places = [place for place in (prefix, prefix / "pyvenv.cfg", *packages) if place.exists()]
    return _why_unsafe_path(python) or _first(map(_why_unsafe, places))


def _first(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")


def _why_outside_the_profile(path: Path) -> str:
    """Accept on Windows only paths in the user's profile: access control lists are not read here."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(Path.home()))
    return "" if real.is_relative_to(home) else f"{real} lies outside of {home}"


def _why_unsafe_path(path: Path) -> str:
    return _first(_why_unsafe(place, ancestor=True) for place in _components(path))


def _components(path: Path) -> Iterator[Path]:
    """Every folder, link and file that resolving a path passes, links followed one by one."""
    rest, place, links = list(path.parts[1:]), Path(path.anchor), 0
    yield place
    while rest:
        name = rest.pop(0)
        place = place.parent if name == ".." else place / name
        yield place
        if place.is_symlink():
            links += 1
            if links > _MAX_LINKS:
                raise OSError(f"{path} leads through more than {_MAX_LINKS} links")
            target = Path(os.readlink(place))
            place = Path(target.anchor) if target.is_absolute() else place.parent
            rest = [*(target.parts[1:] if target.is_absolute() else target.parts), *rest]


def _code_below(root: Path) -> Iterator[Path]:
    """The folder and what Python could import from it, except environments: ``why_unsafe_python`` checks those."""
    yield root
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        skipped = _DATA if here == root else ()
        folders[:] = [
            name
            for name in folders
            if name not in skipped and not name.startswith(".") and not (here / name / "pyvenv.cfg").is_file()
        ]
        yield from (here / name for name in folders)
        yield from (here / name for name in files if name.endswith(_CODE))


def _why_unsafe_code(place: Path) -> str:
    if not place.is_symlink():
        return _why_unsafe(place)
    return f"{place} is a link to a folder" if place.is_dir() else _why_unsafe_path(place)


def _why_unsafe(place: Path, ancestor: bool = False) -> str:
    """Why other users could change this file or folder itself; empty if they cannot.

    Args:
        ancestor: accept a sticky folder like ``/tmp``: others may add files there, but not replace the next component
            of the path, which is checked too.
    """
    status = place.lstat()
    if status.st_uid not in (0, os.getuid()):
        return f"{place} belongs to user {status.st_uid}, not to the daemon's user {os.getuid()}"
    if stat.S_ISLNK(status.st_mode) or (ancestor and status.st_mode & stat.S_ISVTX):
        return ""
    if status.st_mode & stat.S_IWOTH:
        return f"{place} is writable by everybody"
    if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid):
        return f"{place} is writable by group {status.st_gid}, which has other members"
    return ""


@cache
def _is_private(group: int) -> bool:
    """Whether only the daemon's user and root are in a group; many systems give each user such a group."""
    import grp
    import pwd

    everybody = pwd.getpwall()
    members = {user.pw_uid for user in everybody if user.pw_gid == group}
    try:
        named = set(grp.getgrgid(group).gr_mem)
    except KeyError:
        named = set()
    members |= {user.pw_uid for user in everybody if user.pw_name in named}
    known = {user.pw_name for user in everybody}
    return members <= {0, os.getuid()} and named <= known
