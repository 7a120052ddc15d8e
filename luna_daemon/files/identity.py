"""Identity of model files, by which client and daemon make sure that they mean the same file. Needs no settings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..core import ModelMismatchError, ModelNotFound
from ..wire.messages import FileId, LoadSpec

ON_ONE_DISK = ("size", "mtime_ns", "inode")
"""Fields of ``FileId`` that agree between processes that read one disk."""


def identity_of(path: str, stat: os.stat_result) -> FileId:
    """Make a file's identity from its stat result."""
    return FileId(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def check_same(title: str, clients: FileId, daemons: FileId, names: Iterable[str] = ON_ONE_DISK) -> None:
    """Compare the client's file with the daemon's; fields that the client left empty count as equal.

    Args:
        title: name of the file in the error.
        names: fields of ``FileId`` to compare.

    Raises:
        ModelMismatchError: the files are not the same; says which field differs.
    """
    for name in names:
        client, daemon = getattr(clients, name), getattr(daemons, name)
        if client and client != daemon:
            raise ModelMismatchError(
                f"{title}: the client's {name} is {client}, the daemon's {daemon}", "Both must read the same file"
            )


def first_existing(tried: Iterable[Path]) -> Path | None:
    """Return the first path that exists; a path that the process may not look at counts as missing."""
    for path in tried:
        with suppress(OSError):
            if path.exists():
                return path
    return None


def same_file(stat: os.stat_result, size: int, mtime_ns: int, inode: int) -> bool:
    """Return whether the stat result of an open file matches the identity that another process sent."""
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino) == (size, mtime_ns, inode)


def file_id(path: Path) -> FileId:
    """Give the identity of a file on this host.

    Raises:
        ModelNotFound: the file does not exist, or the process may not look at it.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelNotFound(f"model file {str(path)!r}: {error.strerror or error}", "Check the path") from error
    return identity_of(str(path), stat)


def weight_files(path: Path) -> list[Path]:
    """List the files that make up a model: the file itself, or all weights in a diffusers folder."""
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def load_bytes(spec: LoadSpec) -> int:
    """Sum up the bytes of a model's files, about as much as the model takes in memory."""
    files = (file for name in spec.files for file in weight_files(Path(name)))
    return sum(file.stat().st_size for file in files if file.is_file())
