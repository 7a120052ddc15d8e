"""The control process' shared memory: who gets a slot, when more is made, and what happens when there is none."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..core import LimitExceeded, logger
from . import messages as m
from .arena import Arena, Slot

_TRIM_S = 60.0
_FULL_S = 1.0
_SIZES = 256


class SharedMemory:
    """Slots from the arena, if there is one.

    Args:
        arena: ``None`` where there is none; ``why`` then says so.
    """

    def __init__(self, arena: Arena | None, why: str) -> None:
        self.arena = arena
        self.why = why
        self._growing = asyncio.Lock()
        self._full_until = 0.0
        self._sizes: dict[tuple[Any, ...], int] = {}

    @property
    def info(self) -> m.ArenaInfo | None:
        """What ``welcome`` tells clients."""
        return m.ArenaInfo(str(self.arena.folder), "nonce") if self.arena is not None else None

    def try_allocate(self, nbytes: int) -> Slot | None:
        """A slot from the memory there is."""
        return self.arena.try_allocate(nbytes) if self.arena is not None else None

    async def allocate(self, nbytes: int) -> Slot | None:
        """A slot, making more memory if need be; ``None`` when it is full."""
        slot = self.try_allocate(nbytes)
        if slot is None and self.arena is not None:
            await self.grow(nbytes)
            slot = self.try_allocate(nbytes)
        return slot

    async def grow(self, nbytes: int) -> None:
        """Make room for ``nbytes``, off the event loop: the pages are made, which takes a while."""
        async with self._growing:
            if self.arena is None or time.monotonic() < self._full_until:
                return
            probe = self.arena.try_allocate(nbytes)
            if probe is not None:
                probe.release()
                return
            try:
                made = await asyncio.get_running_loop().run_in_executor(None, self.arena.grow, nbytes)
            except LimitExceeded as error:
                if self._full_until == 0.0:
                    logger.warning("%s: tensors go by the socket", error.message)
                # Not asked again at once: to find out costs as much as to fill what is left.
                self._full_until = time.monotonic() + _FULL_S
                return
            self._full_until = 0.0
            self.arena.add(*made)

    def foretell(self, key: tuple[Any, ...]) -> Slot | None:
        """A slot for a result as large as the last one of the same call."""
        nbytes = self._sizes.get(key, 0)
        return self.try_allocate(nbytes) if nbytes else None

    def learn(self, key: tuple[Any, ...], nbytes: int) -> None:
        """How large the result of a call was."""
        self._sizes[key] = nbytes
        if len(self._sizes) > _SIZES:
            del self._sizes[next(iter(self._sizes))]

    def tidy(self) -> None:
        """Give memory back that has not been used for a minute."""
        if self.arena is not None:
            self.arena.trim(_TRIM_S)
