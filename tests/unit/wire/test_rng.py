"""Random numbers drawn elsewhere: the same numbers as here, and the next draw goes on from there."""

from __future__ import annotations

import pytest
import torch

from luna_daemon.core import BadRequest
from luna_daemon.wire import rng


@pytest.fixture(autouse=True)
def own_generator():
    """Each test leaves the generator as it was."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_a_draw_elsewhere_is_a_draw_here():
    """The other side draws from the caller's state, and its new state makes the caller's next draw the second one."""
    torch.manual_seed(7)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(7)
    names, states = rng.states("cpu")
    torch.manual_seed(99)  # the other side's own
    with rng.drawing(names, states) as drawn:
        first = torch.rand(3)
    torch.manual_seed(5)  # whatever this side did meanwhile
    rng.put_states(drawn.names, drawn.states)
    assert drawn.names == ["cpu"]
    assert torch.equal(first, expected[0]) and torch.equal(torch.rand(3), expected[1])


def test_a_computation_that_draws_nothing_says_so():
    with rng.drawing([], []) as drawn:
        torch.ones(3)
    assert drawn.names == drawn.states == []


def test_draws_without_states_are_noticed():
    """Nothing was sent along, and yet the caller learns that it should have been."""
    with rng.drawing([], []) as drawn:
        torch.rand(1)
    assert drawn.names == ["cpu"]


@pytest.mark.parametrize(
    "names, states, says",
    [
        (["tpu"], [torch.zeros(1, dtype=torch.uint8)], "'tpu' is unknown"),
        (["cpu"], [], "cpu"),
        (["cpu"], [torch.zeros(3, dtype=torch.uint8)], "cpu"),
        (["cpu"], [torch.zeros(5056)], "cpu"),
    ],
    ids=["name", "missing", "short", "dtype"],
)
def test_a_wrong_state_is_refused(names, states, says):
    with pytest.raises(BadRequest, match=says):
        rng.put_states(names, states)
