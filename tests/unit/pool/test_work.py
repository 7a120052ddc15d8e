"""A piece of work: everybody is answered once, and every use of memory is given back once."""

from __future__ import annotations

import msgspec
import pytest

from luna_daemon.core import InternalError
from luna_daemon.pool.work import Outcome, Work
from luna_daemon.wire.messages import LoadSpec
from tests.unit.fakes import Memory, Waiter

SPEC = LoadSpec("vae:a:0", "vae", "sdxl", (), "cpu", "auto")


def work(*waiters: Waiter, pieces=(), keep=None) -> Work:
    """Work that these clients wait for."""
    return Work("vae.decode", msgspec.Raw(b"\x80"), SPEC, list(pieces), 1, None, list(waiters), keep=keep)


def test_finishing_answers_and_gives_the_inputs_back():
    """The waiter gets the outcome for itself, and the input slots are free."""
    memory, waiter = Memory(), Waiter()
    piece = memory.piece()
    task = work(waiter, pieces=[piece])
    task.finish(memory.outcome(8))
    assert [(len(outcome.pieces), shared) for outcome, shared in waiter.outcomes] == [(1, False)]
    assert memory.live == 0 and piece.slot.users == 0


def test_failing_answers_and_gives_the_inputs_back():
    """The waiter gets the error, and the input slots are free."""
    memory, waiter = Memory(), Waiter()
    error = InternalError("x")
    work(waiter, pieces=[memory.piece(), memory.piece()]).fail(error)
    assert waiter.errors == [error] and waiter.outcomes == [] and memory.live == 0


@pytest.mark.parametrize("first", ["finish", "fail"])
@pytest.mark.parametrize("second", ["finish", "fail"])
def test_the_end_comes_once(first, second):
    """A second end answers nobody, gives no input back twice, and still frees the outcome that came with it."""
    memory, waiter = Memory(), Waiter()
    piece = memory.piece()
    task = work(waiter, pieces=[piece])
    for end in (first, second):
        task.fail(InternalError("x")) if end == "fail" else task.finish(memory.outcome(8))
    assert len(waiter.outcomes) + len(waiter.errors) == 1
    assert piece.slot.users == 0 and memory.live == 0


def test_an_outcome_for_several_is_shared():
    """Two that asked for the same get the same memory, both told to copy; it is free when the work lets go."""
    memory, waiters = Memory(), [Waiter(1), Waiter(2)]
    work(*waiters).finish(memory.outcome(8))
    assert [waiter.outcomes[0][1] for waiter in waiters] == [True, True]
    assert waiters[0].outcomes[0][0] is waiters[1].outcomes[0][0]
    assert memory.live == 0


def test_a_kept_outcome_is_shared():
    """What a cache keeps is given even to a single waiter to copy, and stays in use by the cache alone."""
    memory, waiter, kept = Memory(), Waiter(), []

    def keep(outcome: Outcome) -> None:
        kept.append(outcome)
        for piece in outcome.pieces:
            piece.slot.retain()

    work(waiter, keep=keep).finish(memory.outcome(8))
    assert waiter.outcomes[0][1] is True
    assert memory.live == 1 and kept[0].pieces[0].slot.users == 1


def test_an_outcome_that_nobody_wants_is_freed():
    """All callers have left: the result is dropped, and its memory is free."""
    memory = Memory()
    work().finish(memory.outcome(8, 16))
    assert memory.live == 0


def test_inputs_are_free_before_the_answer():
    """A client that sends the next request as soon as it has the answer finds the memory free."""
    memory = Memory()

    class Looking(Waiter):
        def finish(self, outcome, shared):
            assert piece.slot.users == 0
            super().finish(outcome, shared)

    piece = memory.piece()
    waiter = Looking()
    work(waiter, pieces=[piece]).finish(memory.outcome())
    assert len(waiter.outcomes) == 1


def test_progress_reaches_everybody():
    """Each waiter hears of loading and tiles."""
    waiters = [Waiter(1), Waiter(2)]
    task = work(*waiters)
    task.progress("loading")
    task.progress("tile", 2, 9)
    assert [waiter.seen for waiter in waiters] == [[("loading", 0, 0), ("tile", 2, 9)]] * 2


def test_the_client_is_the_one_that_asked_first():
    """Fairness counts the work for it, and for nobody once all have left."""
    task = work(Waiter(5), Waiter(6))
    assert task.client == 5
    task.waiters.clear()
    assert task.client == 0
