"""The queue: order, displacement, lines of one model, waiting times."""

from __future__ import annotations

import msgspec
import pytest

from luna_daemon.core import Busy, DeadlineExceeded
from luna_daemon.pool.waiting import Line, WorkQueue
from luna_daemon.pool.work import Work
from tests.unit.fake_processes import COMFY, spec
from tests.unit.fakes import Clock, Waiter


@pytest.fixture
def clock():
    return Clock()


def work(clock, client: int = 1, model=None, priority: int = 1) -> Work:
    return Work("x", msgspec.Raw(b""), model or spec(), [], priority, None, [Waiter(client)], born=clock())


def test_a_full_queue_loses_the_greediest_clients_last(clock):
    """It is told how long requests wait on average; a newcomer that would have as many is refused."""
    queue = WorkQueue(clock)
    early = work(clock)
    clock.now += 3
    queue.served(early)
    first, second = work(clock), work(clock)
    for item in (first, second):
        queue.add(item, 2)
    waiter = second.waiters[0]
    queue.add(work(clock, 2), 2)
    assert len(queue) == 2 and first in queue and second not in queue
    assert isinstance(waiter.errors[0], Busy) and waiter.errors[0].retry_after_s == 3.0
    with pytest.raises(Busy):
        queue.add(work(clock, 2), 2)


def test_what_is_tried_again_is_first(clock):
    """Within its client's turn."""
    queue = WorkQueue(clock)
    items = [work(clock) for _ in range(2)]
    queue.add(items[0], 9)
    queue.put_back(items[1])
    assert list(queue) == queue.in_order({}) == [items[1], items[0]]


def test_lines_are_by_model_and_comfyui(clock):
    """Length and the oldest one's waiting time."""
    queue = WorkQueue(clock)
    for seconds, model in ((1, spec("a")), (2, spec("b")), (4, spec("a")), (0, spec("a", comfy=COMFY))):
        queue.add(work(clock, model=model), 9)
        clock.now += seconds
    assert sorted(queue.lines().values()) == [Line(1, 0.0), Line(1, 6.0), Line(2, 7.0)]


def test_failing_is_for_those_that_still_wait(clock):
    """Work that a worker has taken meanwhile is not answered here."""
    queue = WorkQueue(clock)
    taken, left = work(clock), work(clock)
    for item in (taken, left):
        queue.add(item, 9)
    waiters = taken.waiters[0], left.waiters[0]
    queue.remove(taken)
    queue.fail([taken, left], DeadlineExceeded("late"))
    assert [len(waiter.errors) for waiter in waiters] == [0, 1] and not queue
