"""Which ComfyUI a worker runs for a client: the client's own, where its code may be trusted, else none.

What code a worker runs is the daemon's choice. The folder and interpreter of its own settings, and whatever lies below
``comfyui_roots``, are always fine. Another one, named by a client, is run only if the client is on this host and nobody
but the daemon's user and root could have put code there. Flags are taken from a fixed list.
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
"""Folders inside ComfyUI's that hold no code that a worker imports."""
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib", ".pth")
_MOST_LINKS = 40
_MOST_KNOWN = 64
"""ComfyUIs remembered per connection; a process hardly runs more than one."""
_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_CURE = "Add it to the daemon's comfyui_roots (LUNA_COMFYUI_ROOTS) if it may run it, or fix its owner or permissions"


class ComfyRoots:
    """The ComfyUIs that workers may run.

    Args:
        settings: the daemon's own (``comfyui_path``, ``comfyui_python``, ``comfyui_args``), ``comfyui_roots``,
            ``client_roots``.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.own = _own(settings)
        """The ComfyUI for clients that run none; ``None`` if the daemon has no ComfyUI either."""
        self._registered = [Path(os.path.realpath(folder)) for folder in settings.comfyui_roots]

    def for_client(self, comfy: ComfyId | None, known: dict[ComfyId, ComfyId], here: bool) -> ComfyId | None:
        """The ComfyUI that a worker runs for a client that runs ``comfy``; ``None`` where another backend computes.

        Args:
            known: answers for this connection so far; a new connection checks again, since files may have changed.

        Raises:
            NeedsIO: ``comfy`` was not checked yet; ``NeedsIO.look`` raises what ``check`` does.
        """
        if comfy is None or self.settings.backend == "diffusers":
            return self.own
        if comfy not in known:
            raise NeedsIO(f"ComfyUI {comfy.root}", lambda: self._learn(comfy, known, here))
        return known[comfy]

    def _learn(self, comfy: ComfyId, known: dict[ComfyId, ComfyId], here: bool) -> None:
        accepted = self.check(comfy, here)
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[comfy] = accepted

    def check(self, comfy: ComfyId, here: bool) -> ComfyId:
        """The ComfyUI that a worker runs for a client with this one. Reads many files: not for the event loop.

        Args:
            here: whether the client is on this host.

        Raises:
            ComfyRefused: names the folder or file, why it is refused, and what to do.
            BadRequest: a flag that clients may not set.
        """
        flags = checked(comfy.flags)
        if not (_is_plain(comfy.root) and _is_plain(comfy.python)):
            raise ComfyRefused(f"ComfyUI {comfy.root!r} with interpreter {comfy.python!r}: not absolute paths", _CURE)
        try:
            root, python = Path(os.path.realpath(comfy.root)), canonical_python(Path(comfy.python))
            foreign_root, foreign_python = not self._names(root), not self._names(python)
            if foreign_root or foreign_python:
                self._may_be_foreign(f"ComfyUI {root}" if foreign_root else f"interpreter {python}", here)
            _must_be_comfyui(root, python)
            if foreign_root:
                _refuse(why_unsafe_root(Path(comfy.root)))
            if foreign_python:
                _refuse(why_unsafe_python(Path(comfy.python)))
            _must_be_the_version(root, comfy.version)
        except OSError as error:
            raise ComfyRefused(f"{error.filename or comfy.root}: {error.strerror or error}", _CURE) from error
        return ComfyId(str(root), str(python), comfy.version, comfy.torch, flags)

    def _names(self, path: Path) -> bool:
        """Whether the settings name this ComfyUI or interpreter, or a folder around it."""
        own = self.own is not None and str(path) in (self.own.root, self.own.python)
        return own or any(path.is_relative_to(folder) for folder in self._registered)

    def _may_be_foreign(self, what: str, here: bool) -> None:
        if not self.settings.client_roots:
            raise ComfyRefused(f"{what} is not one of the daemon's, and clients may name none (client_roots)", _CURE)
        if not here:
            raise ComfyRefused(f"{what} is not one of the daemon's, and the client is not on its host", _CURE)


def _own(settings: Settings) -> ComfyId | None:
    if settings.comfyui_path is None or settings.backend == "diffusers":
        return None
    python = canonical_python(Path(settings.comfyui_python or sys.executable))
    root = os.path.realpath(settings.comfyui_path)
    return ComfyId(root, str(python), flags=bits_of(settings.comfyui_args))


def canonical_python(path: Path) -> Path:
    """One path for the ``python``, ``python3`` and ``python3.12`` of one environment.

    Links to another folder are not followed: an environment is where its ``python`` lies, not what that links to.
    """
    place = Path(os.path.realpath(path.parent)) / path.name
    for _ in range(_MOST_LINKS):
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


def _must_be_comfyui(root: Path, python: Path) -> None:
    if not is_comfyui(root):
        raise ComfyRefused(f"{root} is not ComfyUI: it has no comfy/sd.py", "Start the instance from its own folder")
    if not python.is_file() or not os.access(python, os.X_OK):
        raise ComfyRefused(f"interpreter {python} is not an executable file", "Use the one that runs ComfyUI")


def _must_be_the_version(root: Path, version: str) -> None:
    """Refuse an instance that was started before its files were updated: a worker would run the new ones."""
    now = version_of(root) if version else ""
    if now not in ("", version):
        raise ComfyRefused(
            f"the instance runs ComfyUI {version}, but the files in {root} are of {now}",
            "Restart that ComfyUI",
        )


# --- whether other users could have put code there -------------------------------------------------------------


def why_unsafe_root(root: Path) -> str:
    """Why others could change what a worker would import from this folder; empty if nobody could."""
    if sys.platform == "win32":
        return _why_outside_the_profile(root)
    return _why_on_the_way(root) or _first(map(_why_unsafe_code, _code_below(Path(os.path.realpath(root)))))


def why_unsafe_python(python: Path) -> str:
    """Why others could change this interpreter, a link on the way to it, or its packages; empty if nobody could."""
    if sys.platform == "win32":
        return _why_outside_the_profile(python)
    prefix = Path(os.path.realpath(python.parent)).parent
    packages = [place for pattern in ("lib*/python*", "lib*/python*/*-packages") for place in prefix.glob(pattern)]
    places = [place for place in (prefix, prefix / "pyvenv.cfg", *packages) if place.exists()]
    return _why_on_the_way(python) or _first(map(_why_unsafe, places))


def _first(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")


def _why_outside_the_profile(path: Path) -> str:
    """Windows' access control lists are not read here: only what lies in the user's own profile is the user's."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(Path.home()))
    return "" if real.is_relative_to(home) else f"{real} lies outside of {home}"


def _why_on_the_way(path: Path) -> str:
    return _first(_why_unsafe(place, ancestor=True) for place in _way(path))


def _way(path: Path) -> Iterator[Path]:
    """Every folder, link and file on the way to what a path names, links followed one by one."""
    rest, place, links = list(path.parts[1:]), Path(path.anchor), 0
    yield place
    while rest:
        name = rest.pop(0)
        place = place.parent if name == ".." else place / name
        yield place
        if place.is_symlink():
            links += 1
            if links > _MOST_LINKS:
                raise OSError(f"more than {_MOST_LINKS} links on the way to {path}")
            target = Path(os.readlink(place))
            place = Path(target.anchor) if target.is_absolute() else place.parent
            rest = [*(target.parts[1:] if target.is_absolute() else target.parts), *rest]


def _code_below(root: Path) -> Iterator[Path]:
    """The folder and all in it that Python could import; environments inside are checked with their interpreter."""
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
    return f"{place} is a link to a folder" if place.is_dir() else _why_on_the_way(place)


def _why_unsafe(place: Path, ancestor: bool = False) -> str:
    """Why others could change this very file or folder; empty if nobody could.

    Args:
        ancestor: only a file or folder inside counts, which is checked too: a folder like ``/tmp``, where everybody
            may add something but nobody may replace what belongs to another user, is fine.
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
    """Whether nobody but the daemon's user and root is in a group: many systems give each user a group."""
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
