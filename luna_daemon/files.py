"""What tells one file from another on this host. Light: clients import it, and nothing of the settings with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .core import ModelMismatchError
from .wire.messages import FileId

__all__ = ["ON_ONE_DISK", "check_same", "facts_of", "first_existing", "same_file"]

ON_ONE_DISK = ("size", "mtime_ns", "inode")
"""What two sides that read one disk agree in."""


def facts_of(path: str, facts: os.stat_result) -> FileId:
    """A file's identity, from what the system says about it."""
    return FileId(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)


def check_same(what: str, theirs: FileId, mine: FileId, names: Iterable[str] = ON_ONE_DISK) -> None:
    """Compare what the client knows of its file with the daemon's.

    Raises:
        ModelMismatchError: another file; says in what.
    """
    for name in names:
        given, own = getattr(theirs, name), getattr(mine, name)
        if given and given != own:
            raise ModelMismatchError(
                f"{what}: the client's {name} is {given}, the daemon's {own}", "Both must read the same file"
            )


def first_existing(tried: Iterable[Path]) -> Path | None:
    """The first path that there is; one that cannot be looked at is not."""
    for path in tried:
        try:
            if path.exists():
                return path
        except OSError:
            continue
    return None


def same_file(mine: os.stat_result, size: int, mtime_ns: int, inode: int) -> bool:
    """Whether an open file is the very one that the other side has looked at."""
    return (mine.st_size, mine.st_mtime_ns, mine.st_ino) == (size, mtime_ns, inode)
