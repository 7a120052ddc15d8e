"""How soon a worker that failed may be started again."""

from __future__ import annotations

from luna_daemon.core import WorkerCrashed
from luna_daemon.pool.supervisor import Backoff
from tests.unit.fakes import Clock


def test_the_first_start_is_allowed():
    """Nothing has failed, nothing is waited for."""
    assert Backoff(clock=Clock()).wait_s == 0.0


def test_delays_double_up_to_the_cap():
    """0.5, 1, 2, 4 ... and never more than the most."""
    backoff = Backoff(0.5, 3.0, Clock())
    delays = []
    for _ in range(5):
        backoff.failed("no torch")
        delays.append(backoff.wait_s)
    assert delays == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_waiting_passes_with_time():
    """The wait shrinks as the clock goes on and ends at zero, not below."""
    clock = Clock()
    backoff = Backoff(2.0, 30.0, clock)
    backoff.failed("no torch")
    clock.now += 0.5
    assert backoff.wait_s == 1.5
    clock.now += 100.0
    assert backoff.wait_s == 0.0


def test_time_alone_does_not_forgive():
    """A start that fails after a long wait counts on; only success begins anew."""
    clock = Clock()
    backoff = Backoff(0.5, 30.0, clock)
    backoff.failed("x")
    clock.now += 100.0
    backoff.failed("x")
    assert backoff.wait_s == 1.0


def test_one_success_resets_everything():
    """After a good start the next failure waits the first delay again."""
    backoff = Backoff(0.5, 30.0, Clock())
    for _ in range(4):
        backoff.failed("x")
    backoff.succeeded()
    assert (backoff.wait_s, backoff.failures, backoff.why) == (0.0, 0, "")
    backoff.failed("x")
    assert backoff.wait_s == 0.5


def test_the_error_says_why_and_when():
    """Callers read the reason, the number of tries and when the next one is."""
    backoff = Backoff(0.5, 30.0, Clock())
    backoff.failed("first")
    backoff.failed("No module named 'torch'")
    error = backoff.error()
    assert isinstance(error, WorkerCrashed)
    assert str(error) == (
        "no worker can be started (2 tries failed): No module named 'torch'. The next try is in 1.0 s"
    )


def test_a_machine_may_fail_for_days():
    """Thousands of failures wait the most, like the tenth."""
    backoff = Backoff(0.5, 30.0, Clock())
    for _ in range(3000):
        backoff.failed("no torch")
    assert backoff.wait_s == 30.0
