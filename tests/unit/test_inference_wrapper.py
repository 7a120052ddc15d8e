"""``InferenceModeWrapper`` without ComfyUI: torch modules and functions."""

from __future__ import annotations

import copy
import types
from contextlib import contextmanager

import pytest

from luna_daemon.core import BadRequest
from luna_daemon.inference_wrapper import InferenceModeWrapper, wrap_model_for_inference

torch = pytest.importorskip("torch")


@contextmanager
def saved_bytes():
    """``[n]``: bytes that autograd keeps for a backward pass."""
    count = [0]

    def pack(tensor):
        count[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


@pytest.fixture
def network():
    """A small torch module with a method, a buffer and an attribute."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.register_buffer("offset", torch.ones(4))
            self.config = types.SimpleNamespace(sample_size=8)

        def forward(self, x, scale=1.0, **_):
            return {"sample": self.layer(x) * scale + self.offset, "rest": (x, [x * 2])}

        def described(self):
            return f"{type(self).__name__} of {self.config.sample_size}"

    torch.manual_seed(0)
    return Small()


def test_a_plain_module_runs_without_a_graph(network):
    """Call and ``forward`` keep no graph and answer ordinary tensors, in whatever containers the module returns."""
    wrapped = InferenceModeWrapper(network)
    x = torch.randn(2, 4)
    plain = network(x, scale=3.0)
    assert plain["sample"].grad_fn is not None
    for call in (wrapped, wrapped.forward):
        with saved_bytes() as kept:
            result = call(x, scale=3.0)
        assert kept == [0] and torch.equal(result["sample"], plain["sample"])
        tensors = [result["sample"], *result["rest"][:1], *result["rest"][1]]
        assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)


def test_a_wrapped_module_is_the_module_it_wraps(network):
    """Type checks, attributes, parameters, state dict, ``to``, copies and being a child module all work."""
    wrapped = wrap_model_for_inference(network)
    assert isinstance(wrapped, type(network)) and isinstance(wrapped, torch.nn.Module)
    assert isinstance(wrapped, InferenceModeWrapper)
    assert wrap_model_for_inference(wrapped) is wrapped
    assert wrapped.config is network.config and wrapped.described() == "Small of 8"
    assert list(map(id, wrapped.parameters())) == list(map(id, network.parameters()))
    assert wrapped.to(torch.float64) is wrapped and network.layer.weight.dtype is torch.float64
    assert wrapped.eval() is wrapped and not network.training
    wrapped.note = "kept"
    assert network.note == "kept"
    del wrapped.note
    assert not hasattr(network, "note")
    twin = copy.deepcopy(wrapped)
    twin.load_state_dict(wrapped.state_dict())
    assert isinstance(twin, InferenceModeWrapper) and twin.layer.weight is not network.layer.weight
    parent = torch.nn.Module()
    parent.child = wrapped
    assert list(parent.state_dict()) == [f"child.{name}" for name in network.state_dict()]
    assert parent.half().child is wrapped and network.layer.weight.dtype is torch.float16


def test_training_a_plain_module(network):
    """``train()`` on the wrapper, or an input that requires gradients, keeps the graph; ``eval()`` drops it again."""
    wrapped = wrap_model_for_inference(network)
    x = torch.randn(2, 4)
    assert wrapped(x)["sample"].grad_fn is None
    assert wrapped(x.clone().requires_grad_())["sample"].grad_fn is not None
    assert wrapped.train()(x)["sample"].grad_fn is not None
    assert wrapped.eval()(x)["sample"].grad_fn is None


def test_functions_can_be_wrapped_and_other_things_cannot():
    """Any callable runs in inference mode; what cannot be called is refused by name."""
    modes = []
    assert wrap_model_for_inference(lambda: modes.append(torch.is_inference_mode_enabled()))() is None
    assert modes == [True]
    with pytest.raises(BadRequest, match="NoneType"):
        wrap_model_for_inference(None)
