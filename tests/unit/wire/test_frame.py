"""Framing: every message survives it, and nothing that arrives can raise anything but our own errors."""

from __future__ import annotations

import random
import struct
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luna_daemon.core import LimitExceeded, LunaError, ProtocolError, VersionMismatch
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import (
    MAX_HEADER,
    PREFIX_SIZE,
    decode_call,
    decode_message,
    encode_call,
    encode_frame,
    parse_prefix,
)
from tests.unit.wire.examples import CALLS, MESSAGES


def test_the_examples_are_complete():
    """Every call and every message of the protocol has an example here, so a new one cannot go untested."""
    assert {type(call) for call in CALLS} == set(typing.get_args(m.Call))
    assert {type(message) for message in MESSAGES} == set(typing.get_args(m.Message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_equal(message):
    """Encoding, splitting by the prefix and decoding gives an equal message and the payload's size."""
    frame = encode_frame(message, 123)
    header, payload = parse_prefix(frame, 1 << 20, 1 << 20)
    assert (header, payload) == (len(frame) - PREFIX_SIZE, 123)
    assert decode_message(frame[PREFIX_SIZE:]) == message


@pytest.mark.parametrize("call", CALLS, ids=lambda call: type(call).__name__)
def test_a_call_comes_back_equal_inside_a_request(call):
    """A call survives the way inside a request, whose own decoding does not touch it."""
    frame = encode_frame(m.Request(1, encode_call(call)))
    request = decode_message(frame[PREFIX_SIZE:])
    assert isinstance(request, m.Request)
    assert decode_call(request.call) == call


def test_the_prefix_is_what_the_protocol_says():
    """Magic, u32 header size, u64 payload size, little-endian: other languages depend on it."""
    frame = encode_frame(m.Cancel(3), 5)
    assert struct.unpack("<4sIQ", frame[:16]) == (b"LDP1", len(frame) - 16, 5)
    assert msgspec.msgpack.decode(frame[16:]) == {"type": "cancel", "id": 3}
    assert PREFIX_SIZE == 16


def test_sizes_at_the_limit_pass_and_one_more_does_not():
    """The limits are inclusive, and the refusal names size and limit."""
    pack = struct.Struct("<4sIQ").pack
    assert parse_prefix(pack(b"LDP1", 10, 20), 10, 20) == (10, 20)
    with pytest.raises(LimitExceeded, match="header of 11 bytes; the limit is 10"):
        parse_prefix(pack(b"LDP1", 11, 20), 10, 20)
    with pytest.raises(LimitExceeded, match="payload of 21 bytes; the limit is 20"):
        parse_prefix(pack(b"LDP1", 10, 21), 10, 20)


def test_gigantic_sizes_are_refused():
    """The largest numbers that fit a prefix are refused even by a client's own generous limits."""
    pack = struct.Struct("<4sIQ").pack
    with pytest.raises(LimitExceeded):
        parse_prefix(pack(b"LDP1", 2**32 - 1, 0), MAX_HEADER, 1 << 40)
    with pytest.raises(LimitExceeded):
        parse_prefix(pack(b"LDP1", 1, 2**64 - 1), MAX_HEADER, 1 << 40)


def test_another_version_is_named():
    """LDP2 is a version mismatch that names both versions, not garbage."""
    with pytest.raises(VersionMismatch, match=r"LDP/2.*LDP/1"):
        parse_prefix(b"LDP2" + bytes(12), 10, 10)


@pytest.mark.parametrize("start", [b"GET ", b"\x80\x04\x95\x00", b"\0\0\0\0", b"ldp1"])
def test_something_else_is_no_message(start):
    """HTTP, a pickle, zeros and the wrong case are protocol errors that show what came."""
    with pytest.raises(ProtocolError, match="begins with") as caught:
        parse_prefix(start + bytes(12), 10, 10)
    assert not isinstance(caught.value, VersionMismatch)


@pytest.mark.parametrize(
    "call, says",
    [
        ({"op": "vae.explode"}, "vae.explode"),
        ({}, "op"),
        ({"op": 5}, "str"),
        ({"op": "alloc"}, "nbytes"),
        ({"op": "alloc", "nbytes": "many"}, "nbytes"),
        ({"op": "vae.decode", "model": {"kind": 3}}, "model.kind"),
        ({"op": "clip.encode", "model": {"kind": "clip"}, "tokens": {"l": [[["x", 1.0]]]}}, "tokens"),
        (["ping"], "array"),
    ],
)
def test_a_wrong_call_is_refused_by_name(call, says):
    """Unknown op, missing field, wrong type: the error names what is wrong."""
    with pytest.raises(ProtocolError, match=says):
        decode_call(msgspec.Raw(msgspec.msgpack.encode(call)))


@pytest.mark.parametrize(
    "message, says",
    [
        ({"type": "surprise"}, "surprise"),
        ({"type": "cancel"}, "id"),
        ({"type": "cancel", "id": 1.5}, "id"),
        ({"type": "request", "id": 1, "call": {}, "tensors": [["float32", [1], 4]]}, "tensors"),
        ({"type": "request", "id": 1, "call": {}, "tensors": [["float32", "11", 4, 0]]}, "tensors"),
    ],
)
def test_a_wrong_message_is_refused_by_name(message, says):
    """Unknown type, missing field, wrong type, a descriptor that is too short: the error says where."""
    with pytest.raises(ProtocolError, match=says):
        decode_message(msgspec.msgpack.encode(message))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xc1", b"\x81", b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b"\x81\x80\x01", b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\x82\xa4type\xa5reply\xa2id\xcf" + b"\xff" * 8, b"\x81\xa4type\xa2\xff\xfe",
        msgspec.msgpack.encode({"type": "reply", "id": 1, "result": msgspec.msgpack.Ext(-1, b"\xff" * 12)}),
    ],
)  # fmt: skip
def test_nasty_bodies_are_protocol_errors(body):
    """Nothing, deep nesting, unhashable keys, sizes that lie, bad UTF-8, bad timestamps: never another exception."""
    for decode in (decode_message, lambda data: decode_call(msgspec.Raw(data))):
        try:
            decode(body)
        except ProtocolError:
            continue


def only_our_errors(work, *args):
    """Run; anything but a result or a typed error fails the test."""
    try:
        work(*args)
    except LunaError:
        pass


@settings(max_examples=1500)
@given(st.binary(min_size=PREFIX_SIZE, max_size=64))
def test_random_prefixes(data):
    """Random bytes, with and without our magic, give sizes within the limits or a typed error."""
    for prefix in (data, b"LDP1" + data[4:]):
        try:
            header, payload = parse_prefix(prefix, 1000, 2000)
        except LunaError:
            continue
        assert header <= 1000 and payload <= 2000


@settings(max_examples=1000)
@given(st.binary(max_size=200))
def test_random_bodies(data):
    """Random bytes decode to a message or call, or give a typed error."""
    only_our_errors(decode_message, data)
    only_our_errors(decode_call, msgspec.Raw(data))


NUMBER = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
LEAF = NUMBER | st.text(max_size=5) | st.binary(max_size=5)
LIST = LEAF | st.lists(LEAF, max_size=2)
PLAIN = LIST | st.lists(LIST, max_size=2) | st.dictionaries(st.text(max_size=5), LIST, max_size=2)
KINDS = [*typing.get_args(m.Call), *typing.get_args(m.Message)]
FIELDS = sorted({field for kind in KINDS for field in kind.__struct_fields__})
TAGS = sorted(str(kind.__struct_config__.tag) for kind in KINDS)


@settings(max_examples=600)
@given(st.dictionaries(st.sampled_from(FIELDS), PLAIN, max_size=5), st.sampled_from(TAGS))
def test_well_formed_nonsense(fields, tag):
    """Valid msgpack with our tags and field names but any values decodes, or gives a typed error."""
    data = msgspec.msgpack.encode({"type": tag, "op": tag, **fields})
    only_our_errors(decode_message, data)
    only_our_errors(decode_call, msgspec.Raw(data))


VALID = [encode_frame(message)[PREFIX_SIZE:] for message in MESSAGES] + [bytes(encode_call(call)) for call in CALLS]
DAMAGE = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=3)


def damaged(valid, damage):
    """A message with bytes changed gives only typed errors, as a message and as a call."""
    data = bytearray(valid)
    for place, value in damage:
        data[place % len(data)] = value
    only_our_errors(decode_message, bytes(data))
    only_our_errors(decode_call, msgspec.Raw(bytes(data)))


@settings(max_examples=1000)
@given(st.sampled_from(VALID), DAMAGE)
def test_damaged_messages(valid, damage):
    """Valid messages with up to three bytes changed; what fails is reduced to its least damage."""
    damaged(valid, damage)


def test_twenty_thousand_damaged_messages():
    """More of them, by a seeded generator that costs a hundredth."""
    generator = random.Random(0)
    for _ in range(20_000):
        damage = [(generator.randrange(1 << 16), generator.randrange(256)) for _ in range(generator.randint(1, 3))]
        valid = generator.choice(VALID)
        try:
            damaged(valid, damage)
        except BaseException as error:
            raise AssertionError(f"{valid!r} with {damage}") from error
