"""The daemon's side of a connection: frames however they arrive, memory that always comes back, peers that are slow."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable

import pytest

from luna_daemon.core import AuthenticationError, Busy, ProtocolError
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot
from luna_daemon.wire.connection import Connection
from luna_daemon.wire.frame import PREFIX_SIZE, decode_message, encode_frame, parse_prefix
from tests.unit.fakes import Peer

PAYLOAD = bytes(range(100))
FRAME = encode_frame(m.Reply(7, {"a": 1}), len(PAYLOAD)) + PAYLOAD
SMALL = encode_frame(m.Cancel(3))
MAX_HEADER = 200_000
MAX_PAYLOAD = 1 << 24


@contextlib.asynccontextmanager
async def served(peer: Peer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A real server whose connections belong to ``peer``, and a client's streams to it."""

    def make() -> Connection:
        peer.connections.append(Connection(peer, MAX_HEADER, MAX_PAYLOAD))
        return peer.connections[-1]

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    sock.connect(server.sockets[0].getsockname())
    reader, writer = await asyncio.open_connection(sock=sock)
    await until(lambda: bool(peer.connections and peer.connections[0].transport))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await until(lambda: bool(peer.reasons))
        server.close()
        await server.wait_closed()


async def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.002)


async def read_frame(reader: asyncio.StreamReader) -> tuple[m.Message, bytes]:
    """One frame, as a client would read it."""
    header, payload = parse_prefix(await reader.readexactly(PREFIX_SIZE), 1 << 20, 1 << 30)
    return decode_message(await reader.readexactly(header)), await reader.readexactly(payload)


def feed(connection: Connection, data: bytes) -> None:
    """Hand bytes over as an event loop does: as many at once as the connection has room for."""
    view = memoryview(data)
    while view:
        buffer = connection.get_buffer(-1)
        assert buffer.nbytes, "asyncio does not take an empty buffer"
        count = min(buffer.nbytes, view.nbytes)
        buffer[:count] = view[:count]
        connection.buffer_updated(count)
        view = view[count:]


EXPECTED = [(m.Cancel(3), None), (m.Reply(7, {"a": 1}), PAYLOAD), (m.Cancel(3), None)]


# --- receiving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, len(SMALL + FRAME + SMALL)))
def test_frames_split_anywhere(cut):
    """Two reads that meet at any byte give the same frames."""
    peer, data = Peer(), SMALL + FRAME + SMALL
    connection = Connection(peer, MAX_HEADER, MAX_PAYLOAD)
    feed(connection, data[:cut])
    feed(connection, data[cut:])
    assert peer.frames == EXPECTED
    assert peer.memory.live == 0 and peer.placed == [len(PAYLOAD)]


def test_frames_byte_by_byte():
    """One byte per read gives the same frames."""
    peer = Peer()
    connection = Connection(peer, MAX_HEADER, MAX_PAYLOAD)
    for byte in SMALL + FRAME + SMALL:
        feed(connection, bytes([byte]))
    assert peer.frames == EXPECTED


def test_frames_byte_by_byte_over_a_real_socket():
    """The same through the kernel: every byte is a packet of its own."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (_, writer):
            for byte in SMALL + FRAME + SMALL:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            await until(lambda: len(peer.frames) == 3)
        assert peer.frames == EXPECTED
        assert peer.memory.live == 0

    asyncio.run(work())


def test_many_frames_in_one_read():
    """A thousand frames that arrive together are all handed out, in order."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (_, writer):
            writer.write(b"".join(encode_frame(m.Cancel(n)) for n in range(1000)))
            await until(lambda: len(peer.frames) == 1000)
        assert [message.id for message, _ in peer.frames] == list(range(1000))

    asyncio.run(work())


def test_peers_take_turns():
    """A peer's thousand frames are not handled in one go: others' come in between."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (_, greedy):
            connection = peer.connections[0]
            told = []
            asyncio.get_running_loop().call_soon(told.append, 0)
            connection.buffer_updated = lambda nbytes, was=connection.buffer_updated: (
                asyncio.get_running_loop().call_soon(lambda: told.append(len(peer.frames))), was(nbytes))  # fmt: skip
            greedy.write(b"".join(encode_frame(m.Cancel(n)) for n in range(1000)))
            await until(lambda: len(peer.frames) == 1000)
        assert 0 < told[1] <= 64, "others had to wait for all of them"

    asyncio.run(work())


def test_a_peer_that_is_refused_while_it_rests():
    """What is left of its frames is not handled any more."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, writer):
            connection, handed_out = peer.connections[0], peer.received

            def received(*frame: object) -> None:
                handed_out(*frame)
                if len(peer.frames) == 32:
                    asyncio.get_running_loop().call_soon(connection.close)

            peer.received = received
            writer.write(b"".join(encode_frame(m.Cancel(n)) for n in range(100)))
            assert await reader.read() == b""
        assert len(peer.frames) <= 64

    asyncio.run(work())


def test_the_payload_goes_straight_into_the_slot():
    """While a payload arrives, the buffer given to the event loop is the slot's own memory, and no more of it."""
    peer = Peer()
    connection = Connection(peer, MAX_HEADER, MAX_PAYLOAD)
    feed(connection, FRAME[: -len(PAYLOAD)])
    (slot,) = peer.memory.made
    buffer = connection.get_buffer(-1)
    buffer[:3] = b"abc"
    connection.buffer_updated(3)
    assert bytes(slot.view[:3]) == b"abc" and buffer.nbytes == len(PAYLOAD)
    assert connection.get_buffer(-1).nbytes == len(PAYLOAD) - 3
    assert peer.frames == []


@pytest.mark.parametrize("before", [b"", SMALL, SMALL * 2000])
def test_a_message_larger_than_the_buffer(before):
    """A message of 150 KB arrives whole, alone or behind others, and so does what follows it."""
    text = "x" * 150_000

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (_, writer):
            writer.write(before + encode_frame(m.Reply(1, text)) + FRAME)
            await until(lambda: len(peer.frames) == 2 + len(before) // len(SMALL))
        assert peer.frames[-2:] == [(m.Reply(1, text), None), (m.Reply(7, {"a": 1}), PAYLOAD)]

    asyncio.run(work())


def test_a_payload_of_sixteen_megabytes():
    """A large tensor arrives bit for bit over a real socket."""

    async def work() -> None:
        peer = Peer()
        payload = bytes(range(256)) * (1 << 16)
        async with served(peer) as (_, writer):
            writer.write(encode_frame(m.Reply(1), len(payload)) + payload + SMALL)
            await until(lambda: len(peer.frames) == 2)
        assert peer.frames[0][1] == payload and peer.frames[1] == (m.Cancel(3), None)

    asyncio.run(work())


@pytest.mark.parametrize("cut", [1, PREFIX_SIZE + 5, len(FRAME) - 1])
def test_a_peer_that_dies_in_a_frame(cut):
    """Nothing is handed out, and the slot that was waiting for the payload is free again."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (_, writer):
            writer.write(FRAME[:cut])
            await writer.drain()
        assert peer.frames == [] and len(peer.reasons) == 1
        assert peer.memory.live == 0

    asyncio.run(work())


# --- refusing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, code, says",
    [
        (b"LDP2" + bytes(12), "version", "LDP/2"),
        (b"\x80\x04\x95" + bytes(13), "protocol", "begins with"),
        (struct.pack("<4sIQ", b"LDP1", MAX_HEADER + 1, 0), "limit", str(MAX_HEADER)),
        (struct.pack("<4sIQ", b"LDP1", 1, MAX_PAYLOAD + 1), "limit", str(MAX_PAYLOAD)),
        (struct.pack("<4sIQ", b"LDP1", 1, 2**64 - 1), "limit", str(MAX_PAYLOAD)),
        (struct.pack("<4sIQ", b"LDP1", 3, 0) + b"\xc1\xc1\xc1", "protocol", "malformed"),
    ],
)
def test_a_wrong_frame_is_answered_and_the_connection_closed(data, code, says):
    """The answer is a Failure with id 0 and the error's code; then the connection ends, and no memory was taken."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, writer):
            writer.write(SMALL + data + SMALL)
            failure, _ = await read_frame(reader)
            assert isinstance(failure, m.Failure)
            assert (failure.id, failure.code) == (0, code) and says in failure.message
            assert await reader.read() == b""
        assert peer.frames == [(m.Cancel(3), None)], "nothing after the wrong frame may be handed out"
        assert peer.placed == []

    asyncio.run(work())


@pytest.mark.parametrize("error", [AuthenticationError("no", "get a token"), Busy("full", "later", 5.0)])
def test_what_the_owner_refuses_is_answered(error):
    """An error of the owner travels with code, message and hint, and closes the connection."""

    async def work() -> None:
        def refuse(connection: Connection, message: m.Message) -> None:
            raise error

        peer = Peer(refuse)
        async with served(peer) as (reader, writer):
            writer.write(SMALL * 2)
            failure, _ = await read_frame(reader)
            assert (failure.code, failure.message, failure.hint) == (error.code, error.message, error.hint)
            assert failure.retry_after_s == getattr(error, "retry_after_s", 0.0)
            assert await reader.read() == b""
        assert len(peer.frames) == 1

    asyncio.run(work())


def test_a_refused_peer_that_keeps_sending_still_reads_why():
    """A peer in the middle of a large upload gets the answer, not a reset; what it sends is dropped."""

    async def work() -> None:
        def refuse(connection: Connection, message: m.Message) -> None:
            raise ProtocolError("the first message must be hello")

        peer = Peer(refuse)
        async with served(peer) as (reader, writer):
            writer.write(SMALL + bytes(8 << 20))
            failure, _ = await read_frame(reader)
            assert failure.code == "protocol"
        assert len(peer.frames) == 1 and peer.memory.live == 0

    asyncio.run(work())


@pytest.mark.parametrize("verb", ["GET", "POST", "HEAD", "PUT", "OPTIONS"])
def test_a_browser_is_answered_with_one_line(verb):
    """HTTP gets an HTTP error that says what this port speaks, and no binary."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, writer):
            writer.write(f"{verb} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            text = (await reader.read()).decode("ascii")
        assert text.startswith("HTTP/1.0 400 ") and "LDP/1" in text and text.endswith("\r\n\r\n")
        assert text.count("\r\n") == 2 and peer.frames == []

    asyncio.run(work())


# --- sending -----------------------------------------------------------------------------------------------------


def test_slots_travel_inline_and_come_back():
    """Tensors in several slots leave as one payload, and each slot is free once it has left."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, _):
            slots = [peer.memory.slot(size) for size in (10, 0, 3 << 20)]
            for number, slot in enumerate(slots):
                slot.view[:] = bytes([number + 1]) * slot.nbytes
            peer.connections[0].send(m.Reply(1), slots)
            message, payload = await read_frame(reader)
            assert message == m.Reply(1) and payload == b"\1" * 10 + b"\3" * (3 << 20)
            await until(lambda: peer.memory.live == 0)

    asyncio.run(work())


def test_a_slot_is_held_until_it_has_left():
    """A reader that does not read keeps the slot in use: its bytes could still change under way."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, _):
            reader._transport.pause_reading()
            peer.connections[0].send(m.Reply(1), [peer.memory.slot(32 << 20)])
            await until(lambda: peer.connections[0].stalled_s > 0)
            assert peer.memory.live == 1
            reader._transport.resume_reading()
            _, payload = await read_frame(reader)
            assert len(payload) == 32 << 20
            await until(lambda: peer.memory.live == 0)

    asyncio.run(work())


def test_no_slot_is_free_while_the_transport_holds_its_bytes():
    """Small tensors too: a slot comes back only when nothing waits in the event loop's own buffer any more."""

    async def work() -> None:
        peer, waiting = Peer(), []
        async with served(peer) as (reader, _):
            transport = peer.connections[0].transport

            def freed(slot: Slot) -> None:
                waiting.append(transport.get_write_buffer_size())

            reader._transport.pause_reading()
            for number in range(1000):
                slot = Slot(1, "seg-fake", 0, memoryview(bytearray(10_000)), freed)
                peer.connections[0].send(m.Reply(number), [slot])
            assert len(waiting) < 1000, "the kernel took everything: nothing was tried"
            reader._transport.resume_reading()
            for _ in range(1000):
                await read_frame(reader)
            await until(lambda: len(waiting) == 1000)
        assert set(waiting) == {0}

    asyncio.run(work())


def test_a_slow_reader_is_not_read_from():
    """A peer that asks without reading the answers is stopped, and served on when it reads again."""

    async def work() -> None:
        def answer(connection: Connection, message: m.Message) -> None:
            connection.send(m.Reply(message.id), [peer.memory.slot(8 << 10)])

        peer, total = Peer(answer), 8000
        async with served(peer) as (reader, writer):
            reader._transport.pause_reading()
            writer.write(b"".join(encode_frame(m.Cancel(number)) for number in range(total)))
            await until(lambda: len(peer.frames) > 64)
            seen = -1
            while seen != len(peer.frames):
                seen = len(peer.frames)
                await asyncio.sleep(0.05)  # that nothing more comes is told by time alone
            assert seen < total, "everything was read though nothing was taken"
            reader._transport.resume_reading()
            for number in range(total):
                message, _ = await read_frame(reader)
                assert message == m.Reply(number)
            await until(lambda: peer.memory.live == 0)

    asyncio.run(work())


def test_slots_come_back_when_the_reader_dies():
    """Everything queued for a peer that is gone is free again."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, writer):
            reader._transport.pause_reading()
            for number in range(20):
                peer.connections[0].send(m.Reply(number), [peer.memory.slot(4 << 20)])
            assert peer.memory.live > 1
            writer.transport.abort()
        assert peer.memory.live == 0

    asyncio.run(work())


def test_sending_to_a_lost_connection_frees_the_slots():
    """An answer that comes too late goes nowhere, and its memory is free."""

    async def work() -> None:
        peer = Peer()
        async with served(peer):
            pass
        peer.connections[0].send(m.Reply(1), [peer.memory.slot()])
        assert peer.memory.live == 0

    asyncio.run(work())


def test_closing_lets_out_what_is_queued():
    """``close`` ends the connection only after everything that was sent has left, however slow the reader."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, _):
            reader._transport.pause_reading()
            for number in range(8):
                peer.connections[0].send(m.Reply(number), [peer.memory.slot(4 << 20)])
            peer.connections[0].close()
            await until(lambda: peer.connections[0].stalled_s > 0)
            reader._transport.resume_reading()
            for number in range(8):
                message, payload = await read_frame(reader)
                assert message == m.Reply(number) and len(payload) == 4 << 20
            assert await reader.read() == b""
        assert peer.memory.live == 0

    asyncio.run(work())


def test_the_owner_is_told_once():
    """However a connection ends, ``lost`` is called once."""

    async def work() -> None:
        peer = Peer()
        async with served(peer) as (reader, _):
            peer.connections[0].close()
            peer.connections[0].close()
            assert await reader.read() == b""
        for _ in range(10):  # turns of the loop in which it could be told again
            await asyncio.sleep(0)
        assert len(peer.reasons) == 1

    asyncio.run(work())
