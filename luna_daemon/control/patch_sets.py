"""Patch sets that clients put for the text encoders: bounded, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ..core import LimitExceeded
from ..pool.work import Piece, release
from ..wire.messages import ModelRef


@dataclass(frozen=True)
class PatchEntry:
    """A patch set: how its tensors belong together, and where they lie."""

    packed: Any
    pieces: list[Piece]
    models: list[ModelRef] = field(default_factory=list)
    """Whose weights it names."""

    @property
    def nbytes(self) -> int:
        return sum(piece.slot.nbytes for piece in self.pieces)


class PatchSets:
    """Patch sets by name. What is dropped is put again when it is needed."""

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self._kept: OrderedDict[str, PatchEntry] = OrderedDict()

    def get(self, name: str) -> PatchEntry | None:
        """The set; its slots stay ours."""
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def put(self, name: str, entry: PatchEntry) -> None:
        """Keep a set, in place of one of the same name; takes over its slots' use.

        Raises:
            LimitExceeded: larger than all that is kept; the slots stay the caller's.
        """
        if entry.nbytes > self.max_bytes:
            raise LimitExceeded(f"patch set {name!r} has {entry.nbytes} bytes; at most {self.max_bytes} are kept")
        self.drop(name)
        while self.nbytes + entry.nbytes > self.max_bytes or len(self._kept) >= self.max_entries:
            self.drop(next(iter(self._kept)))
        self._kept[name] = entry
        self.nbytes += entry.nbytes

    def drop(self, name: str) -> None:
        """Forget a set, if it is there."""
        entry = self._kept.pop(name, None)
        if entry is not None:
            self.nbytes -= entry.nbytes
            release(entry.pieces)

    def clear(self) -> None:
        for name in list(self._kept):
            self.drop(name)
