"""What nodes set on a network: noticed, told apart into what travels and what does not, and put back after a call."""

from __future__ import annotations

import copy

import pytest
import torch

from luna_daemon.comfyui import attributes as module
from luna_daemon.comfyui.attributes import Watch, attributes_set
from luna_daemon.core import BadRequest


@pytest.fixture
def network(monkeypatch):
    """Two layers. What ComfyUI's own patcher notes on a network is played: ``device`` alone."""
    monkeypatch.setattr(module, "_of_patchers", lambda: frozenset({"device"}))
    return torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.ReLU())


def test_nothing_was_set(network):
    watch = Watch(network)
    network.device = "cuda"
    network[0].padding_mode = "zeros"  # its value before
    assert watch.changes() == ({}, [])


def test_plain_values_travel(network):
    watch = Watch(network)
    network[0].padding_mode, network.scale, network[1].device = "circular", (1, 0.5), "cpu"
    assert watch.changes() == (
        {"0": {"padding_mode": "circular"}, "": {"scale": {"$tuple": [1, 0.5]}}, "1": {"device": "cpu"}}, [],
    )  # fmt: skip


def test_a_value_of_another_type_is_a_change(network):
    """``True == 1`` in Python, and not in every layer."""
    network[1].inplace = 0
    watch = Watch(network)
    network[1].inplace = False
    assert watch.changes() == ({"1": {"inplace": False}}, [])


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda net: setattr(net[0], "forward", lambda x: x), "0.forward"),
        (lambda net: setattr(net[0], "extra", torch.ones(1)), "0.extra"),
        (lambda net: setattr(net, "2", torch.nn.ReLU()), "Sequential"),
        (lambda net: net.__setitem__(1, torch.nn.GELU()), "Sequential"),
        (lambda net: net[1].register_forward_hook(lambda *args: None), "1"),
        (lambda net: delattr(net[0], "padding_mode"), "0.padding_mode"),
    ],
    ids=["code", "tensor", "layer", "other layer", "hook", "removed"],
)
def test_what_cannot_travel_is_named(network, change, name):
    watch = Watch(network)
    change(network)
    assert watch.changes() == ({}, [name])


def test_a_copy_of_the_network_shares_its_watch(network):
    watch = Watch(network)
    assert copy.deepcopy(watch) is watch


def test_attributes_are_put_back(network):
    """After the call, after an error, and one that was not there is not there again."""
    with pytest.raises(ZeroDivisionError), attributes_set(network, {"0": {"padding_mode": "circular", "new": 1}}):
        assert (network[0].padding_mode, network[0].new) == ("circular", 1)
        raise ZeroDivisionError
    assert network[0].padding_mode == "zeros" and not hasattr(network[0], "new")


@pytest.mark.parametrize(
    "given, says",
    [
        ({"7": {"x": 1}}, "'x' of '7'"), ({"0": {"a b": 1}}, "'a b'"), ({"0": {"__class__": 1}}, "'__class__'"),
        ({"": {"scale": 1}, "0.x": {"y": 1}}, "'y' of '0.x'"),
    ],
)  # fmt: skip
def test_what_is_not_an_attribute_is_refused(network, given, says):
    """Whatever was set before it is put back."""
    with pytest.raises(BadRequest, match=says), attributes_set(network, given):
        pytest.fail("it was set")
    assert not hasattr(network, "scale")
