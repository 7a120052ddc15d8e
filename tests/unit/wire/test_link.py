"""The client's connection against a daemon of a few lines: greeting, answers in any order, memory, the end."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from luna_daemon.core import (
    AuthenticationError,
    BadRequest,
    Busy,
    DaemonConnectionError,
    LunaError,
    RequestCancelled,
    VersionMismatch,
)
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Arena
from luna_daemon.wire.channel import Channel
from luna_daemon.wire.frame import decode_call, encode_frame
from luna_daemon.wire.layout import RESERVE_BYTES
from luna_daemon.wire.link import Link
from tests.waiting import within

LIMITS = m.Limits(1 << 20, 1 << 30, 1 << 30, 10, 10)
BIG = 1 << 20


class Daemon:
    """Greets, then answers every request as ``serve`` says; keeps all that came."""

    def __init__(self, serve: Callable[[Daemon, m.Request, m.Call], None], arena: Arena | None = None) -> None:
        self.serve = serve
        self.arena = arena
        self.came: list[m.Message] = []
        self.released: list[int] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        sock, _ = self.server.accept()
        self.channel = Channel(sock)
        with contextlib.suppress(LunaError), sock:
            while True:
                message, _ = self.channel.receive(10)
                self.came.append(message)
                self._handle(message)

    def _handle(self, message: m.Message) -> None:
        if isinstance(message, m.Hello):
            info = m.ArenaInfo(str(self.arena.folder), "nonce") if self.arena else None
            self.channel.send(m.Welcome(1, "0", LIMITS, info, "none here"))
        elif isinstance(message, m.Release):
            self.released += message.slots
        elif isinstance(message, m.Request):
            call = decode_call(message.call)
            if isinstance(call, m.ArenaProof):
                self.channel.send(m.Reply(message.id))
            else:
                self.serve(self, message, call)

    def close(self) -> None:
        self.server.close()
        self.thread.join(10)

    def calls(self) -> list[m.Call]:
        return [decode_call(message.call) for message in self.came if isinstance(message, m.Request)]


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., tuple[Link, Daemon]]]:
    """Start a daemon and connect a link to it."""
    opened: list[tuple[Link, Daemon]] = []

    def make(serve, arena=None) -> tuple[Link, Daemon]:
        daemon = Daemon(serve, arena)
        opened.append((Link("127.0.0.1", daemon.port, tmp_path, "test", arena is not None), daemon))
        return opened[-1]

    yield make
    for link, daemon in opened:
        link.close()
        daemon.close()


@pytest.fixture
def arena(tmp_path):
    """Shared memory with one megabyte-sized segment after another."""
    arena = Arena(tmp_path / "arena", 64 << 20)
    arena.add(*arena.grow(16 * BIG))
    yield arena
    arena.close()


def call(link: Link, what: m.Call, tensors=(), is_cancelled=None, on_progress=None):
    """A call without deadline."""
    return link.call(what, tensors, None, 1, on_progress, is_cancelled)


def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


# --- greeting ----------------------------------------------------------------------------------------------------


def answer_once(data: bytes | None, close: bool = True) -> tuple[int, threading.Thread]:
    """A server that reads a little, answers ``data`` and closes; ``None`` stays silent for a while."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server:
            sock, _ = server.accept()
            with sock:
                sock.recv(10_000)
                if data is not None:
                    sock.sendall(data)
                else:
                    sock.settimeout(5)
                    with contextlib.suppress(OSError):
                        sock.recv(1)

    thread = threading.Thread(target=run)
    thread.start()
    return server.getsockname()[1], thread


def frame(message: m.Message) -> bytes:
    """A frame without payload."""
    return encode_frame(message)


@pytest.mark.parametrize(
    "data, error, says",
    [
        (frame(m.Failure(0, "authentication", "wrong token", "Set LUNA_TOKEN")), AuthenticationError, "LUNA_TOKEN"),
        (frame(m.Failure(0, "version", "client speaks LDP/1, daemon LDP/2")), VersionMismatch, "LDP/2"),
        (frame(m.Failure(0, "busy", "256 clients", "", 5.0)), Busy, "256 clients"),
        (b"LDP2" + bytes(20), VersionMismatch, "LDP/2"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", DaemonConnectionError, "something else than Luna Daemon"),
        (b"", DaemonConnectionError, "closed the connection instead of greeting"),
        (frame(m.Cancel(1)), DaemonConnectionError, "did not greet"),
    ],
    ids=["token", "version", "busy", "LDP2", "http", "hangs up", "odd"],
)
def test_what_answers_instead_of_a_daemon(tmp_path, data, error, says):
    """A refusal is raised as what it is; anything else says what was found on the port."""
    port, thread = answer_once(data)
    with pytest.raises(error, match=says):
        Link("127.0.0.1", port, tmp_path, "test", False)
    thread.join(5)


def test_a_silent_listener_is_given_up(tmp_path):
    """Something that accepts and says nothing is not waited for longer than a second or so."""
    port, thread = answer_once(None)
    with within(2), pytest.raises(DaemonConnectionError, match=r"did not greet within 0.8 s.*predecessor"):
        Link("127.0.0.1", port, tmp_path, "test", False)
    thread.join(6)


# --- calls -------------------------------------------------------------------------------------------------------


def test_answers_in_another_order(start):
    """Two threads share the connection; each gets its own answer though the second is answered first."""
    held: list[m.Request] = []

    def serve(daemon, request, asked):
        held.append(request)
        if len(held) == 2:
            for one in reversed(held):
                daemon.channel.send(m.Reply(one.id, decode_call(one.call).name))

    link, _ = start(serve)
    results = {}
    threads = [
        threading.Thread(target=lambda name=name: results.update({name: call(link, m.LoraCheck(name)).result}))
        for name in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert results == {"a": "a", "b": "b"}


def test_an_error_is_raised_as_its_class(start):
    """Code, message, hint and waiting time of a failure arrive, and the connection goes on."""

    def serve(daemon, request, asked):
        daemon.channel.send(m.Failure(request.id, "busy", "full", "later", 2.5))

    link, _ = start(serve)
    for _ in range(2):
        with pytest.raises(Busy, match=r"full\. later") as caught:
            call(link, m.Ping())
        assert caught.value.retry_after_s == 2.5


def test_small_tensors_travel_inline(start):
    """Without shared memory a tensor goes and comes with the message, bit for bit."""

    def serve(daemon, request, asked):
        data = memoryview(bytearray(torch.arange(4, dtype=torch.float32).numpy().tobytes()))
        daemon.channel.send(m.Reply(request.id, None, [m.TensorRef("float32", (2, 2), 16, 0)]), [data])

    link, daemon = start(serve)
    (tensor,) = call(link, m.Echo(16), [torch.zeros(3), torch.ones(2, dtype=torch.int64)]).tensors
    assert torch.equal(tensor, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    (sent,) = [message.tensors for message in daemon.came if isinstance(message, m.Request)]
    assert [(ref.dtype, ref.nbytes, ref.offset) for ref in sent] == [("float32", 12, 0), ("int64", 16, 12)]


def test_progress_is_told_before_the_answer(start):
    """Stages arrive on the calling thread, in order."""

    def serve(daemon, request, asked):
        for step in (1, 2):
            daemon.channel.send(m.Progress(request.id, "tile", step, 2))
        daemon.channel.send(m.Reply(request.id))

    link, _ = start(serve)
    seen = []
    call(link, m.Ping(), on_progress=lambda p: seen.append((p.stage, p.step, threading.get_ident())))
    assert seen == [("tile", 1, threading.get_ident()), ("tile", 2, threading.get_ident())]


def test_a_cancelled_call_ends_at_once_and_is_told(start):
    """The caller is free within moments, the daemon hears of it, and the connection goes on."""

    def serve(daemon, request, asked):
        if isinstance(asked, m.Ping):
            daemon.channel.send(m.Reply(request.id))

    link, daemon = start(serve)
    with pytest.raises(RequestCancelled):
        call(link, m.Echo(), is_cancelled=lambda: True)
    call(link, m.Ping())
    (number,) = [message.id for message in daemon.came if isinstance(message, m.Cancel)]
    assert number == next(message.id for message in daemon.came if isinstance(message, m.Request))


def test_everybody_who_waits_hears_of_the_end(start):
    """The daemon dies: every waiting thread gets a connection error, and so does the next call."""

    def serve(daemon, request, asked):
        if sum(isinstance(message, m.Request) for message in daemon.came) == 3:
            daemon.channel.close()

    link, _ = start(serve)
    errors = []

    def ask() -> None:
        try:
            call(link, m.Echo())
        except DaemonConnectionError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(errors) == 3 and link.broken is not None
    with pytest.raises(DaemonConnectionError):
        call(link, m.Ping())


def test_closing_frees_who_waits(start):
    """``close`` from another thread ends a waiting call."""
    link, daemon = start(lambda daemon, request, asked: None)
    errors = []

    def ask() -> None:
        try:
            call(link, m.Echo())
        except DaemonConnectionError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: len(daemon.calls()) == 1)
    link.close()
    thread.join(5)
    assert len(errors) == 1


# --- shared memory -----------------------------------------------------------------------------------------------


def lend(daemon: Daemon, request: m.Request, number: int, shared: bool = False, fill: int = 1) -> None:
    """Answer with a slot of a megabyte."""
    slot = daemon.arena.try_allocate(BIG)
    slot.view[:] = bytes([fill]) * BIG
    ref = m.TensorRef("uint8", (BIG,), BIG, slot.offset, number, slot.segment, shared)
    daemon.channel.send(m.Reply(request.id, None, [ref]))


def test_a_result_owns_its_slot(start, arena):
    """The slot is given back when the last view of the tensor has died, and not before."""
    link, daemon = start(lambda daemon, request, asked: lend(daemon, request, 5), arena)
    (tensor,) = call(link, m.Echo(BIG)).tensors
    view = tensor[3:5]
    del tensor
    gc.collect()
    assert daemon.released == [] and view.tolist() == [1, 1]
    del view
    until(lambda: daemon.released == [5])


def test_a_shared_result_is_copied_and_given_back(start, arena):
    """What others read too is the caller's own copy, and the slot goes back at once."""
    link, daemon = start(lambda daemon, request, asked: lend(daemon, request, 5, shared=True), arena)
    (tensor,) = call(link, m.Echo(BIG)).tensors
    until(lambda: daemon.released == [5])
    next(iter(arena._segments.values())).view[:BIG] = bytes(BIG)
    assert int(tensor.sum()) == BIG


def test_a_large_input_goes_through_a_slot(start, arena):
    """The tensor is written into the slot that the daemon granted, and the slot given back after the answer."""
    seen = []

    def serve(daemon, request, asked):
        if isinstance(asked, m.Alloc):
            lend(daemon, request, 7, fill=0)
            return
        (ref,) = request.tensors
        data = bytes(daemon.arena._segments[ref.segment].view[ref.offset : ref.offset + ref.nbytes])
        seen.append((ref.slot, ref.dtype, ref.shape, data))
        daemon.channel.send(m.Reply(request.id))

    link, daemon = start(serve, arena)
    call(link, m.Echo(), [torch.full((BIG,), 3, dtype=torch.uint8)])
    until(lambda: daemon.released == [7])
    assert seen == [(7, "uint8", (BIG,), b"\3" * BIG)]


def test_an_input_that_is_faster_inline_takes_no_slot(start, arena):
    """A slot costs a round trip: up to ``RESERVE_BYTES`` the tensor travels with its request."""

    def serve(daemon, request, asked):
        if isinstance(asked, m.Alloc):
            lend(daemon, request, 7)
        else:
            daemon.channel.send(m.Reply(request.id))

    link, daemon = start(serve, arena)
    for nbytes in (RESERVE_BYTES, RESERVE_BYTES + 1):
        call(link, m.Echo(), [torch.zeros(nbytes, dtype=torch.uint8)])
    sent = [message.tensors[0].slot for message in daemon.came if isinstance(message, m.Request) and message.tensors]
    assert sent == [0, 7] and daemon.calls().count(m.Alloc(RESERVE_BYTES + 1)) == 1


def test_a_full_arena_is_no_error(start, arena):
    """Where the daemon has no slot, the tensor goes by the socket."""

    def serve(daemon, request, asked):
        if isinstance(asked, m.Alloc):
            daemon.channel.send(m.Failure(request.id, "limit", "shared memory is full"))
        else:
            daemon.channel.send(m.Reply(request.id))

    link, daemon = start(serve, arena)
    call(link, m.Echo(), [torch.zeros(BIG, dtype=torch.uint8)])
    (sent,) = [message for message in daemon.came if isinstance(message, m.Request) and message.tensors]
    assert [ref.slot for ref in sent.tensors] == [0]


def test_a_second_tensor_that_cannot_travel_leaks_nothing(start, arena):
    """Every tensor is checked before a slot is reserved for the first."""
    requests = []
    link, _ = start(lambda daemon, request, asked: requests.append(asked), arena)
    with pytest.raises(BadRequest, match="complex64"):
        call(link, m.Echo(), [torch.zeros(BIG, dtype=torch.uint8), torch.zeros(2, dtype=torch.complex64)])
    assert requests == []


def test_a_late_answer_gives_its_slots_back(start, arena):
    """The answer to a cancelled call is not kept: its memory returns with the next traffic."""
    waiting = []

    def serve(daemon, request, asked):
        if isinstance(asked, m.Echo):
            waiting.append(request)
            return
        lend(daemon, waiting[0], 9)
        daemon.channel.send(m.Reply(request.id))

    link, daemon = start(serve, arena)
    with pytest.raises(RequestCancelled):
        call(link, m.Echo(BIG), is_cancelled=lambda: True)
    call(link, m.Ping())
    until(lambda: daemon.released == [9])


def test_results_survive_the_end_of_the_client(start, arena):
    """Tensors that are still held when the client closes keep their memory, and the daemon hears no goodbye before."""
    link, daemon = start(lambda daemon, request, asked: lend(daemon, request, 5), arena)
    (tensor,) = call(link, m.Echo(BIG)).tensors
    link.close()
    time.sleep(0.05)  # that nothing is said is told by time alone
    assert not any(isinstance(message, m.Bye) for message in daemon.came), "the daemon would lend the memory to others"
    assert int(tensor.sum()) == BIG
    del tensor
    gc.collect()
    until(lambda: any(isinstance(message, m.Bye) for message in daemon.came))


def test_memory_that_is_not_the_daemons_is_not_used(start, tmp_path):
    """A folder of that name without the nonce, as in another container: TCP, and the reason can be read."""

    class Elsewhere:
        folder = tmp_path / "not here"

    link, _ = start(lambda daemon, request, asked: daemon.channel.send(m.Reply(request.id)), Elsewhere())
    assert (link.transport, link.arena) == ("tcp", None) and "not visible here" in link.transport_why
