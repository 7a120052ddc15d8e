"""Memory for results that are received or copied, used again once the tensor that lay in it has died.

Fresh memory costs a page fault per 4 KB, which can take longer than the bytes themselves.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np

_SMALL = 64 << 10
"""Below this the allocator keeps memory by itself."""


class Buffers:
    """Hands out memory and takes it back by itself.

    Args:
        keep_bytes: most memory kept for the next payload.
    """

    def __init__(self, keep_bytes: int = 256 << 20) -> None:
        self.keep_bytes = keep_bytes
        self._spare: dict[int, deque[bytearray]] = {}

    def take(self, nbytes: int) -> memoryview:
        """Writable memory of this size; it comes back when the last view of it is gone."""
        if nbytes < _SMALL:
            return memoryview(bytearray(nbytes))
        # Views and tensors hold on to the array, and unlike a bytearray an array tells when it dies.
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
        # Runs when an array dies, in any thread and in the middle of anything: so it takes no lock.
        kept = sum(nbytes * len(stores) for nbytes, stores in list(self._spare.items()))
        if kept + len(store) <= self.keep_bytes:
            self._spare.setdefault(len(store), deque()).append(store)
        elif kept and len(store) not in self._spare:
            self._spare.clear()  # sizes that are not asked for any more must not keep new ones out
