"""Which requests are the same computation: whoever joins one gets its answer."""

from __future__ import annotations

import msgspec
import pytest

from luna_daemon.control.computing import is_same
from luna_daemon.pool.work import Piece, Work
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot
from luna_daemon.wire.frame import encode_call

SPEC = m.LoadSpec("vae:a:0", "vae", "sdxl", (), "cpu", "auto")
CALL = encode_call(m.VaeDecode(m.ModelRef("vae", name="sdxl")))
REF = m.TensorRef("uint8", (2, 2), 4, 0)


def piece(ref: m.TensorRef = REF, data: bytes = b"abcd") -> Piece:
    """A tensor in memory of its own."""
    slot = Slot.on_heap(len(data))
    slot.view[:] = data
    return Piece(ref, slot)


def same(spec=SPEC, call=CALL, pieces=None, pin=False) -> bool:
    """Whether a request is what the work of ``SPEC``, ``CALL`` and one piece computes."""
    work = Work("vae.decode", CALL, SPEC, [piece()], 1, None, [], pin=pin)
    return is_same(work, spec, msgspec.Raw(bytes(call)), [piece()] if pieces is None else pieces)


def test_equal_in_everything():
    """Same model, call and bytes, wherever these lie and however they came: computed once."""
    assert same()
    assert same(pieces=[piece(REF.placed(4096, 7, "seg-1", True))])


@pytest.mark.parametrize(
    "different",
    [
        {"spec": msgspec.structs.replace(SPEC, key="vae:a:1")},
        {"call": encode_call(m.VaeDecode(m.ModelRef("vae", name="sdxl"), m.Tiling(64)))},
        {"pieces": []},
        {"pieces": [piece(), piece()]},
        {"pieces": [piece(data=b"abcx")]},
        {"pieces": [piece(m.TensorRef("uint8", (4,), 4, 0))]},
        {"pieces": [piece(m.TensorRef("int8", (2, 2), 4, 0))]},
        {"pieces": [piece(m.TensorRef("uint8", (2, 2), 4, 0, order=(1, 0)))]},
        {"pin": True},
    ],
    ids=["model", "call", "fewer", "more", "bytes", "shape", "dtype", "order", "pinning"],
)
def test_different_in_anything(different):
    """Another model, option, byte, shape, dtype or memory order is another computation; so is one that pins."""
    assert not same(**different)


def test_measuring_is_never_joined():
    """Two echo calls are two, or a benchmark would time nothing."""
    echo = m.LoadSpec("echo", "echo", "", (), "cpu", "auto")
    call = encode_call(m.Echo())
    assert not is_same(Work("echo", call, echo, [], 1, None, []), echo, call, [])
