"""Framing: a fixed prefix, one msgpack message, then the raw bytes of the tensors that travel inline.

::

    0        4            8                 16
    | "LDP1" | header u32 | payload u64     | header (msgpack) | payload |      little-endian
"""

from __future__ import annotations

import struct

import msgspec

from ..core import LimitExceeded, ProtocolError, VersionMismatch
from .messages import Call, Message

MAGIC = b"LDP1"
_PREFIX = struct.Struct("<4sIQ")
PREFIX_SIZE = _PREFIX.size
MAX_HEADER = 64 << 20
"""Largest message in bytes that a client or worker accepts; the daemon's own limit is a setting."""

_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(Message)
_calls = msgspec.msgpack.Decoder(Call)


def encode_frame(message: Message, payload_bytes: int = 0) -> bytes:
    """A frame's prefix and message, without the payload."""
    header = _encoder.encode(message)
    return _PREFIX.pack(MAGIC, len(header), payload_bytes) + header


def parse_prefix(data: bytes | bytearray | memoryview, max_header: int, max_payload: int) -> tuple[int, int]:
    """Sizes of header and payload in bytes, from a frame's prefix.

    Raises:
        VersionMismatch: the other side speaks another LDP version.
        ProtocolError: the data is not LDP.
        LimitExceeded: header or payload is larger than allowed.
    """
    magic, header, payload = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        if magic[:3] == MAGIC[:3]:
            raise VersionMismatch(
                f"the other side speaks LDP/{chr(magic[3])}, this side LDP/{chr(MAGIC[3])}",
                "Update the older of the two",
            )
        raise ProtocolError(f"not a Luna Daemon message: it begins with {magic!r}")
    if header > max_header:
        raise LimitExceeded(f"message header of {header} bytes; the limit is {max_header}", "Raise max_header_mb")
    if payload > max_payload:
        raise LimitExceeded(f"payload of {payload} bytes; the limit is {max_payload}", "Raise max_tensor_mb")
    return header, payload


def decode_message(header: bytes | bytearray | memoryview) -> Message:
    """Decode one message.

    Raises:
        ProtocolError: the header is not msgpack, or not an LDP/1 message.
    """
    try:
        message: Message = _messages.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from error
    return message


def encode_call(call: Call) -> msgspec.Raw:
    """Encode a call for ``Request`` and ``Job``."""
    return msgspec.Raw(_encoder.encode(call))


def decode_call(raw: msgspec.Raw) -> Call:
    """Decode a request's call.

    Raises:
        ProtocolError: unknown op, or a field of the wrong type; the error's text names the field.
    """
    try:
        call: Call = _calls.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed call: {error}") from error
    return call
