"""The LRU cache of conditionings, and of clients' patch sets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class PiecesCache(Generic[Key, Value]):
    """An LRU cache of values that own memory, limited in bytes and in entries.

    Args:
        max_bytes: limit of the bytes of all values together.
        max_entries: limit of the number of values.
        on_drop: releases the memory of a value that leaves the cache.
    """

    def __init__(self, max_bytes: int, max_entries: int, on_drop: Callable[[Value], None]) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._on_drop = on_drop
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def get(self, key: Key) -> Value | None:
        """The value of ``key``, counted as a hit or a miss; the cache still owns the value's memory."""
        entry = self._kept.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return entry[0]

    def put(self, key: Key, value: Value, nbytes: int) -> bool:
        """Keep a value, in place of another of the same key.

        Returns:
            Whether the cache now owns the value; ``False`` if the value alone exceeds ``max_bytes``.
        """
        if nbytes > self.max_bytes:
            return False
        if key in self._kept:
            self._drop(key)
        while self.nbytes + nbytes > self.max_bytes or len(self._kept) >= self.max_entries:
            self._drop(next(iter(self._kept)))
        self._kept[key] = value, nbytes
        self.nbytes += nbytes
        return True

    def resize(self, max_bytes: int) -> None:
        """Change the limit of bytes, and drop values that exceed the new limit."""
        self.max_bytes = max_bytes
        while self.nbytes > max_bytes:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Drop all values."""
        for key in list(self._kept):
            self._drop(key)

    def stats(self) -> dict[str, Any]:
        """Statistics for ``info``: entries, hits and misses; sizes in bytes."""
        return {
            "entries": len(self._kept), "bytes": self.nbytes, "max_bytes": self.max_bytes,
            "hits": self.hits, "misses": self.misses,
        }  # fmt: skip

    def _drop(self, key: Key) -> None:
        value, nbytes = self._kept.pop(key)
        self.nbytes -= nbytes
        self._on_drop(value)
