"""The service in this process, with its long times made short: strangers, stalled readers, bugs of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import asynccontextmanager

import msgspec
import pytest

from luna_daemon.config import load_settings
from luna_daemon.control import service as service_module
from luna_daemon.control.access import Access
from luna_daemon.control.computing import cache_key
from luna_daemon.control.peers import ClientPeer
from luna_daemon.control.service import Service
from luna_daemon.control.state import State
from luna_daemon.core import PROTOCOL_VERSION
from luna_daemon.files.resolver import ModelResolver
from luna_daemon.pool.work import Piece
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot, open_arena, process_space
from luna_daemon.wire.channel import Channel
from luna_daemon.wire.frame import encode_call
from luna_daemon.wire.shared_memory import SharedMemory
from luna_daemon.workers import WorkerPool
from tests.waiting import wait_until_async


@asynccontextmanager
async def served(folder):
    """A service that listens, without a pool's ticks, and the port."""
    settings = load_settings({"arena_dir": folder / "arena", "max_tensor_mb": 64}, {})
    arena = open_arena(settings.arena_dir, 1, 256 << 20)
    info = {"text": "x" * 100_000}
    access = Access("token", "nowhere", lambda: "another")
    service = Service(State(
        settings, WorkerPool(settings, folder), ModelResolver(settings), SharedMemory(arena, ""), access,
        lambda state: info, lambda: None, dict,
    ))  # fmt: skip
    server = await asyncio.get_running_loop().create_server(service.connect, "127.0.0.1", 0)
    try:
        yield service, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        service.close()
        await wait_until_async(lambda: not service.state.sessions, what="every session has ended")
        arena.close()


class Peer:
    """A blocking client, to be used in a thread."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.channel = Channel(self.sock)

    def hello(self) -> Peer:
        self.channel.send(m.Hello(PROTOCOL_VERSION, "token", "client", "peer", 1))
        assert isinstance(self.receive(), m.Welcome)
        return self

    def receive(self) -> m.Message:
        received = self.channel.receive(30)
        assert received is not None
        return received[0]


def test_a_stranger_who_says_nothing(tmp_path, monkeypatch):
    """A connection without a greeting is closed after a while: it costs a descriptor."""
    monkeypatch.setattr(service_module, "_GREET_S", 0.2)

    async def main():
        async with served(tmp_path) as (_, port):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
                assert await asyncio.to_thread(sock.recv, 1) == b""

    asyncio.run(main())


def test_who_reads_nothing_is_cut_off(tmp_path, monkeypatch):
    """A peer that has read nothing for a minute is cut off, and what waited for it is forgotten; others stay."""

    async def main():
        async with served(tmp_path) as (service, port):
            lazy, busy = [await asyncio.to_thread(Peer(port).hello) for _ in range(2)]
            for number in range(1, 200):
                lazy.channel.send(m.Request(number, encode_call(m.Info())))
            stalled = next(iter(service.state.sessions.values())).connection
            await wait_until_async(lambda: stalled.stalled_s, what="the peer's answers pile up")
            service.maintain()
            assert len(service.state.sessions) == 2 and service.unsent, "a minute has not passed"
            monkeypatch.setattr(service_module, "_STALL_S", 0.1)
            await wait_until_async(
                lambda: service.maintain() or len(service.state.sessions) == 1, what="the peer is cut off"
            )
            assert [session.connection.remote for session in service.state.sessions.values()] == [
                str(busy.sock.getsockname())
            ]
            assert not service.unsent
            lazy.channel.close()
            busy.channel.close()

    asyncio.run(main())


def test_a_bug_of_ours_is_answered_and_logged(tmp_path, monkeypatch, caplog):
    """An exception that nobody foresaw reaches the caller as InternalError and the log with its traceback."""

    def broken(*_):
        raise KeyError("a bug")

    async def main():
        async with served(tmp_path) as (service, port):
            peer = await asyncio.to_thread(Peer(port).hello)
            monkeypatch.setattr(service.state, "collect_info", broken)
            peer.channel.send(m.Request(1, encode_call(m.Info())))
            answer = await asyncio.to_thread(peer.receive)
            assert (answer.id, answer.code) == (1, "internal") and "a bug" in answer.message
            peer.channel.send(m.Request(2, encode_call(m.Ping())))
            assert isinstance(await asyncio.to_thread(peer.receive), m.Reply)
            monkeypatch.setattr(ClientPeer, "received", broken)
            peer.channel.send(m.Request(3, encode_call(m.Ping())))
            answer = await asyncio.to_thread(peer.receive)
            assert (answer.id, answer.code) == (0, "internal") and "a bug" in answer.message
            peer.channel.close()

            async def fails():
                raise KeyError("in the background")

            service.state.spawn(fails())
            await wait_until_async(lambda: "in the background" in caplog.text)

    with caplog.at_level(logging.ERROR, "luna_daemon"):
        asyncio.run(main())
    assert caplog.text.count("Traceback") == 3 and "in the background" in caplog.text


def test_strangers_make_nobody_allocate(tmp_path):
    """A large message is taken only from who was let in, and its buffer is given back afterwards."""

    async def main():
        async with served(tmp_path) as (service, port):
            peer = Peer(port)
            peer.sock.sendall(b"LDP1" + (1 << 20).to_bytes(4, "little") + bytes(8))
            assert (await asyncio.to_thread(peer.receive)).code == "limit"
            peer.channel.close()
            peer = await asyncio.to_thread(Peer(port).hello)
            call = msgspec.Raw(msgspec.msgpack.encode({"op": "lora.check", "name": "x" * (4 << 20)}))
            await asyncio.to_thread(peer.channel.send, m.Request(1, call))
            assert isinstance(await asyncio.to_thread(peer.receive), m.Reply)
            (connection,) = service._connections
            await wait_until_async(lambda: len(connection._buffer) == 64 << 10, what="the large buffer is given back")
            peer.channel.close()

    asyncio.run(main())


@pytest.mark.parametrize("answered", [True, False])
def test_slots_asked_for_by_who_left(tmp_path, answered):
    """Shared memory that is granted after its client has gone goes straight back."""

    async def main():
        async with served(tmp_path) as (service, port):
            arena = service.state.memory.arena
            peer = await asyncio.to_thread(Peer(port).hello)
            peer.channel.send(m.Request(1, encode_call(m.ArenaProof(arena.nonce, process_space()))))
            assert isinstance(await asyncio.to_thread(peer.receive), m.Reply)
            peer.channel.send(m.Request(2, encode_call(m.Alloc(48 << 20))))
            if answered:
                answer = await asyncio.to_thread(peer.receive)
                assert isinstance(answer, m.Reply), answer
                peer.channel.send(m.Bye())
            peer.channel.close()
            arena = service.state.memory.arena
            await wait_until_async(
                lambda: not service.state.sessions and arena.bytes_reserved and not arena.bytes_used,
                what=lambda: f"{arena.bytes_used} bytes are still in use",
            )

    asyncio.run(main())


def test_a_conditioning_is_kept_by_all_that_determines_it(tmp_path):
    """Two prompts that differ only in an embedding's numbers, sent beside the call, are not each other's answer."""

    async def main():
        async with served(tmp_path) as (service, _):
            state = service.state
            spec = m.LoadSpec("clip:x", "clip", "sd15", (), "cpu", "auto")
            call = m.ClipEncode(m.ModelRef("clip", name="x"), text="a")

            def key(data: bytes, dtype: str = "uint8") -> bytes | None:
                slot = Slot.on_heap(len(data))
                slot.view[:] = data
                return cache_key(
                    service.state, spec, call, [Piece(m.TensorRef(dtype, (len(data),), len(data), 0), slot)]
                )

            keys = [cache_key(state, spec, call, []), key(b"one"), key(b"two"), key(b"one", "int8"), key(b"")]
            assert len(set(keys)) == 5 and None not in keys and key(b"one") == keys[1]
            assert key(bytes(2 << 20)) is None

    asyncio.run(main())
