"""Memory for payloads is used again, and never while somebody still looks at it."""

from __future__ import annotations

import torch

from luna_daemon.wire.buffers import Buffers
from luna_daemon.wire.codec import tensor_from
from luna_daemon.wire.messages import TensorRef

SIZE = 2 << 20


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_memory_comes_back_and_is_used_again():
    """The second payload of a size lies where the first lay, once that is gone."""
    buffers = Buffers()
    first = buffers.take(SIZE)
    where = address(first)
    other = buffers.take(SIZE)
    assert address(other) != where
    del first
    assert address(buffers.take(SIZE)) == where


def test_a_tensor_keeps_its_memory():
    """A tensor over part of a payload keeps the whole from being used again."""
    buffers = Buffers()
    payload = buffers.take(SIZE)
    tensor = tensor_from(TensorRef("float32", (256,), 1024, 0), payload[4096:5120])
    where = address(payload)
    tensor.fill_(3)
    del payload
    again = buffers.take(SIZE)
    assert address(again) != where
    again[:] = bytes(SIZE)
    assert bool((tensor == 3).all())


def test_no_more_is_kept_than_allowed():
    """Beyond the limit memory goes back to the system, and a size that is no longer asked for does not stay."""
    buffers = Buffers(keep_bytes=2 * SIZE)
    held = [buffers.take(SIZE) for _ in range(4)]
    held.clear()
    assert sum(len(stores) for stores in buffers._spare.values()) == 2
    buffers.take(SIZE + 4096)
    assert SIZE not in buffers._spare
