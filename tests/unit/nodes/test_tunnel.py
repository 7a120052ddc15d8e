"""The tunnel: what is replaced by the daemon's object, and what passes unchanged, with which warning."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luna_daemon.core import ModelLoadError


class Network:
    """As a model's network: tensors by name, of which only the shapes count."""

    def __init__(self, *shape):
        self.shape = shape

    def state_dict(self):
        return {"weight": SimpleNamespace(shape=self.shape)}


class Other(Network):
    pass


def vae(network=None, **patcher):
    """An object as a stock VAE loader gives it."""
    network = network or Network(4)
    state = {"model": network, "object_patches": {}, "hook_patches": {}, "forced_hooks": None}
    return SimpleNamespace(first_stage_model=network, patcher=SimpleNamespace(**state | patcher))


@pytest.fixture
def tunnel(part, monkeypatch):
    """Runs the node on a VAE whose file is known from the workflow, unknown, or changed since."""
    module, origins = part("loaders.luna_checkpoint_tunnel"), part("loaders.origins")

    def run(original, made=None, known=True, changed=False, candidates=()):
        def vae_of(files, checkpoint):
            if isinstance(made, Exception):
                raise made
            return made

        monkeypatch.setattr(module.models, "vae_of", vae_of)
        monkeypatch.setattr(module, "find_origin", lambda *_: origins.Origin(("the file",)) if known else None)
        monkeypatch.setattr(module, "find_by_contents", lambda *_: [origins.Origin((name,)) for name in candidates])
        monkeypatch.setattr(module, "differs", lambda *_: changed)
        model, clip, replaced = module.LunaCheckpointTunnel().tunnel("model", None, original, "workflow", "7")
        assert (model, clip) == ("model", None)
        return replaced

    return run


def test_a_vae_of_a_known_file_is_replaced(tunnel, caplog):
    """By the workflow, or by the weights, where another kind of loader made the object."""
    made = vae()
    assert tunnel(vae(), made) is made
    assert tunnel(vae(), made, known=False, candidates=["another file"]) is made
    assert not caplog.records


def test_what_is_the_daemons_already_passes_without_a_word(tunnel, caplog):
    """So does an object without anything inside."""
    network = Network(4)
    network.luna = True
    for original in (vae(network), SimpleNamespace()):
        assert tunnel(original, vae()) is original
    assert not caplog.records


@pytest.mark.parametrize(
    ("original", "options", "why"),
    [
        (vae(object_patches={"x": 1}), {}, "a node has added code or hooks"),
        (vae(hook_patches={"x": 1}), {}, "a node has added code or hooks"),
        (vae(), {"changed": True}, "the file has changed since it was loaded"),
        (vae(), {"known": False}, "none of ComfyUI's model files"),
        (vae(), {"made": ModelLoadError("no VAE inside")}, "no VAE inside"),
        (vae(), {"made": vae(Network(5))}, "the file makes a Network that differs from the Network"),
        (vae(), {"made": vae(Other(4))}, "the file makes a Other that differs from the Network"),
    ],
)
def test_what_cannot_be_matched_passes_with_a_warning(tunnel, caplog, original, options, why):
    """The warning names the reason."""
    assert tunnel(original, **{"made": vae(), **options}) is original
    assert len(caplog.records) == 1 and f"the tunnel passes vae unchanged: {why}" in caplog.text


def test_patches_and_settings_go_along(part):
    """LoRAs and clip skip of the stock CLIP are on the daemon's."""
    take_along = part("loaders.luna_checkpoint_tunnel").take_along
    added = []
    clip = SimpleNamespace(layer_idx=None, add_patches=lambda *patch: added.append(patch))
    patches = {"a": [(0.5, "A", 1.0, None, None)]}
    original = SimpleNamespace(layer_idx=-2, use_clip_schedule=True, patcher=SimpleNamespace(patches=patches))
    assert take_along(original, clip) is clip
    assert clip.layer_idx == -2 and clip.use_clip_schedule and added == [({"a": "A"}, 0.5, 1.0)]
