"""Random numbers that a worker draws as this process would have drawn them."""

from __future__ import annotations

import pytest
import torch

from luna_daemon.core import BadRequest
from luna_daemon.wire.rng import drawing, put_states, states


@pytest.fixture(autouse=True)
def generator():
    """The process' generator is as it was afterwards."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def test_what_is_drawn_elsewhere_is_what_would_have_been_drawn_here():
    """And the next number here is the one after it."""
    torch.manual_seed(5)
    names, sent = states("cpu")
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(99)
    with drawing(names, sent) as drawn:
        first = torch.rand(3)
    torch.manual_seed(7)
    put_states(drawn.names, drawn.states)
    assert drawn.names == ["cpu"] and torch.equal(first, expected[0]) and torch.equal(torch.rand(3), expected[1])


def test_a_computation_that_draws_nothing_has_nothing_to_return():
    """The states need not travel back."""
    with drawing(*states("cpu")) as drawn:
        torch.zeros(3)
    assert not drawn.names and not drawn.states


@pytest.mark.parametrize(
    ("names", "sent", "says"),
    [
        (["mps"], [torch.get_rng_state()], "'mps' is unknown"), (["cpu"], [], "cpu"),
        (["cpu"], [torch.zeros(3, dtype=torch.uint8)], "cpu"), (["cpu"], [torch.zeros(5056)], "cpu"),
    ],
    ids=["unknown", "missing", "short", "of another dtype"],
)  # fmt: skip
def test_wrong_states_are_refused(names, sent, says):
    """They come from a client."""
    with pytest.raises(BadRequest, match=says):
        put_states(names, sent)
