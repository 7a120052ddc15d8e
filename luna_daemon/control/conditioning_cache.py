"""Answers to repeated prompts: conditioning and tokens kept in memory, least recently used out first.

The key is everything that determines the result: the model with its files' identity, family, device and precision
(``LoadSpec.key``), the whole call (text or tokens with weights, layer, projection) and any input bytes. Flags of the
backend are the same for the whole life of a daemon, and the cache lives no longer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from ..pool.work import Outcome


class ConditioningCache:
    """Holds outcomes up to ``max_bytes``; 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[bytes, Outcome] = OrderedDict()

    def get(self, key: bytes) -> Outcome | None:
        """The outcome kept under ``key``; its slots stay the cache's."""
        outcome = self._kept.get(key)
        if outcome is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return outcome

    def put(self, key: bytes, outcome: Outcome) -> None:
        """Keep an outcome; takes its own use of the slots."""
        size = _size(outcome)
        if size > self.max_bytes or key in self._kept:
            return
        while self.nbytes + size > self.max_bytes:
            self._drop(next(iter(self._kept)))
        for piece in outcome.pieces:
            piece.slot.retain()
        self._kept[key] = outcome
        self.nbytes += size

    def resize(self, max_bytes: int) -> None:
        """Another limit from now on."""
        self.max_bytes = max_bytes
        while self.nbytes > max_bytes:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        for key in list(self._kept):
            self._drop(key)

    def stats(self) -> dict[str, Any]:
        """Figures for ``info``."""
        return {
            "entries": len(self._kept), "bytes": self.nbytes, "max_bytes": self.max_bytes,
            "hits": self.hits, "misses": self.misses,
        }  # fmt: skip

    def _drop(self, key: bytes) -> None:
        outcome = self._kept.pop(key)
        self.nbytes -= _size(outcome)
        outcome.release()


def _size(outcome: Outcome) -> int:
    """Bytes of an outcome: its tensors, or the plain data that tokens are."""
    if outcome.pieces:
        return sum(piece.slot.nbytes for piece in outcome.pieces)
    return len(msgspec.msgpack.encode(outcome.result))
