"""The fuzzer's first inputs: every message of the protocol, and every op as a client asks it."""

from __future__ import annotations

from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import PREFIX_SIZE, encode_call, encode_frame
from tests.fuzz.target import framed
from tests.unit.wire.examples import CALLS, MESSAGES

__all__ = ["seeds"]

STRANGER, CLIENT, SEES_ARENA, FRAMED = 0, 1, 2, 4


def seeds() -> dict[str, bytes]:
    """Inputs by name."""
    found = {f"message-{type(message).__name__.lower()}": _said(STRANGER, [(message, 0)]) for message in MESSAGES}
    for call in CALLS:
        ref = m.TensorRef("float32", (1, 2), 8, 0)
        found[f"op-{type(call).__name__.lower()}"] = _said(CLIENT, [(m.Request(1, encode_call(call), [ref]), 8)])
    slots = [(m.Request(1, encode_call(m.Alloc(64))), 0), (m.Release([1]), 0), (m.Bye(), 0)]
    found["slots"] = _said(CLIENT | SEES_ARENA, slots)
    return found


def _said(who: int, messages: list[tuple[m.Message, int]]) -> bytes:
    parts = [framed(encode_frame(message, payload)[PREFIX_SIZE:], payload) for message, payload in messages]
    return bytes([who | FRAMED]) + b"".join(parts)
