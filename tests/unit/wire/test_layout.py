"""Where the tensors of a message lie."""

from __future__ import annotations

from luna_daemon.wire.layout import INLINE_BYTES, lay_out
from luna_daemon.wire.messages import TensorRef

SMALL, LARGE = TensorRef("uint8", (8,), 8, 0), TensorRef("uint8", (INLINE_BYTES + 1,), INLINE_BYTES + 1, 0)


def test_large_tensors_lie_in_slots_and_small_ones_behind_the_message():
    """Inline tensors lie one behind the other, whatever lies between them in the message."""
    asked = []

    def in_slot(ref, data):
        asked.append(data)
        return ref.placed(64, 7, "segment")

    refs, inline = lay_out([(SMALL, "a"), (LARGE, "b"), (SMALL, "c")], in_slot)
    assert refs == [SMALL.placed(0), LARGE.placed(64, 7, "segment"), SMALL.placed(8)]
    assert (asked, inline) == (["b"], ["a", "c"])


def test_without_a_slot_a_large_tensor_travels_inline():
    """Shared memory may be full."""
    refs, inline = lay_out([(LARGE, "a"), (SMALL, "b")], lambda ref, data: None)
    assert refs == [LARGE.placed(0), SMALL.placed(LARGE.nbytes)] and inline == ["a", "b"]


def test_a_tensor_of_exactly_the_threshold_travels_inline():
    """Only larger ones are offered; with another threshold all are."""
    exact = TensorRef("uint8", (INLINE_BYTES,), INLINE_BYTES, 0)
    assert lay_out([(exact, "a")], lambda ref, data: ref.placed(0, 1, "s"))[1] == ["a"]
    assert lay_out([(SMALL, "a")], lambda ref, data: ref.placed(0, 1, "s"), above=-1)[1] == []
