"""Placement of a message's tensors: each in a slot of shared memory, or inline, behind the message."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from .messages import TensorRef

INLINE_BYTES = 32 << 10
"""Tensors of up to so many bytes travel inline: mapping and releasing a slot would cost more."""
RESERVE_BYTES = 256 << 10
"""The same for a client's inputs: their slot costs a round trip, so that 128 KB take 0.25 ms longer in one than inline.

Results have their slot already, and take 0.1 to 0.25 ms longer inline.
"""

Data = TypeVar("Data")


def lay_out(
    tensors: Iterable[tuple[TensorRef, Data]],
    in_slot: Callable[[TensorRef, Data], TensorRef | None],
    above: int = INLINE_BYTES,
) -> tuple[list[TensorRef], list[Data]]:
    """Place the tensors of a message, in order.

    Args:
        tensors: per tensor its descriptor, and the object that holds its bytes.
        in_slot: puts a tensor into a slot (unless it lies in a slot already) and returns its descriptor there, or
            ``None`` if there is no slot.
        above: only tensors of more bytes are offered to ``in_slot``.

    Returns:
        Descriptors that say where each tensor lies, and the data of the inline tensors, in order.
    """
    refs: list[TensorRef] = []
    inline: list[Data] = []
    end = 0
    for ref, data in tensors:
        place = in_slot(ref, data) if ref.nbytes > above else None
        if place is None:
            place = ref.placed(end)
            inline.append(data)
            end += ref.nbytes
        refs.append(place)
    return refs, inline
