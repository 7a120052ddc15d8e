"""Safetensors files: reads and checks headers, reads bytes, and makes the table of tensors in a LoRA's reply.

The only header reader, for the daemon, which checks a file before offering it to clients; for clients, which build
shells from headers alone; and for backends, before they load weights. Needs no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..core import BadRequest, ModelLoadError, ModelNotFound
from ..wire.messages import TensorRef

NamedRef = tuple[str, TensorRef]
"""A tensor's key and its place: ``offset`` counts from the start of the file, or of the memory that holds it."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 40
_CHUNK = 4 << 20
_DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8), "U8": ("uint8", 8),
    "U64": ("uint64", 64), "U32": ("uint32", 32), "U16": ("uint16", 16), "BOOL": ("bool", 8), "C64": ("complex64", 64),
    "F4": ("F4", 4), "F6_E2M3": ("F6_E2M3", 6), "F6_E3M2": ("F6_E3M2", 6),
}  # fmt: skip
"""Per dtype of the format torch's name for it, if torch has elements of that size, and its bits per element."""
_NETWORK = ("nfs", "cifs", "smb", "afs", "9p", "ceph", "gluster", "lustre", "virtiofs", "webdav", "drvfs", "fuse")
"""Prefixes of file systems whose bytes may come from another machine: with FUSE, that cannot be found out."""


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    tensors: dict[str, TensorRef]
    """Per key, in the order of the bytes in the file; offsets count from the start of the file."""
    metadata: dict[str, str]


def open_header(path: Path | str) -> Header:
    """Read and check a model file's header, without its weights.

    Raises:
        ModelNotFound: the file cannot be opened.
        ModelLoadError: the file is not a valid safetensors file; says why.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return read_header(file, os.fstat(file.fileno()).st_size, str(path))
    except OSError as error:
        raise ModelNotFound(f"model file {str(path)!r}: {error.strerror or error}", "Check the path") from error


def read_header(file: BinaryIO, size: int, title: str) -> Header:
    """Read and check the header of an open file, which is left at the first tensor's first byte.

    Args:
        size: bytes of the file.
        title: name of the file in errors.

    Raises:
        ModelLoadError: the file is not a valid safetensors file; says why.
    """
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise _invalid(title, _guess(head, length, size))
    return parse_header(file.read(length), size, title)


def parse_header(header: bytes, size: int, title: str) -> Header:
    """Parse a header that follows the eight bytes of its length; checks bounds, overlaps, gaps and sizes.

    Raises:
        ModelLoadError: the header contradicts itself or the size; says how.
    """
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _invalid(title, f"its header is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _invalid(title, "its header is not a JSON object")
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid(title, "its __metadata__ does not map names to texts")
    if len(document) > _MAX_TENSORS:
        raise _invalid(title, f"it has {len(document)} tensors, more than {_MAX_TENSORS}")
    start = 8 + len(header)
    refs = [(key, _parse_entry(key, entry, start, title)) for key, entry in document.items()]
    refs.sort(key=lambda pair: (pair[1].offset, pair[1].nbytes))
    _check_places(refs, start, size, title)
    return Header(dict(refs), metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _parse_entry(key: str, entry: Any, start: int, title: str) -> TensorRef:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(title, f"tensor {key!r} is described by {entry!r:.80}")
    dtype, bits = _DTYPES.get(str(entry["dtype"]), ("", 0))
    shape, span = entry["shape"], entry["data_offsets"]
    if not dtype:
        raise _invalid(title, f"tensor {key!r} has dtype {entry['dtype']!r:.80}, which is unknown")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > _MAX_ELEMENTS:
        raise _invalid(title, f"tensor {key!r} has shape {shape!r:.80}")
    nbytes, rest = divmod(math.prod(shape) * bits, 8)
    if rest or not _counts(span) or len(span) != 2 or span[1] - span[0] != nbytes:
        raise _invalid(title, f"tensor {key!r} of {nbytes} bytes lies at {span!r:.80}")
    return TensorRef(dtype, tuple(shape), nbytes, start + span[0])


def _check_places(refs: list[NamedRef], start: int, size: int, title: str) -> None:
    """Check that sorted tensors follow each other without gap or overlap, up to the file's end."""
    for key, ref in refs:
        if ref.offset != start:
            raise _invalid(title, f"tensor {key!r} begins at byte {ref.offset}, the one before ends at {start}")
        start += ref.nbytes
    if start > size:
        raise _invalid(title, f"it is truncated: {size} bytes of {start}")
    if start < size:
        raise _invalid(title, f"its tensors end at byte {start}, the file at {size}")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _guess(head: bytes, length: int, size: int) -> str:
    """Guess the format of another file by its first eight bytes, which would be the header's length."""
    if not size:
        return "it is empty"
    if head.startswith((b"PK", b"\x80")):
        return "it is a PyTorch pickle, which is not loaded because it can run code"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file"
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"it is a text file (starts with {head.decode('ascii')!r}), not a model"
    return f"its header would have {length} bytes, the file has {size}: it is cut short or of another format"


def _invalid(title: str, why: str) -> ModelLoadError:
    return ModelLoadError(f"{title} is not a valid safetensors file: {why}", "Fetch or save it again as .safetensors")


def columns(places: Iterable[tuple[str, str, TensorRef]]) -> list[list[Any]]:
    """Make the table of a LoRA's reply from (key, segment, place) in the order of the bytes.

    A row of the table is a run of tensors of one dtype without gaps: ``[segment, dtype, offset, keys, shapes, which]``,
    where ``shapes`` are the run's distinct shapes, and ``which`` has for each key the index of its shape. A LoRA has
    thousands of tensors, and some dozens of shapes.
    """
    runs: list[list[Any]] = []
    shapes: dict[tuple[int, ...], int] = {}
    end = -1
    for key, segment, ref in places:
        if not runs or runs[-1][:2] != [segment, ref.dtype] or ref.offset != end:
            shapes = {}
            runs.append([segment, ref.dtype, ref.offset, [], [], []])
        if ref.shape not in shapes:
            shapes[ref.shape] = len(shapes)
            runs[-1][4].append(ref.shape)
        runs[-1][3].append(key)
        runs[-1][5].append(shapes[ref.shape])
        end = ref.offset + ref.nbytes
    return runs


def read_through(file: BinaryIO, into: memoryview | None, size: int, start: int = 0) -> None:
    """Read ``size`` bytes from ``start`` into memory; without ``into``, only into the system's page cache.

    Raises:
        BadRequest: the file ended earlier.
    """
    file.seek(start)
    spare = memoryview(bytearray(min(size, _CHUNK) if into is None else 0))
    done = 0
    while done < size:
        part = into[done : min(done + _CHUNK, size)] if into is not None else spare[: min(_CHUNK, size - done)]
        # readinto lets other threads run while the disk works; a page fault in a mapping would not.
        got = file.readinto(part)  # type: ignore[attr-defined]
        if not got:
            raise BadRequest(f"the file ended after {start + done} of {start + size} bytes", "Try again")
        done += got


def is_on_network(path: Path) -> bool:
    """Return whether a file's bytes may come from another machine."""
    import psutil

    if os.name == "nt" and str(path).startswith("\\\\"):
        return True
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.is_relative_to(mount.mountpoint)]
    # The longest mount point holds the file; of several mounts there, the last hides the others.
    mount = max(reversed(mounts), key=lambda mount: len(mount.mountpoint), default=None)
    return mount is not None and (mount.fstype.lower().startswith(_NETWORK) or "remote" in mount.opts.split(","))
