"""Nested plain data with tensors: there and back the same, and nothing that could run."""

from __future__ import annotations

import enum

import numpy as np
import pytest
import torch

from luna_daemon.core import BadRequest
from luna_daemon.wire.packing import pack, unpack


class Mode(enum.IntEnum):
    FAST = 2


def test_there_and_back():
    """Tuples stay tuples, lists lists, and tensors are the same objects in the order of their places."""
    first, second = torch.ones(2), torch.zeros(1)
    value = {"a": [1, (2.5, first)], "b": {"c": (second, None, True, b"x", "text")}}
    tensors: list[torch.Tensor] = []
    back = unpack(pack(value, tensors), tensors)
    assert [tensor is expected for tensor, expected in zip(tensors, (first, second))] == [True, True]
    assert type(back["a"][1]) is tuple and back["a"][1][1] is first and back["b"]["c"][0] is second
    assert back["a"][0] == 1 and back["b"]["c"][1:] == (None, True, b"x", "text")


@pytest.mark.parametrize("value, plain", [(np.float64(0.5), 0.5), (Mode.FAST, 2)])
def test_numbers_of_other_classes_become_pythons_own(value, plain):
    """A subclass of ``int`` or ``float`` carries code; its value does not."""
    packed = pack(value, [])
    assert packed == plain and type(packed) is type(plain)


@pytest.mark.parametrize(
    "value, says",
    [(object(), "a object"), ({1: 2}, "keys that are not text"), ([{"a": {1}}], "a set"), (len, "builtin")],
)
def test_what_is_not_plain_is_refused(value, says):
    with pytest.raises(BadRequest, match=says):
        pack(value, [])


@pytest.mark.parametrize("index", [1, -1, "0", None, 0.0])
def test_a_tensor_that_did_not_come_is_refused(index):
    with pytest.raises(BadRequest, match="of 1"):
        unpack([{"$tensor": index}], [torch.ones(1)])
