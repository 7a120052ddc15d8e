"""What nodes set on a network: noticed, sorted by whether it can be sent, set elsewhere for the time of a call."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch

from luna_daemon.comfyui import attributes
from luna_daemon.comfyui.attributes import Watch, attributes_set
from luna_daemon.core import BadRequest


@pytest.fixture(autouse=True)
def patcher(monkeypatch):
    """ComfyUI's patcher, as far as its source is read: it notes two things on a model."""
    module = types.ModuleType("comfy.model_patcher")
    source = "self.model.device = device\nself.model.model_loaded_weight_memory = 0\nif self.model.other == 1: pass\n"
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.model_patcher", module)
    monkeypatch.setattr(attributes.inspect, "getsource", lambda asked: source if asked is module else "")
    attributes._of_patchers.cache_clear()
    yield
    attributes._of_patchers.cache_clear()


@pytest.fixture
def network():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.Linear(2, 2))


def test_an_untouched_network_has_no_changes(network):
    """Nor has one of which only the patcher notes something, or whose layer was compiled."""
    watch = Watch(network)
    network.device, network.model_loaded_weight_memory = "cpu", 7
    assert watch.changes() == ({}, [])


def test_plain_values_are_sorted_by_layer(network):
    """Tuples are packed as they travel; a value set to what it was is no change."""
    watch = Watch(network)
    network[0].padding_mode, network[0].padding, network[1].in_features = "circular", (1, 1), 2
    network.other = 1
    plain, other = watch.changes()
    assert plain == {"0": {"padding_mode": "circular", "padding": {"$tuple": [1, 1]}}, "": {"other": 1}} and other == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda net: setattr(net[0], "forward", print), "0.forward"),
        (lambda net: setattr(net[1], "scale", torch.ones(1)), "1.scale"),
        (lambda net: net[1].register_forward_hook(lambda *_: None), "1"),
        (lambda net: net.__setitem__(1, torch.nn.ReLU()), "Sequential"),
        (lambda net: delattr(net[0], "padding_mode"), "0.padding_mode"),
    ],
    ids=["code", "a tensor", "a hook", "another layer", "removed"],
)
def test_what_cannot_be_sent_is_named(network, change, named):
    """The caller then computes locally."""
    watch = Watch(network)
    change(network)
    assert watch.changes() == ({}, [named])
    assert copy.deepcopy(watch) is watch


def test_attributes_hold_for_the_block_and_go_afterwards(network):
    """Also when the block fails; a new attribute is removed again."""
    with pytest.raises(ZeroDivisionError), attributes_set(network, {"0": {"padding_mode": "circular", "new": 1}}):
        assert (network[0].padding_mode, network[0].new) == ("circular", 1)
        raise ZeroDivisionError
    assert network[0].padding_mode == "zeros" and not hasattr(network[0], "new")


@pytest.mark.parametrize(
    ("new", "says"),
    [({"7": {"a": 1}}, "no such layer"), ({"0": {"__class__": 1}}, "not a valid"), ({"0": {"a b": 1}}, "not a valid")],
)
def test_wrong_names_are_refused_and_nothing_stays_set(network, new, says):
    """They come from a client."""
    with pytest.raises(BadRequest, match=says), attributes_set(network, {"1": {"kept": 1}, **new}):
        pass
    assert not hasattr(network[1], "kept")
