"""Patched clones of a text model: the same clone for the same patches, and none with weights of unloaded models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luna_daemon.backends.comfy import text
from luna_daemon.backends.comfy.text import ComfyText
from luna_daemon.wire.messages import PatchUse


class Clip:
    """Counts clones and keeps what is added to each."""

    def __init__(self) -> None:
        self.patcher = SimpleNamespace(model_size=lambda: 7)
        self.added: list[object] = []

    def clone(self) -> Clip:
        return Clip()

    def add_patches(self, patches: object, strength_patch: float, strength_model: float) -> None:
        self.added.append((patches, strength_patch, strength_model))


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(text, "decode_set", lambda patches, weight_of: patches)
    return ComfyText(SimpleNamespace(), Clip())


def no_lender(name):
    return name, []


def test_the_same_patches_give_the_same_clone(model):
    once = model._patched([PatchUse("a", 0.5, 1.0)], no_lender)
    assert once.added == [("a", 0.5, 1.0)]
    assert model._patched([PatchUse("a", 0.5, 1.0)], no_lender) is once
    assert model._patched([PatchUse("a", 0.6, 1.0)], no_lender) is not once
    assert model._patched([], no_lender) is model._clip


def test_the_least_recently_used_clone_goes_first(model):
    uses = [[PatchUse(str(number), 1.0, 1.0)] for number in range(text._MAX_CLONES + 1)]
    clones = [model._patched(use, no_lender) for use in uses[:-1]]
    assert model._patched(uses[0], no_lender) is clones[0]
    model._patched(uses[-1], no_lender)
    assert model._patched(uses[0], no_lender) is clones[0]
    assert model._patched(uses[1], no_lender) is not clones[1]


def test_clones_with_weights_of_an_unloaded_model_are_dropped(model):
    lender, other = object(), object()
    borrowed = model._patched([PatchUse("a", 1.0, 1.0)], lambda name: (name, [lender, model]))
    kept = model._patched([PatchUse("b", 1.0, 1.0)], lambda name: (name, [other, model]))
    model.forget([lender, model])
    assert model._patched([PatchUse("b", 1.0, 1.0)], no_lender) is kept
    assert model._patched([PatchUse("a", 1.0, 1.0)], no_lender) is not borrowed
