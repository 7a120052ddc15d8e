"""A network whose compute is elsewhere until it gets its weights."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from luna_daemon.core import ModelError
from luna_daemon.shells.skeleton import Skeleton


class Network(torch.nn.Module):
    """Two layers, one of them with a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.layer.mean = torch.ones(2)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Owner:
    """Puts the weights of ``real`` into the skeleton when they are needed."""

    def __init__(self, real: torch.nn.Module | None) -> None:
        with torch.device("meta"):
            self.network = Network()
        self.real = real
        self.reasons: list[str] = []
        self.skeleton = Skeleton(self.network, {"encode": lambda x: "elsewhere"}, self.needs)

    def needs(self, why: str) -> None:
        self.reasons.append(why)
        if self.real is not None:
            self.skeleton.adopt(self.real)


def test_compute_is_replaced():
    owner = Owner(None)
    assert owner.network.encode(torch.ones(1, 2)) == "elsewhere" and owner.reasons == []


def test_a_layer_that_runs_by_itself_gets_its_weights():
    """In the very modules that the node holds; from then on the network computes by itself."""
    real = Network()
    owner, x = Owner(real), torch.rand(3, 2)
    layer = owner.network.layer
    assert torch.equal(layer(x), real.layer(x)) and owner.reasons == ["Linear runs"]
    assert torch.equal(owner.network.encode(x), real.encode(x)) and owner.network.layer is layer
    assert torch.equal(layer.mean, real.layer.mean) and not owner.network.norm.running_mean.is_meta
    layer(x)
    assert len(owner.reasons) == 1


def test_a_copy_made_before_says_what_to_do():
    owner = Owner(Network())
    duplicate = copy.deepcopy(owner.network.layer)
    with pytest.raises(ModelError, match=r"materialize\(\)"):
        duplicate(torch.ones(1, 2))


def test_a_model_of_another_family_is_refused():
    owner = Owner(torch.nn.Sequential())
    with pytest.raises(ModelError, match="'layer'"):
        owner.network.layer(torch.ones(1, 2))


def test_nothing_keeps_the_network_alive():
    """A network with gigabytes of weights goes when the last user drops it, owner and skeleton or not."""
    owner = Owner(None)
    alive = weakref.ref(owner.network)
    owner.network = None
    gc.collect()
    assert alive() is None and owner.skeleton.network is None
