"""The blocking side of a connection, against peers that send in crumbs, stall, or die."""

from __future__ import annotations

import socket
import struct
import threading
import time

import msgspec
import pytest

from luna_daemon.core import DaemonConnectionError, LunaError, ProtocolError, VersionMismatch
from luna_daemon.wire import messages as m
from luna_daemon.wire.channel import Channel
from luna_daemon.wire.frame import encode_frame
from tests.unit.fakes import FewBytesSocket, tcp_pair
from tests.waiting import within

PAYLOAD = bytes(range(200))
FRAME = encode_frame(m.Reply(7, {"a": 1}), len(PAYLOAD)) + PAYLOAD


@pytest.fixture
def pair():
    """A channel and the bare socket at its other end."""
    with tcp_pair() as (near, far):
        yield Channel(near), far


def check_frame(received) -> None:
    """It is ``FRAME``."""
    assert received is not None, "the frame did not arrive"
    message, payload = received
    assert message == m.Reply(7, {"a": 1}) and bytes(payload) == PAYLOAD


def test_single_bytes_make_a_frame():
    """A socket that hands out one byte per read changes nothing."""
    with tcp_pair() as (near, far):
        channel = Channel(FewBytesSocket(near))
        far.sendall(FRAME * 3)
        for _ in range(3):
            check_frame(channel.receive(5))


@pytest.mark.parametrize("most", [15, 16, 17, 31, 100])
def test_reads_that_end_anywhere_make_a_frame(most):
    """Reads that end just before, at, and just after the prefix, or in header and payload, change nothing."""
    with tcp_pair() as (near, far):
        channel = Channel(FewBytesSocket(near, most))
        far.sendall(FRAME * 3)
        for _ in range(3):
            check_frame(channel.receive(5))


def test_a_timeout_loses_nothing(pair):
    """However often a receive gives up in the middle of a frame, the frame is complete in the end."""
    channel, far = pair
    for at in range(len(FRAME) - 1):
        far.sendall(FRAME[at : at + 1])
        assert channel.receive(0) is None
    far.sendall(FRAME[-1:])
    check_frame(channel.receive(5))


def test_a_timeout_waits_that_long_and_no_longer(pair):
    """Silence gives ``None`` after the timeout."""
    channel, _ = pair
    start = time.monotonic()
    with within(1):
        assert channel.receive(0.05) is None
    assert time.monotonic() - start > 0.04


def test_many_frames_in_one_read(pair):
    """Frames that arrive together are handed out one by one, in order, each with its own payload."""
    channel, far = pair
    frames = [encode_frame(m.Cancel(number), number % 3) + b"x" * (number % 3) for number in range(200)]
    far.sendall(b"".join(frames))
    for number in range(200):
        message, payload = channel.receive(5)
        assert message == m.Cancel(number) and bytes(payload) == b"x" * (number % 3)
    assert channel.receive(0) is None


def test_a_header_larger_than_the_buffer(pair):
    """A message of a megabyte arrives, and a small one after it."""
    channel, far = pair
    text = "x" * (1 << 20)
    sender = threading.Thread(target=far.sendall, args=(encode_frame(m.Reply(1, text)) + FRAME,))
    sender.start()
    message, _ = channel.receive(5)
    assert message == m.Reply(1, text)
    check_frame(channel.receive(5))
    sender.join()


def test_a_payload_larger_than_the_buffer(pair):
    """Eight megabytes arrive bit for bit, and a small frame after them."""
    channel, far = pair
    payload = bytes(range(256)) * (32 << 10)
    sender = threading.Thread(target=far.sendall, args=(encode_frame(m.Reply(1), len(payload)) + payload + FRAME,))
    sender.start()
    _, received = channel.receive(5)
    assert bytes(received) == payload
    check_frame(channel.receive(5))
    sender.join()


def test_a_payload_is_the_receivers_own(pair):
    """A payload that is kept does not change when the next frame arrives."""
    channel, far = pair
    far.sendall(FRAME + encode_frame(m.Reply(8), 200) + bytes(200))
    _, kept = channel.receive(5)
    channel.receive(5)
    assert bytes(kept) == PAYLOAD and not kept.readonly


def test_raw_parts_are_the_receivers_own(pair):
    """A request's undecoded call does not change when the next frame arrives."""
    channel, far = pair
    calls = [msgspec.Raw(b"\xa3abc"), msgspec.Raw(b"\xa3xyz")]
    far.sendall(b"".join(encode_frame(m.Request(number, call)) for number, call in enumerate(calls)))
    (kept, _), _ = channel.receive(5), channel.receive(5)
    assert bytes(kept.call) == b"\xa3abc"


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, len(FRAME) - len(PAYLOAD), len(FRAME) - 1])
def test_a_peer_that_dies_in_a_frame(cut):
    """Death before, in and after prefix, header and payload is a connection error, never a hang or half a frame."""
    with tcp_pair() as (near, far):
        channel = Channel(near)
        far.sendall(FRAME[:cut])
        far.close()
        with pytest.raises(DaemonConnectionError, match="connection lost while receiving"):
            channel.receive(5)


def test_what_came_before_the_death_is_handed_out(pair):
    """Whole frames that arrived before the end are not lost."""
    channel, far = pair
    far.sendall(FRAME + FRAME[:20])
    far.close()
    check_frame(channel.receive(5))
    with pytest.raises(DaemonConnectionError):
        channel.receive(5)


def test_a_reset_is_a_connection_error(pair):
    """A connection that is torn down hard is reported the same way."""
    channel, far = pair
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    with pytest.raises(DaemonConnectionError):
        channel.receive(5)


@pytest.mark.parametrize(
    "data, error",
    [
        (b"HTTP/1.1 400 Bad Request\r\n", ProtocolError),
        (b"LDP9" + bytes(12), VersionMismatch),
        (struct.pack("<4sIQ", b"LDP1", 3, 0) + b"\xc1\xc1\xc1", ProtocolError),
    ],
)
def test_something_else_at_the_other_end(pair, data, error):
    """HTTP, another version and garbage are told apart."""
    channel, far = pair
    far.sendall(data)
    with pytest.raises(error):
        channel.receive(5)


@pytest.mark.parametrize("header, payload", [(2**32 - 1, 0), (1, 1001), (1, 2**64 - 1)])
def test_gigantic_frames_are_refused_without_memory(header, payload):
    """Sizes over the limit end the connection at once: nothing is reserved and nothing waited for."""
    with tcp_pair() as (near, far):
        channel = Channel(near, max_payload=1000)
        far.sendall(struct.pack("<4sIQ", b"LDP1", header, payload))
        with pytest.raises(LunaError, match="the limit is"):
            channel.receive(5)


def test_sending_writes_frames(pair):
    """Header and all payload parts arrive in order, as one frame."""
    channel, far = pair
    channel.send(m.Reply(7, {"a": 1}), [memoryview(PAYLOAD[:50]), memoryview(b""), memoryview(PAYLOAD[50:])])
    check_frame(Channel(far).receive(5))


def test_sending_to_the_dead_is_a_connection_error(pair):
    """A peer that is gone is noticed within a few sends."""
    channel, far = pair
    far.close()
    with pytest.raises(DaemonConnectionError, match="connection lost while sending"):
        for _ in range(100):
            channel.send(m.Cancel(1), [memoryview(bytes(1 << 16))])


def test_threads_send_whole_frames(pair):
    """Frames of eight threads never mix."""
    channel, far = pair

    def send(number: int) -> None:
        for _ in range(20):
            channel.send(m.Cancel(number), [memoryview(bytes([number]) * 5000)])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    reader = Channel(far)
    for _ in range(160):
        message, payload = reader.receive(5)
        assert bytes(payload) == bytes([message.id]) * 5000
    for thread in threads:
        thread.join()


def test_try_send_never_waits_for_another_sender(pair):
    """While a thread is stuck in a large send, ``try_send`` says no at once; afterwards it sends, and nothing mixes."""
    channel, far = pair
    payload = bytes(32 << 20)
    sender = threading.Thread(target=channel.send, args=(m.Reply(1), [memoryview(payload)]))
    sender.start()
    end = time.monotonic() + 5
    while channel.try_send(m.Release([1])):
        assert time.monotonic() < end, "the large send never held the channel"
        time.sleep(0.001)
    assert sender.is_alive()
    reader = Channel(far)
    sizes = []
    while not sizes or sizes[-1] == 0:
        received = reader.receive(10)
        assert received is not None
        sizes.append(received[1].nbytes)
    sender.join()
    assert sizes[-1] == len(payload)
    assert channel.try_send(m.Release([2]))
    assert reader.receive(5)[0] == m.Release([2])


def test_closing_wakes_the_reader(pair):
    """A thread that waits for a frame gets a connection error when another closes the channel."""
    channel, _ = pair
    errors = []

    def read() -> None:
        try:
            channel.receive(10)
        except DaemonConnectionError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.05)  # nothing says that it waits; if it does not yet, it must fail all the same
    channel.close()
    reader.join(20)
    assert len(errors) == 1


def test_closing_twice_is_fine(pair):
    """``close`` may be called again, and sending afterwards is a connection error."""
    channel, _ = pair
    channel.close()
    channel.close()
    with pytest.raises(DaemonConnectionError):
        channel.send(m.Cancel(1))


def test_reading_from_a_closed_channel_is_a_connection_error(pair):
    """Whoever starts to read just after the close is told, instead of waiting, for ever without a timeout."""
    channel, _ = pair
    channel.close()
    with pytest.raises(DaemonConnectionError):
        channel.receive(0.05)
