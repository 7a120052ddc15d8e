"""LoRAs in the client: tensors over the daemon's file or shared memory, mapped copy-on-write.

Nothing is read or copied until a tensor is used. A write copies the written page, in this process alone.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core import ProtocolError
from ..wire import messages as m
from ..wire.arena import ArenaView
from ..wire.codec import ITEM_SIZES
from ..wire.link import IsCancelled, Link, OnProgress
from .identity import identity_of, same_file

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


def load(
    link: Link, name: str, on_progress: OnProgress | None = None, is_cancelled: IsCancelled | None = None
) -> dict[str, torch.Tensor]:
    """A LoRA's state dict. The tensors are writable; other processes do not see the writes.

    Args:
        name: name in ComfyUI's list, or the full path of a file, which must be the daemon's file too.

    Raises:
        ModelNotFound, ModelMismatchError, ModelLoadError: the file does not exist, differs from the daemon's, or
            is corrupt.
        ProtocolError: the tensors can neither be mapped nor copied.
    """
    file = _own_file(name)
    copy = not link.use_arena
    while True:
        answer = link.call_for_refs(m.LoraLoad(name, file, copy), on_progress, is_cancelled)
        if answer.result["kind"] == "bytes":
            return dict(zip(answer.result["keys"], link.tensors(answer)))
        try:
            maps = _open(answer.result, link.arena)
            tensors = _tensors(answer.result["table"], maps)
        except (OSError, ValueError) as error:
            link.give_back(answer)
            if copy:
                raise ProtocolError(f"LoRA {name!r} cannot be mapped here: {error}", "Load the file locally") from error
            copy = True  # this process cannot open the daemon's file: another container, machine, or user
            continue
        except BaseException:
            link.give_back(answer)
            raise
        _keep(link, answer, maps)
        return tensors


def _own_file(name: str) -> m.FileId | None:
    """Identity of the file if ``name`` is its full path on this machine: the daemon must use the same file."""
    path = Path(name)
    if not path.is_absolute():
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return identity_of(name, status)


class _Map:
    """Copy-on-write map of a part of a file or segment; the part begins at ``offset`` bytes."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self.memory = memory
        self.offset = offset


def _open(result: dict[str, Any], arena: ArenaView | None) -> dict[str, _Map]:
    """Map the memory that the table refers to, by segment name; a file has the name ``""``.

    Raises:
        OSError, ValueError: the file or memory is not visible here, or is not the daemon's.
    """
    if result["kind"] == "file":
        return {"": _Map(_map_file(result["file"]), 0)}
    if arena is None:
        raise ValueError("shared memory is not visible here")
    spans: dict[str, tuple[int, int]] = {}
    for segment, dtype, offset, _, shapes, which in result["table"]:
        end = offset + ITEM_SIZES[dtype] * _starts(shapes, which)[-1]
        low, high = spans.get(segment, (offset, end))
        spans[segment] = (min(low, offset), max(high, end))
    return {segment: _Map(*arena.private(segment, low, high - low)) for segment, (low, high) in spans.items()}


def _map_file(file: dict[str, Any]) -> mmap.mmap:
    with Path(file["path"]).open("rb") as opened:
        if not same_file(os.fstat(opened.fileno()), file["size"], file["mtime_ns"], file["inode"]):
            raise ValueError(f"{file['path']} is not the daemon's file")
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)


def _tensors(table: list[list[Any]], maps: dict[str, _Map]) -> dict[str, torch.Tensor]:
    """Views of each run's memory. ``map`` instead of a Python loop, since a LoRA has thousands of tensors."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for segment, name, offset, keys, shapes, which in table:
        dtype: torch.dtype = getattr(torch, name)
        starts = _starts(shapes, which)
        flat = _run(maps[segment], offset, starts[-1], ITEM_SIZES[name], dtype)
        tensors.update(zip(keys, map(flat.as_strided, _each(shapes, which), _each(_strides(shapes), which), starts)))
    return tensors


def _starts(shapes: list[list[int]], which: list[int]) -> list[int]:
    """Index of each tensor's first element in a run, and at the end the run's number of elements."""
    return list(accumulate(_each(list(map(math.prod, shapes)), which), initial=0))


def _each(of: list[_T], which: list[int]) -> Iterator[_T]:
    return map(of.__getitem__, which)


def _run(place: _Map, offset: int, count: int, item: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if not count:
        return torch.empty(0, dtype=dtype)
    start = offset - place.offset
    if start % item:  # an old file with an unpadded header: some kernels need aligned addresses
        return torch.frombuffer(place.memory, dtype=torch.uint8, count=count * item, offset=start).clone().view(dtype)
    return torch.frombuffer(place.memory, dtype=dtype, count=count, offset=start)


def _strides(shapes: list[list[int]]) -> list[list[int]]:
    """Strides of each shape in elements, for C order."""
    return [[math.prod(size or 1 for size in shape[dim + 1 :]) for dim in range(len(shape))] for shape in shapes]


def _keep(link: Link, answer: Any, maps: dict[str, _Map]) -> None:
    """Release the LoRA in the daemon once the last of its tensors here is deleted."""
    alive = list(maps)

    def on_unmapped() -> None:
        alive.pop()
        if not alive:
            link.give_back(answer)

    if not maps:
        link.give_back(answer)
    for place in maps.values():
        weakref.finalize(place.memory, on_unmapped).atexit = False
