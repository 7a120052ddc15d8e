"""The wire between real processes: latency-free facts, one test per promise."""

from __future__ import annotations

import threading

import pytest
import torch

from luna_daemon.core import DeadlineExceeded, RequestCancelled
from luna_daemon.wire import messages as m


@pytest.mark.parametrize("use_arena", [True, False])
def test_results_are_private_and_writable(start_daemon, use_arena):
    """Fifty results are held at once; writing into each changes no other."""
    client = start_daemon().client(use_arena=use_arena)
    held = [client.call(m.Echo(1 << 20), [torch.zeros(64)]).tensors[0] for _ in range(50)]
    for number, tensor in enumerate(held):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(held))


def test_slots_come_back_when_tensors_die(start_daemon):
    """Shared memory is held as long as a tensor lives, also through a view of it, and no longer."""
    daemon = start_daemon()
    client = daemon.client()
    tensor = client.call(m.Echo(1 << 20)).tensors[0]
    view = tensor[5:7]
    del tensor
    assert daemon.info()["arena"]["used"] >= 1 << 20
    del view
    daemon.wait_for(lambda info: info["arena"]["used"] == 0)


def test_deadline(start_daemon):
    """A request that waited past its deadline is not started."""
    daemon = start_daemon()
    busy = threading.Thread(target=lambda: daemon.client().call(m.Echo(0, seconds=1.0)))
    busy.start()
    daemon.wait_for(lambda info: info["in_flight"] == 1 and info["workers"][0]["state"] == "busy")
    with pytest.raises(DeadlineExceeded):
        daemon.client().call(m.Echo(), deadline_s=0.2)
    busy.join()


def test_cancel_stops_a_running_request(start_daemon):
    """A cancelled call returns at once, and the worker stops at the next step."""
    daemon = start_daemon()
    client = daemon.client()
    client.call(m.Echo())
    with pytest.raises(RequestCancelled):
        client.call(m.Echo(0, seconds=30.0), is_cancelled=lambda: True)
    daemon.wait_for(lambda info: info["in_flight"] == 0)


def test_progress_reaches_the_caller(start_daemon):
    """A call that takes time shows its steps, on the calling thread."""
    seen = []
    start_daemon().client().call(
        m.Echo(0, seconds=0.3), on_progress=lambda p: seen.append((p.stage, threading.get_ident()))
    )
    assert {stage for stage, _ in seen} >= {"starting", "loading", "tile"}
    assert {thread for _, thread in seen} == {threading.get_ident()}
