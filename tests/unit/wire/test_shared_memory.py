"""When shared memory is made, and what happens when there is none."""

from __future__ import annotations

import asyncio
import logging

from luna_daemon.core import LimitExceeded
from luna_daemon.wire.layout import INLINE_BYTES
from luna_daemon.wire.shared_memory import SharedMemory
from tests.unit.fakes import Memory


class Arena:
    """Has room once it was grown; may refuse to grow."""

    folder = "/arena"

    def __init__(self, limit: int = 1) -> None:
        self.limit, self.grown, self.rooms, self.memory = limit, 0, 0, Memory()

    def try_allocate(self, nbytes):
        return self.memory.slot(8) if self.rooms else None

    def grow(self, nbytes):
        self.grown += 1
        if self.grown > self.limit:
            raise LimitExceeded("full")
        return (nbytes,)

    def add(self, nbytes):
        self.rooms += 1


def test_memory_is_made_when_the_first_slot_is_asked_for():
    """Once, for two that ask at the same time; the slot that only looked for room is given back."""
    arena = Arena()
    memory = SharedMemory(arena, "")

    async def main() -> None:
        slots = await asyncio.gather(memory.allocate(100), memory.allocate(100))
        assert all(slots) and arena.grown == 1 and arena.memory.live == 2

    asyncio.run(main())
    assert memory.info.folder == "/arena"


def test_a_full_arena_is_not_asked_again_at_once(caplog):
    """One warning; the bytes go by the socket meanwhile."""
    arena = Arena(limit=0)
    memory = SharedMemory(arena, "")

    async def main() -> None:
        with caplog.at_level(logging.WARNING, "luna_daemon"):
            assert await memory.allocate(1) is None and await memory.allocate(1) is None

    asyncio.run(main())
    assert arena.grown == 1 and [record.getMessage() for record in caplog.records] == [
        "full: tensors travel over the socket instead"
    ]


def test_without_an_arena_there_is_no_slot():
    """And the reason is kept for the greeting."""
    memory = SharedMemory(None, "switched off")
    assert memory.info is None and memory.try_allocate(1) is None and memory.why == "switched off"
    assert asyncio.run(memory.allocate(1)) is None
    memory.tidy()


def test_a_slot_waits_for_a_result_as_large_as_the_last():
    """Not for one that would travel inline; the oldest calls are forgotten."""
    arena = Arena()
    arena.rooms = 1
    memory = SharedMemory(arena, "")
    assert memory.predict(("a",)) is None
    memory.learn(("a",), INLINE_BYTES)
    assert memory.predict(("a",)) is None
    memory.learn(("a",), INLINE_BYTES + 1)
    assert memory.predict(("a",)) is not None
    for number in range(1000):
        memory.learn((number,), INLINE_BYTES + 1)
    assert memory.predict(("a",)) is None and memory.predict((999,)) is not None
