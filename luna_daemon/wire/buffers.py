"""Memory for received or copied results, reused once the tensor in it has been deleted.

New memory costs a page fault per 4 KB, which can take longer than copying the bytes.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np

_SMALL = 64 << 10
"""Smaller buffers are not pooled: malloc reuses their memory."""


class Buffers:
    """Pool of buffers, which return to the pool when their last view is deleted.

    Args:
        keep_bytes: most bytes of unused buffers that the pool keeps.
    """

    def __init__(self, keep_bytes: int = 256 << 20) -> None:
        self.keep_bytes = keep_bytes
        self._spare: dict[int, deque[bytearray]] = {}

    def take(self, nbytes: int) -> memoryview:
        """Writable memory of ``nbytes`` bytes, which returns to the pool when its last view is deleted."""
        if nbytes < _SMALL:
            return memoryview(bytearray(nbytes))
        # Views and tensors keep the array alive; and unlike a bytearray, an array can have a finalizer.
        store = self._reuse(nbytes) or bytearray(nbytes)
        holder = np.frombuffer(store, np.uint8)
        weakref.finalize(holder, self._give, store).atexit = False
        return memoryview(holder)  # type: ignore[arg-type]

    def _reuse(self, nbytes: int) -> bytearray | None:
        try:
            return self._spare[nbytes].pop()
        except (KeyError, IndexError):
            return None

    def _give(self, store: bytearray) -> None:
        # Runs when an array is deleted, in any thread and between any two instructions: so without a lock.
        kept = sum(nbytes * len(stores) for nbytes, stores in list(self._spare.items()))
        if kept + len(store) <= self.keep_bytes:
            self._spare.setdefault(len(store), deque()).append(store)
        elif kept and len(store) not in self._spare:
            self._spare.clear()  # sizes that are no longer requested must not keep new sizes out
