"""Peers that take more than their share, or mean harm: others' calls stay about as fast as without them.

Times are compared with those of an idle daemon, taken in turns with them.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading

import pytest

from luna_daemon.core import Busy, DaemonConnectionError
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import encode_call, encode_frame
from tests.integration.helpers import Background, RawPeer, assert_unharmed, is_busy

resource = pytest.importorskip("resource")
ONE = {"max_vae_workers": 1, "max_clip_workers": 1}


@pytest.fixture(scope="module")
def twin(start_module_daemon):
    """A client of a daemon that has no other."""
    return start_module_daemon().client()


def test_two_thousand_connections(start_daemon, twin):
    """They cost descriptors, not others' time; who does not greet is cut off, oldest first."""
    daemon = start_daemon()
    if hasattr(resource, "prlimit"):  # what many systems allow, less than there are connections
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    client = daemon.client()
    client.ping()
    held = []
    try:
        for _ in range(2000):
            sock = socket.socket()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", daemon.port))
            held.append(sock)
        assert_unharmed(client, twin)
        assert daemon.client().ping() > 0  # a new client comes in beside them
        assert "Too many open files" not in daemon.log.read_text()
    finally:
        for sock in held:
            sock.close()
    assert daemon.info()["status"] == "running"


def test_one_byte_at_a_time(start_daemon, twin):
    """Peers that dribble a greeting, or a request, hold up nobody."""
    daemon = start_daemon()
    client = daemon.client()
    client.ping()
    hello = encode_frame(m.Hello(1, "?", "client", "slow", 1))
    ended = threading.Event()

    def dribble(sock, data):
        for byte in data * 100:
            if ended.wait(0.02):
                return
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                return

    with contextlib.ExitStack() as stack:
        for number in range(40):
            if number % 2:
                peer = stack.enter_context(RawPeer(daemon))
                assert isinstance(peer.hello(), m.Welcome)
                sock, data = peer.sock, encode_frame(m.Request(1, encode_call(m.Ping())))
            else:
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", daemon.port)))
                data = hello
            threading.Thread(target=dribble, args=(sock, data), daemon=True).start()
        assert_unharmed(client, twin)
        ended.set()


def test_who_never_reads(start_daemon, twin):
    """A client that asks and asks and reads nothing: its requests are no longer taken, others are."""
    daemon = start_daemon()
    client = daemon.client()
    client.ping()
    with RawPeer(daemon) as deaf:
        assert isinstance(deaf.hello(), m.Welcome)
        deaf.sock.settimeout(0.2)
        sent = 0
        frame = encode_frame(m.Request(1, encode_call(m.Info())))
        with contextlib.suppress(OSError):  # at some point nothing is taken any more
            while sent < 50_000:
                deaf.sock.sendall(frame)
                sent += 1
        assert 0 < sent < 50_000
        assert_unharmed(client, twin)
        rss = daemon.info()["rss"]
        for _ in range(300):  # as many turns of its loop, in each of which it could take more
            client.ping()
        assert daemon.info()["rss"] < rss + (20 << 20)


def test_a_thousand_requests_of_one_client(start_daemon):
    """Another's single request waits for what is being computed, not for the thousand."""
    daemon = start_daemon(**ONE)
    daemon.client().call(m.Echo())
    seconds = 0.1
    busy = Background(lambda: daemon.client().call(m.Echo(0, 0.5)))
    daemon.wait_for(is_busy)
    with RawPeer(daemon) as greedy:
        assert isinstance(greedy.hello(), m.Welcome)
        for number in range(1, 1001):
            greedy.channel.send(m.Request(number, encode_call(m.Echo(0, seconds))))
        threading.Thread(target=ask_on, args=(greedy, seconds), daemon=True).start()
        waiting = daemon.wait_for(lambda info: info["queue"]["waiting"] >= 256)["queue"]
        assert waiting["waiting"] == waiting["limit"] == 256
        busy.value()
        modest = daemon.client()
        modest.ping()
        passed = []
        for _ in range(5):
            before = daemon.info()["requests"]["echo"]
            modest.call(m.Echo())
            passed.append(daemon.info()["requests"]["echo"] - before - 1)
        assert statistics.median(passed) <= 3, f"so many of the other's came first: {passed}"
        assert daemon.info()["queue"]["waiting"] > 250


def ask_on(peer, seconds):
    """For each answer, a result or a refusal, the next request: the queue stays as full as one client can make it."""
    number = 1000
    with contextlib.suppress(DaemonConnectionError):
        while (received := peer.channel.receive(5)) is not None:
            if not isinstance(received[0], m.Progress):
                number += 1
                peer.channel.send(m.Request(number, encode_call(m.Echo(0, seconds))))


def test_a_full_queue_gives_way_to_who_has_less(start_daemon):
    """The greedy client's last request is told to come back; nobody else's is, and its others stay."""
    daemon = start_daemon(queue_limit=4, **ONE)
    first = Background(lambda: daemon.client().call(m.Echo(0, 1.0)))
    daemon.wait_for(is_busy)
    greedy = daemon.client()
    calls = []
    for number in range(4):
        calls.append(Background(lambda: greedy.call(m.Echo(0, 0.01))))
        daemon.wait_for(lambda info, number=number: info["queue"]["waiting"] == number + 1)
    daemon.client().call(m.Echo())
    with pytest.raises(Busy, match="4 requests wait"):
        calls[-1].value()
    for call in [first, *calls[:-1]]:
        call.value()
