"""The router: what comes from which file, what the status says, and the two nodes that ask the daemon."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luna_daemon.core import DaemonConnectionError, ModelLoadError

INPUTS = {
    "model_source": "checkpoints", "model_name": "base.safetensors", "model_type": "SDXL", "dynamic_precision": "None",
    "clip_1": "None", "clip_2": "None", "clip_3": "None", "clip_4": "None", "vae_name": "None", "daemon_mode": "auto",
}  # fmt: skip


@pytest.fixture
def route(part, comfyui, monkeypatch):
    """Runs the node with changed inputs; loading is noted instead of done."""
    module = part("loaders.luna_model_router")
    models, made = module.models, SimpleNamespace(running=True, carried=("its clip", "its vae"))
    monkeypatch.setattr(models, "check_mode", lambda mode: made.running and mode != "force_local")
    monkeypatch.setattr(models, "load_clip", lambda paths, family, mode: (family, len(paths), mode))
    monkeypatch.setattr(models, "load_vae", lambda name, mode: f"vae {name} {mode}")
    monkeypatch.setattr(models, "load_from_checkpoint", lambda path, mode: made.carried)
    monkeypatch.setattr(module, "load_diffusion", lambda source, name, precision: f"model {name} {precision}")

    def run(**changes):
        names = ("model", "clip", "vae", "llm", "clip_vision", "model_name", "status")
        return SimpleNamespace(**dict(zip(names, module.LunaModelRouter().load(**INPUTS | changes)))), made

    run.made = made
    return run


def test_a_checkpoint_gives_all_three(route):
    """Where no other file is chosen; the other outputs are empty and say why."""
    outputs, _ = route()
    assert (outputs.model, outputs.clip, outputs.vae) == ("model base.safetensors None", "its clip", "its vae")
    assert outputs.model_name == "base"
    assert (
        outputs.status
        == "[SDXL] daemon | MODEL: base.safetensors | CLIP: from the checkpoint | VAE: from the checkpoint"
    )
    with pytest.raises(AttributeError, match="language models are not served"):
        outputs.llm.generate()


def test_chosen_files_come_first(route):
    """Text encoders in the type's order, the VAE by name; the mode goes with each."""
    outputs, _ = route(
        clip_1="clip_l.safetensors", clip_2="clip_g.safetensors", vae_name="sdxl.safetensors",
        dynamic_precision="fp16", daemon_mode="force_local",
    )  # fmt: skip
    assert outputs.clip == ("sdxl", 2, "force_local") and outputs.vae == "vae sdxl.safetensors force_local"
    assert outputs.status == (
        "[SDXL] local | MODEL: base.safetensors as fp16 | CLIP: clip_l.safetensors, clip_g.safetensors | "
        "VAE: sdxl.safetensors"
    )
    outputs, _ = route(vae_name="sdxl.safetensors")
    assert (outputs.clip, outputs.vae) == ("its clip", "vae sdxl.safetensors auto")


def test_what_is_not_there_is_said(route):
    """An absent daemon, a model that is not chosen, a VAE that nothing carries, encoders that nothing carries."""
    route.made.running = False
    encoders = {"clip_1": "clip_l.safetensors", "clip_2": "clip_g.safetensors"}
    outputs, _ = route(model_name="None", **encoders)
    assert "daemon away, local models step in" in outputs.status and "VAE: none" in outputs.status
    for output, why in ((outputs.model, "no model_name is chosen"), (outputs.vae, "no checkpoint carries a VAE")):
        with pytest.raises(TypeError, match=why):
            output()
    assert outputs.model_name == ""
    route.made.carried = (None, "its vae")
    with pytest.raises(ModelLoadError, match="carries no text encoders"):
        route()


@pytest.fixture
def away(part, monkeypatch):
    """Nodes that ask a client which finds no daemon."""

    def refuse(*_):
        raise DaemonConnectionError("no daemon at 1.2.3.4:5")

    for name in ("luna_daemon_status", "luna_free_models"):
        client = SimpleNamespace(get_daemon_info=refuse, unload=refuse)
        monkeypatch.setattr(part(f"system.{name}"), "get_client", lambda client=client: client)


def test_nodes_about_the_daemon_do_not_fail_without_one(pack, away, caplog):
    """The status is a text that says so; the value passes through, with a warning."""
    shown = pack.NODE_CLASS_MAPPINGS["LunaDaemonStatus"]().status(after=3)
    text, running = shown["result"]
    assert not running and text.startswith("no daemon answers: no daemon at 1.2.3.4:5")
    assert shown["ui"]["text"] == [text]
    value = object()
    assert pack.NODE_CLASS_MAPPINGS["LunaFreeModels"]().free(value) == (value,)
    assert "were not unloaded: no daemon at 1.2.3.4:5" in caplog.text
