"""LoRA files as both sides see them: the safetensors header, checked in full, and where each tensor's bytes lie.

Used by the daemon, which checks a file before it offers it, and by clients, which map it. Needs no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ..core import BadRequest, ModelLoadError
from ..wire.codec import ITEM_SIZES
from ..wire.messages import TensorRef

NamedRef = tuple[str, TensorRef]
"""A tensor's key and its place: ``offset`` counts from the start of the file, or of the memory that holds it."""

MAX_HEADER = 100_000_000
"""What safetensors itself allows."""
MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_MOST_ELEMENTS = 1 << 40
_CHUNK = 4 << 20
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
_NETWORK = ("nfs", "cifs", "smb", "afs", "9p", "ceph", "gluster", "lustre", "virtiofs", "webdav", "drvfs", "fuse")
"""Beginnings of file systems whose bytes come from elsewhere; what FUSE holds, nobody knows."""


def read_header(file: BinaryIO, size: int, name: str) -> list[NamedRef]:
    """The tensors of an open safetensors file of ``size`` bytes, in the order of their bytes.

    Raises:
        ModelLoadError: the file is not one, or contradicts itself; says how.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise _corrupt(name, f"its header would have {length} bytes, the file has {size}")
    return parse_header(file.read(length), size, name)


def parse_header(header: bytes, size: int, name: str) -> list[NamedRef]:
    """The same for the header's bytes alone: bounds, overlaps, gaps and sizes are checked, not believed."""
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise _corrupt(name, f"its header is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise _corrupt(name, "its header is no JSON object")
    _check_metadata(document.pop("__metadata__", None), name)
    if len(document) > MAX_TENSORS:
        raise _corrupt(name, f"it has {len(document)} tensors; at most {MAX_TENSORS} are read")
    at = 8 + len(header)
    found = sorted(
        ((key, _tensor(key, entry, at, name)) for key, entry in document.items()),
        key=lambda pair: (pair[1].offset, pair[1].nbytes),
    )
    for key, ref in found:
        if ref.offset != at:
            raise _corrupt(name, f"tensor {key!r} begins at byte {ref.offset}, the one before it ends at {at}")
        at += ref.nbytes
    if at != size:
        raise _corrupt(name, f"its tensors end at byte {at}, the file at {size}")
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check_metadata(metadata: Any, name: str) -> None:
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not plain:
        raise _corrupt(name, "its __metadata__ is not a map of texts")


def _tensor(key: str, entry: Any, data: int, name: str) -> TensorRef:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(name, f"tensor {key!r} is described by {_short(entry)}")
    dtype, shape, span = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise _corrupt(name, f"tensor {key!r} has dtype {_short(entry['dtype'])}, which is not supported")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > _MOST_ELEMENTS:
        raise _corrupt(name, f"tensor {key!r} has shape {_short(shape)}")
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if not _counts(span) or len(span) != 2 or span[1] - span[0] != nbytes:
        raise _corrupt(name, f"tensor {key!r} of {nbytes} bytes lies at {_short(span)}")
    return TensorRef(dtype, tuple(shape), nbytes, data + span[0])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _corrupt(name: str, why: str) -> ModelLoadError:
    return ModelLoadError(f"LoRA {name!r} is no sound safetensors file: {why}", "Fetch or save the file anew")


def columns(places: Iterable[tuple[str, str, TensorRef]]) -> list[list[Any]]:
    """The table of a reply, from (key, segment, place) in C order: runs of tensors of one dtype without gaps.

    Each run is ``[segment, dtype, offset, keys, shapes, which]``: the run's distinct shapes, and for each key which of
    them is its own. A LoRA has thousands of tensors, and some dozens of shapes.
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
    """Read ``size`` bytes from ``start``: into memory, or only into the system's page cache.

    Raises:
        BadRequest: the file has become shorter meanwhile.
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
    """Whether a file's bytes come from another machine, or from we know not where."""
    import psutil

    if os.name == "nt" and str(path).startswith("\\\\"):
        return True
    holds: tuple[int, str, str] = (0, "", "")
    for mount in psutil.disk_partitions(all=True):
        if _is_below(path, mount.mountpoint) and len(mount.mountpoint) >= holds[0]:
            holds = (len(mount.mountpoint), mount.fstype.lower(), mount.opts)
    return holds[1].startswith(_NETWORK) or "remote" in holds[2].split(",")


def _is_below(path: Path, mount: str) -> bool:
    try:
        return path.is_relative_to(mount)
    except (ValueError, OSError):
        return False
