"""Gateway, pipe, tunnel's search, status text: the logic, with stand-ins for ComfyUI's objects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luna_daemon.core import BadRequest


class Clip:
    """Records what was set and encoded."""

    def __init__(self):
        self.layer, self.texts = None, []

    def clone(self):
        other = Clip()
        other.texts = self.texts
        return other

    def clip_layer(self, layer):
        self.layer = layer

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        self.texts.append((tokens, self.layer))
        return [[tokens, {}]]


@pytest.fixture
def gateway(part, monkeypatch):
    """Runs the node with given changes; LoRAs and caches are recorded instead of applied."""
    module = part("workflow.luna_config_gateway")
    seen = SimpleNamespace(loras=None, cache=None)

    def apply_loras(model, clip, loras):
        seen.loras = loras
        return model, clip

    def cache(model, **options):
        seen.cache = options
        return "cached"

    monkeypatch.setattr(module, "apply_loras", apply_loras)
    monkeypatch.setattr(module, "apply_fb_cache_to_model", cache)
    monkeypatch.setattr(module, "empty_latent", lambda *args: {"samples": args[2:]})

    def run(clip, **changes):
        inputs = {
            "width": 64, "height": 32, "batch_size": 2, "seed": 9, "steps": 4, "cfg": 5.5, "denoise": 0.5,
            "clip_skip": 0, "sampler": "euler", "scheduler": "simple",
        }  # fmt: skip
        return module.LunaConfigGateway().process("model", clip, "vae", **inputs | changes), seen

    return run


def test_the_gateway_hands_everything_on(gateway, part):
    """As a pipe and one by one, in the same order as their names; tags are out of the prompts and in the record."""
    clip = Clip()
    found, seen = gateway(
        clip, positive_prompt="a cat <lora:x:1:0.5>", negative_prompt="dogs", model_name="sub/base.safetensors",
        lora_stack=[("y", 0.25, 0.25)],
    )  # fmt: skip
    assert [lora.name for lora in seen.loras] == ["y", "x"] and seen.cache is None
    assert clip.texts == [("a cat", None), ("dogs", None)]
    node = part("workflow.luna_pipe_out").LunaPipeOut
    parts = dict(zip(node.RETURN_NAMES, node().unpack(found[0])))
    names = part("workflow.luna_config_gateway").LunaConfigGateway.RETURN_NAMES
    alone = dict(zip(names[1:-1], found[1:-1]))
    assert all(parts[name] == value for name, value in alone.items()) and parts["width"] == 64
    metadata = found[-1]
    assert metadata["positive"] == "a cat <lora:x:1:0.5>" and metadata["positive_clean"] == "a cat"
    assert metadata["model"] == "sub/base" and metadata["loras"] == "y:0.25:0.25, x:1:0.5"


@pytest.mark.parametrize("timing", ["before_lora", "after_lora"])
def test_clip_skip_is_set_on_a_clone(gateway, timing):
    """And the caller's CLIP stays as it is."""
    clip = Clip()
    gateway(clip, clip_skip=-2, clip_skip_timing=timing)
    assert [layer for _, layer in clip.texts] == [-2, -2] and clip.layer is None


def test_first_block_cache_is_on_when_asked_for(gateway):
    """With the widgets' values."""
    found, seen = gateway(Clip(), fb_cache_enabled=True, fb_cache_threshold=0.3, fb_cache_end=0.9)
    assert found[1] == "cached" and seen.cache["residual_diff_threshold"] == 0.3 and seen.cache["end"] == 0.9


def test_what_the_gateway_cannot_do_is_said(gateway):
    """No CLIP, and what is not served."""
    with pytest.raises(BadRequest, match="clip is empty"):
        gateway(None)
    with pytest.raises(BadRequest, match="vision_embed is not served"):
        gateway(Clip(), vision_embed={"embedding": 1})


def test_a_pipe_of_another_kind_is_refused(part):
    """By its length."""
    with pytest.raises(BadRequest, match="not a pipe"):
        part("workflow.luna_pipe_out").LunaPipeOut().unpack(("model", "clip"))


class Prompt:
    def __init__(self, **nodes):
        self.nodes = nodes

    def get_node(self, number):
        return dict(zip(("class_type", "inputs"), self.nodes[number]))


def test_files_are_found_by_following_the_workflow(part, comfyui):
    """Back through LoRA loaders to the stock loader's widgets."""
    find = part("loaders.origins").find_origin
    prompt = Prompt(
        k=("CheckpointLoaderSimple", {"ckpt_name": "base.safetensors"}),
        l=("LoraLoader", {"model": ["k", 0], "clip": ["k", 1]}),
        d=("DualCLIPLoader", {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_g.safetensors", "type": "sdxl"}),
        v=("VAELoader", {"vae_name": "taesd"}), p=("VAELoader", {"vae_name": "pixel_space"}),
        w=("VAELoader", {"vae_name": ["x", 0]}), g=("VAELoader", {"vae_name": "gone"}), o=("SomeOther", {}),
        t=("T", {"a": ["l", 1], "b": ["d", 0], "c": ["v", 0], "d": ["p", 0], "e": ["w", 0], "f": ["g", 0],
                 "g": ["o", 0], "h": "text"}),
    )  # fmt: skip
    found = {widget: find(prompt, "t", widget) for widget in "abcdefghi"}
    assert found["a"].files == (str(comfyui.models / "checkpoints/base.safetensors"),) and found["a"].checkpoint
    assert [file.rsplit("/", 1)[1] for file in found["b"].files] == ["clip_l.safetensors", "clip_g.safetensors"]
    assert found["b"].family == "sdxl" and len(found["c"].files) == 2
    assert all(found[widget] is None for widget in "defghi")


def test_a_loop_of_nodes_ends(part):
    """Even one that ComfyUI would not run."""
    prompt = Prompt(a=("LoraLoader", {"clip": ["a", 1]}))
    assert part("loaders.origins").find_origin(prompt, "a", "clip") is None


@pytest.fixture
def two_encoders(tmp_path):
    """A network of two encoders whose files name their tensors alike, and the files."""
    import torch
    from safetensors.torch import save_file

    generator, state, files = torch.Generator().manual_seed(0), {}, []
    for part, width in (("clip_l", 4), ("clip_g", 6)):
        own = {f"text_model.layers.{n}.bias": torch.randn(width, generator=generator) for n in range(3)}
        files.append(str(tmp_path / f"{part}.safetensors"))
        save_file(own, files[-1])
        state |= {f"{part}.transformer.{name}": value.half() for name, value in own.items()}
    state["clip_l.logit_scale"] = torch.tensor(4.6)
    return SimpleNamespace(model=SimpleNamespace(state_dict=lambda: state), backup={}), files, state


def test_contents_are_compared_whatever_the_precision(part, two_encoders):
    """All of it there; one file of two is not enough; a changed weight differs, unless it is a LoRA's."""
    contents = part("loaders.contents")
    patcher, files, state = two_encoders
    assert contents.is_whole(patcher, files) and not contents.differs(patcher, files)
    assert not contents.is_whole(patcher, files[:1]) and not contents.differs(patcher, files[:1])
    assert not contents.is_whole(patcher, [__file__, "absent"])
    name = "clip_g.transformer.text_model.layers.1.bias"
    before, state[name] = state[name], state[name] + 1
    assert contents.differs(patcher, files) and not contents.is_whole(patcher, files)
    patcher.backup[name] = SimpleNamespace(weight=before)
    assert not contents.differs(patcher, files) and contents.is_whole(patcher, files)


def test_patches_are_taken_along_in_their_order(part):
    """Each key's in its order, together what has one strength: as few sets as the LoRAs were."""
    order = part("loaders.luna_checkpoint_tunnel")._in_order
    patches = {
        "a": [(1.0, "A1", 1.0, None, None), (0.5, "A2", 1.0, None, None)],
        "b": [(1.0, "B1", 1.0, (0, 0, 4), None), (0.5, "B2", 1.0, None, "f")],
        "c": [(0.5, "C2", 1.0, None, None)],
    }
    assert list(order(patches)) == [
        ({"a": "A1", ("b", (0, 0, 4)): "B1"}, 1.0, 1.0), ({"c": "C2"}, 0.5, 1.0),
        ({"a": "A2", ("b", None, "f"): "B2"}, 0.5, 1.0),
    ]  # fmt: skip
    assert list(order({})) == []


def test_status_text_says_what_is_there(part):
    """In words, with sizes; without workers too."""
    info = {
        "version": "1.2", "status": "running", "pid": 7, "backend": "comfy", "transport": "shared memory",
        "clients": [1, 2], "queue": {"waiting": 3}, "requests": {"vae.encode": 4}, "fallbacks": 1, "materialised": 0,
        "workers": [{"number": 1, "device": "cpu", "state": "idle", "models": {"vae:x": 3 << 29}}],
    }  # fmt: skip
    text = part("system.luna_daemon_status").status_text(info)
    for words in (
        "1.2, running, process 7",
        "shared memory; 2 clients; 3 requests",
        "vae.encode 4",
        "vae:x (1.50 GiB)",
    ):
        assert words in text
    assert "nothing is loaded" in part("system.luna_daemon_status").status_text({**info, "workers": [], "requests": {}})
