"""The client's side of a LoRA: the daemon's file or memory, mapped copy-on-write, as tensors of the caller's own.

Nothing is read or copied until a tensor is used. A write copies the page it hits, in this process alone.
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
    """A LoRA's state dict. Writable; what is written is seen by nobody else.

    Args:
        name: as ComfyUI lists it, or a full path; then this very file is meant.

    Raises:
        ModelNotFound, ModelMismatchError, ModelLoadError: no such file, not the daemon's, or corrupt.
    """
    file = _own_file(name)
    copy = not link.use_arena
    while True:
        answer = link.call_for_refs(m.LoraLoad(name, file, copy), on_progress, is_cancelled)
        if answer.result["kind"] == "bytes":
            return dict(zip(answer.result["keys"], link.tensors(answer)))
        try:
            maps = _open(answer.result, link.arena)
            found = _tensors(answer.result["table"], maps)
        except (OSError, ValueError) as error:
            link.give_back(answer)
            if copy:
                raise ProtocolError(f"LoRA {name!r} cannot be mapped here: {error}", "Use the file itself") from error
            copy = True  # the daemon's file is not ours: another container, machine, or user
            continue
        except BaseException:
            link.give_back(answer)
            raise
        _keep(link, answer, maps)
        return found


def _own_file(name: str) -> m.FileId | None:
    """A full path that is here means this file, and no other of that path on the daemon's side."""
    path = Path(name)
    if not path.is_absolute():
        return None
    try:
        facts = path.stat()
    except OSError:
        return None
    return identity_of(name, facts)


class _Map:
    """A stretch of a file or of shared memory, mapped copy-on-write; ``offset`` is where it begins there."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self.memory = memory
        self.offset = offset


def _open(result: dict[str, Any], arena: ArenaView | None) -> dict[str, _Map]:
    """Map what the table needs, by segment; a file has none.

    Raises:
        OSError, ValueError: it is not here, or not the same.
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
            raise ValueError(f"{file['path']} here is not the daemon's")
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)


def _tensors(table: list[list[Any]], maps: dict[str, _Map]) -> dict[str, torch.Tensor]:
    """Views of each run's memory: one call per tensor and no loop of ours around it, since a LoRA has thousands."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for segment, name, offset, keys, shapes, which in table:
        dtype: torch.dtype = getattr(torch, name)
        starts = _starts(shapes, which)
        flat = _run(maps[segment], offset, starts[-1], ITEM_SIZES[name], dtype)
        found.update(zip(keys, map(flat.as_strided, _each(shapes, which), _each(_strides(shapes), which), starts)))
    return found


def _starts(shapes: list[list[int]], which: list[int]) -> list[int]:
    """The element at which each tensor of a run begins, and the one after the last."""
    return list(accumulate(_each(list(map(math.prod, shapes)), which), initial=0))


def _each(of: list[_T], which: list[int]) -> Iterator[_T]:
    return map(of.__getitem__, which)


def _run(place: _Map, offset: int, count: int, item: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if not count:
        return torch.empty(0, dtype=dtype)
    start = offset - place.offset
    if start % item:  # an old file whose header is not padded: some kernels want addresses that fit
        return torch.frombuffer(place.memory, dtype=torch.uint8, count=count * item, offset=start).clone().view(dtype)
    return torch.frombuffer(place.memory, dtype=dtype, count=count, offset=start)


def _strides(shapes: list[list[int]]) -> list[list[int]]:
    """In elements, for C order."""
    return [[math.prod(size or 1 for size in shape[dim + 1 :]) for dim in range(len(shape))] for shape in shapes]


def _keep(link: Link, answer: Any, maps: dict[str, _Map]) -> None:
    """The daemon is told when the last tensor has died: until then this client uses the LoRA."""
    alive = list(maps)

    def gone() -> None:
        alive.pop()
        if not alive:
            link.give_back(answer)

    if not maps:
        link.give_back(answer)
    for place in maps.values():
        weakref.finalize(place.memory, gone).atexit = False
