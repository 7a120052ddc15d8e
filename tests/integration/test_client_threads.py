"""One client in many threads, callers that leave in the middle, and peers that do not read."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import suppress

import msgspec
import psutil
import pytest
import torch

from luna_daemon.core import DaemonConnectionError, RequestCancelled
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import encode_frame
from tests.integration.helpers import Background, RawPeer, assert_unharmed, is_busy


@pytest.fixture(scope="module")
def daemon(start_module_daemon):
    """One daemon for the module, its workers warm."""
    daemon = start_module_daemon(scale_up_delay_sec=0.2)
    daemon.client().call(m.Echo(1 << 20))
    return daemon


@pytest.fixture(autouse=True)
def nothing_is_left(daemon):
    """After every test nothing is in flight and no shared memory is held."""
    yield
    info = daemon.wait_for(lambda info: info["in_flight"] == 0 and info["arena"]["used"] == 0)
    assert info["crashes"] == 0


def test_small_calls_pass_a_long_one(daemon):
    """Two threads on one client: answers come in any order, each to its own caller."""
    client = daemon.client()
    long = Background(lambda: client.call(m.Echo(4096, 1.0)))
    daemon.wait_for(is_busy)
    pings = 0
    while not long.ended:
        client.ping()
        pings += 1
    assert pings > 10, "they waited for the long call"
    assert long.value().tensors[0].numel() == 1024


@pytest.mark.parametrize("use_arena", [True, False])
def test_sixteen_threads(daemon, use_arena):
    """Every thread gets its own answers, none waits for a wake-up that never comes, and results stay private."""
    client = daemon.client(use_arena=use_arena)
    times: list[float] = []

    def work(number: int) -> bool:
        right = True
        for turn in range(12):
            start = time.monotonic()
            tensor = client.call(m.Echo((number + 1) << 14), [torch.full((number + 1,), turn)]).tensors[0]
            right = right and tensor.numel() == (number + 1) << 12 and not tensor.any()
            tensor.fill_(number)
            client.ping()
            times.append(time.monotonic() - start)
        return right

    calls = [Background(lambda n=number: work(n)) for number in range(16)]
    assert all(call.value(60) for call in calls)
    # A waiting thread looks up by itself once per second; a busy machine makes every turn slower.
    usual = statistics.median(times)
    assert max(times) < max(0.9, 5 * usual), "somebody slept through the hand-over of the reader's part"


def test_the_reader_leaves(daemon):
    """The thread that reads for all is cancelled: the others get their answers at once all the same."""
    client = daemon.client()
    late = []
    while not late or (min(late) >= 0.3 and len(late) < 3):  # once late may be the machine, thrice is the client
        late.append(seconds_after_its_reader_left(daemon, client))
    assert min(late) < 0.3, late


def seconds_after_its_reader_left(daemon, client):
    """How long after the daemon's answer a call ends whose thread has to take over the reading."""
    leave = threading.Event()
    reader = Background(lambda: client.call(m.Echo(0, 30.0), is_cancelled=leave.is_set))
    daemon.wait_for(is_busy)
    other = Background(lambda: client.call(m.Echo(0, 0.3)))
    daemon.wait_for(lambda info: info["in_flight"] == 2)
    leave.set()
    assert isinstance(reader.wait(5).error, RequestCancelled)
    daemon.wait_for(lambda info: info["in_flight"] == 0)
    done = time.monotonic()
    other.value()
    return other.ended - done


def test_an_error_in_the_callers_own_code(daemon):
    """A progress callback that raises (an interrupt in the host program) ends the call, here and in the daemon."""

    def interrupt(progress):
        raise InterruptedError("the user pressed cancel")

    with pytest.raises(InterruptedError):
        daemon.client().call(m.Echo(0, 30.0), on_progress=interrupt)
    daemon.wait_for(lambda info: info["in_flight"] == 0)


def test_close_while_another_thread_waits(daemon):
    """The waiting call ends with an error soon, although the client still holds a result; the next call connects."""
    client = daemon.client()
    kept = client.call(m.Echo(1 << 20)).tensors[0].fill_(1)
    call = Background(lambda: client.call(m.Echo(0, 30.0)))
    daemon.wait_for(is_busy)
    client.close()
    assert isinstance(call.wait(10).error, DaemonConnectionError)
    daemon.wait_for(lambda info: info["in_flight"] == 0)
    assert client.ping() > 0 and bool((kept == 1).all())


def test_results_that_nobody_takes(daemon):
    """A caller that leaves just when its result is made: wherever the two meet, the memory comes back."""
    client = daemon.client()
    for number in range(10):
        with suppress(RequestCancelled):  # asked a tenth of a second after the start, when the worker is about done
            client.call(m.Echo(4 << 20, 0.095 + number / 1000), is_cancelled=lambda: True)
    client.ping()
    daemon.wait_for(lambda info: info["arena"]["used"] == 0)


def test_a_client_that_does_not_read(daemon, start_daemon):
    """It is not read from either once enough answers wait for it; others do not notice, and no answer is lost."""
    process = psutil.Process(daemon.process.pid)
    call = msgspec.Raw(msgspec.msgpack.encode(m.Info()))
    twin = start_daemon().client()
    with RawPeer(daemon) as peer:
        peer.hello()
        before, sent = process.memory_info().rss, 0
        peer.sock.settimeout(1.0)
        data = b"".join(encode_frame(m.Request(number, call)) for number in range(1, 400_001))
        with pytest.raises(TimeoutError):
            while sent < len(data):
                sent += peer.sock.send(data[sent : sent + 65536])
        assert process.memory_info().rss - before < 64 << 20
        assert_unharmed(daemon.client(), twin)
        whole = sent // (len(data) // 400_000) - 1_000
        for number in range(1, min(whole, 2_000)):
            assert peer.receive().id == number


def test_results_for_a_client_that_does_not_read(daemon):
    """Large results wait in shared memory or on the way, and go when the connection does."""
    with RawPeer(daemon) as peer:
        peer.hello()
        for number in range(1, 9):
            peer.channel.send(m.Request(number, msgspec.Raw(msgspec.msgpack.encode(m.Echo(8 << 20)))))
        daemon.wait_for(lambda info: info["in_flight"] == 0)
        assert daemon.client().call(m.Echo(1 << 20)).tensors[0].numel() == 1 << 18
