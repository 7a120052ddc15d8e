"""What tells one file from another on this host. Clients import this module, so that it needs no settings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..core import ModelMismatchError, ModelNotFound
from ..wire.messages import FileId, LoadSpec

ON_ONE_DISK = ("size", "mtime_ns", "inode")
"""Fields of ``FileId`` that are equal for two processes that read one disk."""


def identity_of(path: str, stat: os.stat_result) -> FileId:
    """A file's identity, from its stat result."""
    return FileId(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def check_same(what: str, theirs: FileId, mine: FileId, names: Iterable[str] = ON_ONE_DISK) -> None:
    """Compare the client's file with the daemon's; fields that the client left empty count as equal.

    Args:
        what: names the file in the error.
        names: fields of ``FileId`` to compare.

    Raises:
        ModelMismatchError: another file; says which field differs.
    """
    for name in names:
        client, daemon = getattr(theirs, name), getattr(mine, name)
        if client and client != daemon:
            raise ModelMismatchError(
                f"{what}: the client's {name} is {client}, the daemon's {daemon}", "Both must read the same file"
            )


def first_existing(tried: Iterable[Path]) -> Path | None:
    """The first path that exists; what cannot be looked at counts as missing."""
    for path in tried:
        try:
            if path.exists():
                return path
        except OSError:
            continue
    return None


def same_file(stat: os.stat_result, size: int, mtime_ns: int, inode: int) -> bool:
    """Whether an open file is the one that the other side identified."""
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino) == (size, mtime_ns, inode)


def file_id(path: Path) -> FileId:
    """Identity of a file on this host: what a client sends, and what the daemon compares.

    Raises:
        ModelNotFound: no such file, or no permission to look at it.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelNotFound(f"model file {str(path)!r}: {error.strerror or error}", "Check the path") from error
    return identity_of(str(path), stat)


def weight_files(path: Path) -> list[Path]:
    """The file itself, or a diffusers folder's weights: other weights in the folder make another model."""
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def load_bytes(spec: LoadSpec) -> int:
    """Bytes of a model's files, which is about the memory that loading takes."""
    files = (file for name in spec.files for file in weight_files(Path(name)))
    return sum(file.stat().st_size for file in files if file.is_file())
