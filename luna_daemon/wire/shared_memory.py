"""The control process' shared memory: when the arena grows, and the fallback to the socket when it cannot."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..core import LimitExceeded, logger
from . import messages as m
from .arena import Arena, Slot
from .layout import INLINE_BYTES

_TRIM_S = 60.0
_FULL_S = 1.0
_SIZES = 256


class SharedMemory:
    """Allocates slots from the arena, if there is an arena.

    Args:
        arena: ``None`` where there is no shared memory.
        why: the reason why ``arena`` is ``None``.
    """

    def __init__(self, arena: Arena | None, why: str) -> None:
        self.arena = arena
        self.why = why
        self._growing = asyncio.Lock()
        self._full_until = 0.0
        self._sizes: dict[tuple[Any, ...], int] = {}

    @property
    def info(self) -> m.ArenaInfo | None:
        """Where clients find the arena, for the ``welcome`` message; ``None`` without an arena."""
        return m.ArenaInfo(str(self.arena.folder), "nonce") if self.arena is not None else None

    def try_allocate(self, nbytes: int) -> Slot | None:
        """A slot from the existing segments; ``None`` if they are full."""
        return self.arena.try_allocate(nbytes) if self.arena is not None else None

    async def allocate(self, nbytes: int) -> Slot | None:
        """A slot, for which the arena grows if necessary; ``None`` if the limit is reached."""
        slot = self.try_allocate(nbytes)
        if slot is None and self.arena is not None:
            await self.grow(nbytes)
            slot = self.try_allocate(nbytes)
        return slot

    async def grow(self, nbytes: int) -> None:
        """Grow the arena by ``nbytes`` off the event loop: allocating every page is slow."""
        async with self._growing:
            if self.arena is None or time.monotonic() < self._full_until:
                return
            probe = self.arena.try_allocate(nbytes)
            if probe is not None:
                probe.release()
                return
            try:
                segment = await asyncio.get_running_loop().run_in_executor(None, self.arena.grow, nbytes)
            except LimitExceeded as error:
                if self._full_until == 0.0:
                    logger.warning("%s: tensors travel over the socket instead", error.message)
                # Not retried at once: a failing attempt takes as long as filling the memory that is left.
                self._full_until = time.monotonic() + _FULL_S
                return
            self._full_until = 0.0
            self.arena.add(*segment)

    def predict(self, key: tuple[Any, ...]) -> Slot | None:
        """A slot for a result as large as the last result of the same call; ``None`` if that size is unknown."""
        nbytes = self._sizes.get(key, 0)
        return self.try_allocate(nbytes) if nbytes > INLINE_BYTES else None

    def learn(self, key: tuple[Any, ...], nbytes: int) -> None:
        """Remember the size of a call's result in bytes, for ``predict``."""
        self._sizes[key] = nbytes
        if len(self._sizes) > _SIZES:
            del self._sizes[next(iter(self._sizes))]

    def tidy(self) -> None:
        """Return segments to the system that have been unused for a minute."""
        if self.arena is not None:
            self.arena.trim(_TRIM_S)
