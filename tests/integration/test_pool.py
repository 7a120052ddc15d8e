"""The pool with real processes: who goes first, when workers come and go, what is computed once."""

from __future__ import annotations

import psutil
import pytest

from luna_daemon.core import Busy, DeadlineExceeded, Priority
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import encode_call
from tests.integration.helpers import Background, RawPeer, occupied

ONE = {"max_vae_workers": 1}


def test_a_full_queue(start_daemon):
    """One request too many is told when to come back; those that wait are served."""
    daemon = start_daemon(queue_limit=2, **ONE)
    client = daemon.client()
    with occupied(daemon):
        calls = []
        for number in (1, 2):
            calls.append(Background(lambda: client.call(m.Echo(0, 0.05))))
            daemon.wait_for(lambda info, number=number: info["queue"]["waiting"] == number)
        with pytest.raises(Busy, match="2 requests wait") as caught:
            client.call(m.Echo())
    assert caught.value.retry_after_s > 0 and "Ask again in" in caught.value.hint
    for call in calls:
        call.value()
    client.call(m.Echo())


def test_clients_take_turns(start_daemon):
    """A client with sixty requests in the queue does not hold up another's single one."""
    daemon = start_daemon(**ONE)
    with RawPeer(daemon) as greedy:
        with occupied(daemon):
            greedy.hello()
            for number in range(1, 61):
                greedy.channel.send(m.Request(number, encode_call(m.Echo(0, 0.2))))
            daemon.wait_for(lambda info: info["queue"]["waiting"] == 60)
            modest = Background(lambda: daemon.client().call(m.Echo()))
            daemon.wait_for(lambda info: info["queue"]["waiting"] == 61)
        modest.value()
        left = daemon.info()["queue"]["waiting"]
    assert left > 45, f"it came after {60 - left} of the other's requests"


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "0"}])
def test_how_a_workers_threads_wait(start_daemon, monkeypatch, chosen):
    """They spin for a moment, unless the user has decided about one of the two."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    daemon = start_daemon(**ONE)
    daemon.client().call(m.Echo())
    (worker,) = daemon.workers()
    found = {name: value for name, value in worker.environ().items() if name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    assert found == (chosen or {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"})


def test_priority(start_daemon):
    """Interactive work overtakes batch work that waits; a priority of one's own invention is not above that."""
    daemon = start_daemon(**ONE)
    calls = []
    with occupied(daemon):
        for number, priority in enumerate([Priority.BATCH, Priority.NORMAL, Priority.INTERACTIVE, -(10**6)]):
            client = daemon.client()
            calls.append(Background(lambda c=client, p=priority: c.call(m.Echo(0, 0.1), priority=p)))
            daemon.wait_for(lambda info, number=number: info["queue"]["waiting"] == number + 1)
    ended = [call.wait().ended for call in calls]
    assert ended[2] < ended[3] < ended[1] < ended[0]


def test_deadline(start_daemon):
    """A request whose deadline passes while it waits is answered at that time, not when its turn comes."""
    daemon = start_daemon(**ONE)
    with occupied(daemon) as first:
        with pytest.raises(DeadlineExceeded, match="past its deadline"):
            daemon.client().call(m.Echo(), deadline_s=0.2)
        assert not first.ended


def test_another_worker_for_a_queue(start_daemon):
    """A queue that lasts brings a second worker, and no third; a short one brings none."""
    daemon = start_daemon(max_vae_workers=2, scale_up_delay_sec=0.3, queue_threshold=2)
    client = daemon.client()
    client.call(m.Echo())
    [call.value() for call in [Background(lambda: client.call(m.Echo(0, 0.1))) for _ in range(2)]]
    assert len(daemon.info()["workers"]) == 1
    calls = [Background(lambda: client.call(m.Echo(0, 0.4))) for _ in range(8)]
    daemon.wait_for(lambda info: sum(worker["state"] == "busy" for worker in info["workers"]) == 2, 5)
    for call in calls:
        call.value()
    assert len(daemon.info()["workers"]) == 2


def test_idle_stages(start_daemon):
    """Idle, the last worker gives its models back and keeps its process, then ends; the next call brings it back."""
    daemon = start_daemon(idle_timeout_sec=0.5, worker_keep_sec=2.0)
    client = daemon.client()
    client.call(m.Echo())
    pid = daemon.info()["workers"][0]["pid"]
    info = daemon.wait_for(lambda info: not info["models"]["loaded"], 5)
    assert [worker["pid"] for worker in info["workers"]] == [pid], "the process is kept: its imports are dear"
    client.call(m.Echo())
    assert [worker["pid"] for worker in daemon.info()["workers"]] == [pid]
    daemon.wait_for(lambda info: not info["workers"], 5)
    client.call(m.Echo())
    info = daemon.info()
    assert info["workers"][0]["pid"] != pid and info["crashes"] == 0
    assert not psutil.pid_exists(pid)


def test_workers_that_are_kept(start_daemon):
    """A pinned model outlasts both idle limits, until it is unloaded."""
    daemon = start_daemon(idle_timeout_sec=0.2, worker_keep_sec=0.3)
    client = daemon.client()
    client.warm(m.ModelRef("echo"), pin=True)
    info = daemon.wait_for(lambda info: info["workers"][0]["idle_s"] > 0.6)
    assert info["models"]["loaded"] == info["models"]["pinned"] == ["echo"]
    client.unload()
    daemon.wait_for(lambda info: not info["workers"], 5)


def test_extra_workers_end_first(start_daemon):
    """When it is quiet again, only one worker is left."""
    daemon = start_daemon(idle_timeout_sec=0.5, scale_up_delay_sec=0.1, queue_threshold=1)
    client = daemon.client()
    for call in [Background(lambda: client.call(m.Echo(0, 0.5))) for _ in range(4)]:
        call.value()
    assert len(daemon.info()["workers"]) == 2
    info = daemon.wait_for(lambda info: len(info["workers"]) == 1, 5)
    assert info["crashes"] == 0
