"""Bytes and descriptors that no honest client sends: each gets a typed answer, and the daemon goes on."""

from __future__ import annotations

import random
import struct

import msgspec
import pytest
import torch

from luna_daemon.core import BadRequest, LimitExceeded
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import ArenaView
from luna_daemon.wire.frame import encode_frame
from tests.integration.helpers import RawPeer

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(start_module_daemon):
    """One daemon with small limits for the whole module."""
    return start_module_daemon(max_tensor_mb=1, max_header_mb=1)


@pytest.fixture(autouse=True)
def goes_on(daemon):
    """After every test the daemon answers, holds no shared memory, and has not lost a worker."""
    yield
    with daemon.client() as client:
        client.ping()
    info = daemon.wait_for(lambda info: info["arena"]["used"] == 0 and info["in_flight"] == 0)
    assert info["crashes"] == 0


def prefix(header: int, payload: int = 0, magic: bytes = b"LDP1") -> bytes:
    return struct.pack("<4sIQ", magic, header, payload)


RANDOM = random.Random(7).randbytes(4096)
BEFORE_HELLO = {
    "random": (RANDOM, "protocol", "not a Luna Daemon message"),
    "zeros": (bytes(64), "protocol", "not a Luna Daemon message"),
    "other version": (prefix(10, magic=b"LDP2") + bytes(10), "version", "LDP/2, this side LDP/1"),
    "header past the limit": (prefix(100 << 10), "limit", "102400 bytes"),
    "payload past the limit": (prefix(10, 1 << 62), "limit", f"{1 << 62} bytes; the limit is {MIB}"),
    "not msgpack": (prefix(16) + b"\xc1" * 16, "protocol", "malformed message"),
    "no message of ours": (prefix(14) + b"\x81\xa4type\xa7unknown", "protocol", "unknown"),
    "deeply nested": (prefix(5000) + b"\x91" * 5000, "protocol", "malformed message"),
    "a request": (encode_frame(m.Cancel(1)), "protocol", "must be hello, not Cancel"),
    "tensors": (encode_frame(m.Cancel(1), 64), "authentication", "before the greeting"),
}


@pytest.mark.parametrize("data, code, words", BEFORE_HELLO.values(), ids=BEFORE_HELLO)
def test_a_stranger_gets_a_typed_refusal(daemon, data, code, words):
    """Whatever comes instead of a greeting is answered with its error, and the connection closes."""
    with RawPeer(daemon) as peer:
        peer.sock.sendall(data)
        failure = peer.receive()
        assert (failure.id, failure.code) == (0, code)
        assert words in failure.message
        assert peer.sock.recv(1) == b"", "the connection must close"


NOT_FOR_DAEMONS = encode_frame(m.Welcome(1, "", m.Limits(0, 0, 0, 0, 0)))


@pytest.mark.parametrize("data", [RANDOM, prefix(2 * MIB), prefix(10, 2 * MIB), NOT_FOR_DAEMONS])
def test_a_client_that_goes_mad_is_cut_off(daemon, data):
    """The same from somebody who was let in."""
    with RawPeer(daemon) as peer:
        assert isinstance(peer.hello(), m.Welcome)
        peer.sock.sendall(data)
        assert peer.receive().code in ("protocol", "limit")
        assert peer.sock.recv(1) == b""


def test_the_refusal_is_read_although_much_more_was_sent(daemon):
    """A client in the middle of sending too much learns why, instead of a reset connection."""
    with RawPeer(daemon) as peer:
        peer.hello()
        peer.sock.sendall(prefix(10, 8 * MIB) + bytes(8 * MIB))
        assert peer.receive().code == "limit"


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_a_truncated_frame_leaves_nothing(daemon, length):
    """A client that dies in the middle of a frame is forgotten, and what it had begun to send is given back."""
    frame = encode_frame(m.Request(1, msgspec.Raw(b"\x81\xa2op\xa4ping")), MIB) + bytes(1000)
    with RawPeer(daemon) as peer:
        peer.hello()
        peer.sock.sendall(frame[:length] if length < 40 else frame)
    daemon.wait_for(lambda info: all(client["name"] != "raw peer" for client in info["clients"]))


def test_http_gets_one_line(daemon):
    """A browser on the wrong port is told so in its own language."""
    with RawPeer(daemon) as peer:
        peer.sock.sendall(b"GET /api/info HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while part := peer.sock.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.0 400 ") and b"LDP/1" in answer and answer.count(b"\r\n") == 2


BAD_CALLS = {
    "unknown op": ({"op": "disk.format"}, "disk.format"),
    "no op": ({"nbytes": 3}, "op"),
    "wrong type": ({"op": "echo", "nbytes": "many"}, "nbytes"),
    "missing field": ({"op": "vae.decode"}, "model"),
    "negative": ({"op": "echo", "nbytes": -4}, "-4"),
    "not whole": ({"op": "echo", "nbytes": 3}, "3"),
    "no time": ({"op": "echo", "seconds": float("nan")}, "nan"),
    "past the limit": ({"op": "echo", "nbytes": 2 * MIB}, f"limit is {MIB}"),
    "kind": ({"op": "models.load", "model": {"kind": "unet", "name": "x"}}, "unet"),
    "no model": ({"op": "models.load", "model": {"kind": "vae"}}, "by name or by files"),
    "slot of nothing": ({"op": "alloc", "nbytes": 4096}, "not proved"),
    "nonce": ({"op": "arena", "nonce": "guessed"}, "nonce"),
    "lora keys": ({"op": "lora.put", "name": "x", "keys": ["a", "b"]}, "2 keys for 0"),
}


@pytest.mark.parametrize("call, words", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_is_answered_and_the_connection_lives(daemon, call, words):
    """An unknown op, a field of the wrong type, a size out of range: an error that names it, on the same connection."""
    with RawPeer(daemon) as peer:
        peer.hello()
        failure = peer.ask(call, 5)
        assert isinstance(failure, m.Failure) and failure.id == 5
        assert failure.code in ("bad_request", "limit") and words in failure.message
        assert isinstance(peer.ask(m.Ping(), 6), m.Reply)


def ref(dtype="float32", shape=(4,), nbytes=16, offset=0, slot=0, segment=""):
    return m.TensorRef(dtype, shape, nbytes, offset, slot, segment)


BAD_REFS = {
    "dtype": ([ref("object")], "bad_request", "object"),
    "negative size": ([ref(shape=(-4,), nbytes=-16)], "bad_request", "[-4]"),
    "negative bytes": ([ref(nbytes=-16)], "bad_request", "not -16"),
    "bytes of another shape": ([ref(nbytes=20)], "bad_request", "has 16 bytes, not 20"),
    "huge size": ([ref(shape=(2**62, 2**62), nbytes=16)], "limit", f"limit is {MIB}"),
    "huge bytes": ([ref(nbytes=2**62)], "limit", str(2**62)),
    "too many axes": ([ref(shape=(1,) * 17, nbytes=4)], "bad_request", "not a shape"),
    "huge and empty": ([ref(shape=(0, 2**63), nbytes=0)], "bad_request", "too large"),
    "negative offset": ([ref(offset=-8)], "bad_request", ""),
    "outside the payload": ([ref(offset=56)], "bad_request", "outside its 64 bytes"),
    "far outside": ([ref(offset=2**60)], "bad_request", "outside its 64 bytes"),
    "together past the limit": ([ref(shape=(MIB // 8,), nbytes=MIB // 2)] * 3, "limit", str(MIB)),
    "slot of nobody": ([ref(slot=7, segment="seg-0")], "bad_request", "slot 7 is not held"),
}


@pytest.mark.parametrize("refs, code, words", BAD_REFS.values(), ids=BAD_REFS)
def test_a_descriptor_that_lies_is_refused(daemon, refs, code, words):
    """Shapes, sizes, offsets and slots are checked against what was really sent, before a worker sees them."""
    with RawPeer(daemon) as peer:
        peer.hello()
        failure = peer.ask(m.Echo(), 3, refs, bytes(64))
        assert (failure.id, failure.code) == (3, code) and words in failure.message
        assert isinstance(peer.ask(m.Ping(), 4), m.Reply)


def test_a_slot_is_no_larger_than_asked(daemon):
    """A descriptor that reaches past its slot would show another client's tensor: refused."""
    with RawPeer(daemon) as peer:
        peer.prove()
        slot = peer.ask(m.Alloc(4096), 2).tensors[0]
        failure = peer.ask(m.Echo(), 3, [ref(shape=(1025,), nbytes=4100, slot=slot.slot, segment=slot.segment)])
        assert failure.code == "bad_request" and "outside its 4096 bytes" in failure.message


def test_where_a_slot_lies_is_not_the_clients_choice(daemon):
    """Offset and segment of a client's descriptor are ignored: only the slot's own bytes can be reached by it."""
    with RawPeer(daemon) as peer:
        peer.prove()
        slot = peer.ask(m.Alloc(16), 2).tensors[0]
        folder = daemon.arena_dir / f"luna-daemon-{daemon.port}"
        ArenaView(folder).slice(slot.segment, slot.offset, 16)[:] = b"sixteen bytes---"
        put = peer.ask(m.LoraPut("lie", ["a"]), 3, [ref(slot=slot.slot, offset=2**40, segment="../../../etc/passwd")])
        assert isinstance(put, m.Reply)
        with daemon.client() as client:
            assert bytes(client.lora_cache_get("lie")["a"].view(torch.uint8)) == b"sixteen bytes---"
            client.lora_cache_put("lie", {})  # gives the slot back


@pytest.mark.parametrize("nbytes", [0, -1, 2 * MIB, 2**62])
def test_slots_have_limits(daemon, nbytes):
    """Nothing, less than nothing and too much cannot be reserved."""
    with RawPeer(daemon) as peer:
        peer.prove()
        assert peer.ask(m.Alloc(nbytes), 2).code == "limit"


@pytest.mark.parametrize("number", [0, -3])
def test_request_ids_are_positive(daemon, number):
    """Id 0 stands for the connection itself."""
    with RawPeer(daemon) as peer:
        peer.hello()
        assert "not positive" in peer.ask(m.Ping(), number).message


def test_an_id_in_use_is_refused(daemon):
    """Two requests of one id would be answered to each other's caller, and one would hold its memory for ever."""
    with RawPeer(daemon) as peer:
        peer.hello()
        for _ in range(2):
            peer.channel.send(m.Request(9, msgspec.Raw(msgspec.msgpack.encode(m.Echo(0, 5.0)))))
        failure = peer.receive()
        assert (failure.id, failure.code) == (0, "protocol") and "9 is in use" in failure.message


def test_the_client_checks_first(daemon):
    """Too large a tensor and a dtype that cannot travel are refused before a byte is sent."""
    with daemon.client() as client:
        with pytest.raises(LimitExceeded, match=f"{2 * MIB} bytes; the limit is {MIB}"):
            client.call(m.Echo(), [torch.zeros(MIB // 2)])
        with pytest.raises(BadRequest, match="complex64"):
            client.call(m.Echo(), [torch.zeros(4, dtype=torch.complex64)])


def test_a_call_that_fails_halfway_gives_its_slots_back(daemon):
    """The first tensor already lies in shared memory when the second is refused."""
    with daemon.client() as client:
        with pytest.raises(LimitExceeded):
            client.call(m.Echo(), [torch.zeros(MIB // 8), torch.zeros(MIB // 2)])
        daemon.wait_for(lambda info: info["arena"]["used"] == 0)
