"""Plain data with tensors inside, there and back."""

from __future__ import annotations

import enum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luna_daemon.core import BadRequest
from luna_daemon.wire.packing import pack, unpack

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(alphabet="abc"), inner),
    max_leaves=12,
)


@given(plain)
def test_plain_data_comes_back_as_it_was(value):
    """Tuples as tuples, too."""
    assert unpack(pack(value, []), []) == value


def test_tensors_are_taken_out_and_put_back_in_their_places():
    """In the order in which they stand."""
    first, second = torch.zeros(1), torch.ones(2)
    tensors: list[torch.Tensor] = []
    packed = pack({"a": (first, 1), "b": [second]}, tensors)
    assert tensors == [first, second] and packed == {"a": {"$tuple": [{"$tensor": 0}, 1]}, "b": [{"$tensor": 1}]}
    back = unpack(packed, tensors)
    assert back["a"][0] is first and back["b"][0] is second and type(back["a"]) is tuple


@pytest.mark.parametrize(
    ("value", "says"),
    [(object(), "a object cannot be sent"), ({1: 2}, "keys that are not text"), ([{"a": {1}}], "a set cannot be sent")],
)
def test_nothing_else_travels(value, says):
    """The error names the type."""
    with pytest.raises(BadRequest, match=says):
        pack(value, [])


def test_numbers_of_other_types_become_pythons_own():
    """An enum's member is its number."""
    assert pack(enum.IntEnum("Kind", "A B").B, []) == 2 and type(pack(enum.IntEnum("Kind", "A").A, [])) is int


@pytest.mark.parametrize("index", [-1, 1, "0", None])
def test_a_tensor_that_did_not_come(index):
    """A peer may name any."""
    with pytest.raises(BadRequest, match="refers to tensor"):
        unpack([{"$tensor": index}], [torch.zeros(1)])
