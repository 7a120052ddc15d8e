"""LoRA state dicts in RAM, shared by all clients: least recently used out first, by bytes and by count."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from .core import LimitExceeded
from .pool.work import Piece, release
from .wire.messages import ModelRef

__all__ = ["LoRACache", "LoRAEntry"]


@dataclass
class LoRAEntry:
    """One LoRA: its tensors by key, and its figures."""

    keys: list[str]
    pieces: list[Piece]
    packed: Any = None
    """Of a patch set: how its tensors belong together."""
    models: list[ModelRef] = field(default_factory=list)
    """Of a patch set: whose weights it names."""
    hits: int = 0
    last_used: float = field(default_factory=time.time)

    @property
    def nbytes(self) -> int:
        return sum(piece.slot.nbytes for piece in self.pieces)


class LoRACache:
    """Holds state dicts that clients put, in the daemon's shared memory.

    Args:
        max_bytes: 8 GB by default.
        max_entries: 100 by default.
    """

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, LoRAEntry] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def get(self, name: str) -> LoRAEntry | None:
        """The entry; its slots stay the cache's."""
        entry = self._kept.get(name)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        entry.hits += 1
        entry.last_used = time.time()
        self._kept.move_to_end(name)
        return entry

    def put(self, name: str, entry: LoRAEntry) -> None:
        """Keep an entry, in place of one of the same name; takes over its slots' use.

        Raises:
            LimitExceeded: larger than the whole cache; the slots stay the caller's.
        """
        if entry.nbytes > self.max_bytes or self.max_entries < 1:
            raise LimitExceeded(
                f"LoRA {name!r} has {entry.nbytes} bytes; the cache holds {self.max_bytes}", "Raise lora_cache_gb"
            )
        self.drop(name)
        while self.nbytes + entry.nbytes > self.max_bytes or len(self._kept) >= self.max_entries:
            self.drop(next(iter(self._kept)))
        self._kept[name] = entry
        self.nbytes += entry.nbytes

    def drop(self, name: str) -> bool:
        """Forget an entry; whether there was one."""
        entry = self._kept.pop(name, None)
        if entry is None:
            return False
        self.nbytes -= entry.nbytes
        release(entry.pieces)
        return True

    def clear(self) -> None:
        for name in list(self._kept):
            self.drop(name)

    def stats(self) -> dict[str, Any]:
        """Figures for ``info``: totals, and per LoRA."""
        return {
            "entries": len(self._kept), "bytes": self.nbytes, "max_bytes": self.max_bytes,
            "max_entries": self.max_entries, "hits": self.hits, "misses": self.misses,
            "loras": {
                name: {"bytes": entry.nbytes, "hits": entry.hits, "last_used": entry.last_used}
                for name, entry in self._kept.items()
            },
        }  # fmt: skip
