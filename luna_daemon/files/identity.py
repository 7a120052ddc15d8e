"""What tells one file from another on this host. Light: clients import it, and nothing of the settings with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..core import ModelMismatchError, ModelNotFound
from ..wire.messages import FileId, LoadSpec

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


def file_id(path: Path) -> FileId:
    """Identity of a file on this host: what a client sends, and what the daemon compares.

    Raises:
        ModelNotFound: it is not there.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ModelNotFound(f"model file {str(path)!r}: {error.strerror or error}", "Check the path") from error
    return facts_of(str(path), facts)


def weight_files(path: Path) -> list[Path]:
    """The file itself, or what a diffusers folder holds: weights replaced in place make it another model."""
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def load_bytes(spec: LoadSpec) -> int:
    """Bytes of a model's files: about what loading it takes."""
    total = 0
    for name in spec.files:
        total += sum(file.stat().st_size for file in weight_files(Path(name)) if file.is_file())
    return total
