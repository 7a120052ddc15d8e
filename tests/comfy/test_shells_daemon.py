"""Shells on a real daemon whose worker runs ComfyUI: every result is the local one, bit for bit.

An equality that a local model answered proves nothing, so each test reads the daemon's counters: its requests rose, no
fallback, no weights loaded here.
"""

from __future__ import annotations

import os
import sys

import pytest

from luna_daemon.core import RequestCancelled
from luna_daemon.shells.build import make_clip, make_from_checkpoint, make_vae
from tests.comfy.shell_helpers import DEMO_VAE, ROOT
from tests.integration.conftest import daemons_below

COMFYUI_PATH = os.environ.get("COMFYUI_PATH", "")
pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def running(tmp_path_factory, comfy, checkpoint):
    """A daemon with ComfyUI's interpreter and as many threads as this process."""
    patch = pytest.MonkeyPatch()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        patch.setenv(name, str(comfy.torch.get_num_threads()))
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        yield start(
            backend="comfy", comfyui_path=COMFYUI_PATH, comfyui_python=sys.executable,
            model_dirs=os.pathsep.join(map(str, (DEMO_VAE.parent, ROOT / "build" / "models", checkpoint.parent))),
        )  # fmt: skip
    patch.undo()


def computed(info):
    """Requests that were about a model."""
    return sum(count for op, count in info["requests"].items() if op in ("vae.encode", "vae.decode", "clip.encode"))


@pytest.fixture
def served(running):
    """How many requests the daemon answered in the test; fails if anything was computed here."""
    before = running.info()

    def count():
        info = running.info()
        assert info["fallbacks"] == before["fallbacks"] and info["materialised"] == before["materialised"]
        return computed(info) - computed(before)

    return count


@pytest.fixture
def vae(running, inference):
    return make_vae([DEMO_VAE], client=running.client())


@pytest.fixture
def clip(running, clip_l, inference):
    return make_clip([clip_l], "stable_diffusion", client=running.client())


def random(stock, *shape, seed=0):
    return stock.torch.rand(*shape, generator=stock.torch.Generator().manual_seed(seed))


def equal(stock, found, expected):
    return all(stock.torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_vae(stock, vae, local_vae, served):
    """encode, decode, batch, odd sizes, tiles, the network alone."""
    image, latent = random(stock, 1, 71, 90, 3), random(stock, 1, 16, 24, 32) * 4 - 2
    batch = random(stock, 3, 64, 64, 3)
    tiles = {"tile_x": 16, "tile_y": 16, "overlap": 4}
    for name, given, options in (
        ("encode", image, {}), ("decode", latent, {}),
        ("encode_tiled", image, {"tile_x": 64, "tile_y": 64, "overlap": 16}), ("decode_tiled", latent, tiles),
    ):  # fmt: skip
        found, expected = (getattr(each, name)(given, **options) for each in (vae, local_vae))
        assert stock.torch.equal(found, expected), name
        assert found.stride() == expected.stride(), name  # else the next node may compute other bits from it
        assert found.dtype == stock.torch.float32 and found.mul_(2) is found
    single = [local_vae.encode(batch[number : number + 1]) for number in range(3)]
    assert stock.torch.equal(vae.encode(batch), stock.torch.cat(single))
    latents = stock.torch.cat([latent, latent / 2])
    assert vae.decode(latents).stride() == local_vae.decode(latents).stride()
    network, given = local_vae.first_stage_model, latent.to(vae.vae_dtype)
    assert stock.torch.equal(vae.first_stage_model.decode(given), network.decode(given))
    assert served() >= 6


def test_clip(stock, clip, local_clip, served):
    """Plain, weighted, several chunks, clip skip, unprojected pooled, an embedding among the tokens."""
    for prompt in ("a cat", "a (cat:1.3), [dog]", "(start:1.2) " + "word " * 90):
        for layer in (None, -2):
            for pooled in (True, "unprojected"):
                results = []
                for each in (clip.clone(), local_clip.clone()):
                    each.clip_layer(layer)
                    results.append(each.encode_from_tokens(each.tokenize(prompt), return_pooled=pooled))
                assert equal(stock, *results), (prompt[:20], layer, pooled)
    tokens = clip.tokenize("a cat")
    tokens["l"][0][2] = (random(stock, 768), 1.1)
    results = [each.encode_from_tokens(tokens, return_pooled=True) for each in (clip, local_clip.clone())]
    assert equal(stock, *results) and served() >= 13


def test_a_checkpoint(stock, checkpoint, running, inference, served):
    """CLIP and VAE inside one file, each as ComfyUI's checkpoint loader gives them."""
    clip, vae = make_from_checkpoint(checkpoint, client=running.client())
    _, real_clip, real_vae, _ = stock.sd.load_checkpoint_guess_config(str(checkpoint), output_model=False)
    assert type(clip).__name__ == "DaemonCLIP" and type(vae).__name__ == "DaemonVAE"
    assert clip.cond_stage_model.state_dict().keys() == real_clip.cond_stage_model.state_dict().keys()
    assert all(value.is_meta or value.numel() < 20 for value in clip.cond_stage_model.state_dict().values())
    results = [each.encode_from_tokens(each.tokenize("a (cat:1.3)"), return_pooled=True) for each in (clip, real_clip)]
    assert equal(stock, *results)
    latent = random(stock, 1, 16, 8, 12)
    assert stock.torch.equal(vae.decode(latent), real_vae.decode(latent)) and served() == 2


def test_one_encoder(stock, clip, local_clip, served):
    results = []
    for each in (clip.clone(), local_clip.clone()):
        each.cond_stage_model.reset_clip_options()
        each.cond_stage_model.set_clip_options({"layer": -3})
        each.load_model()
        results.append(each.cond_stage_model.clip_l.encode_token_weights(each.tokenize("a (cat:1.3)")["l"]))
        each.cond_stage_model.reset_clip_options()
    assert equal(stock, *results) and served() >= 1


def test_loras(stock, clip, local_clip, make_lora, served):
    """One, two in both orders, at other strengths; the shared weights are untouched afterwards."""
    plain = clip.encode("a cat")
    first, second = make_lora(1), make_lora(2)
    for stack in ([(first, 1.0)], [(first, 0.5), (second, 1.0)], [(second, 1.0), (first, 0.5)], [(first, 1.0)]):
        results = []
        for each in (clip, local_clip.clone()):
            for lora, strength in stack:
                _, each = stock.sd.load_lora_for_models(None, each, dict(lora), 1.0, strength)
            results.append(each.encode_from_tokens(each.tokenize("a (cat:1.2)"), return_pooled=True))
        assert equal(stock, *results)
    assert stock.torch.equal(clip.encode("a cat"), plain) and served() >= 6


def test_hooks(stock, clip, local_clip, make_lora, served):
    """A schedule of three keyframes on top of a LoRA, twice."""
    results = []
    for each in (clip.clone(), local_clip.clone()):
        each.add_patches(stock.lora.load_lora(make_lora(3), stock.lora.model_lora_keys_clip(each.cond_stage_model, {})))
        group = stock.hooks.create_hook_lora(make_lora(1), 1.0, 0.8)
        frames = stock.hooks.HookKeyframeGroup()
        for percent, strength in ((0.0, 1.0), (0.4, 0.5), (0.8, 0.0)):
            frames.add(stock.hooks.HookKeyframe(strength=strength, start_percent=percent))
        group.set_keyframes_on_hooks(frames)
        each.patcher.forced_hooks, each.use_clip_schedule = group.clone(), True
        target = stock.hooks.create_target_dict(stock.hooks.EnumWeightTarget.Clip)
        each.patcher.register_all_hook_patches(group, target)
        for _ in range(2):
            results.append([entry[0] for entry in each.encode_from_tokens_scheduled(each.tokenize("a (cat:1.2)"))])
    assert equal(stock, results[0], results[2]) and equal(stock, results[1], results[3])
    assert not stock.torch.equal(results[0][0], results[0][1]) and served() >= 3
    assert stock.torch.equal(clip.encode("a cat"), local_clip.clone().encode("a cat"))


def test_a_merge(stock, clip, local_clip, clip_l, running, served):
    """The other one's weights are uploaded as patches."""
    other = local_clip.clone()
    results = []
    for each in (clip.clone(), local_clip.clone()):
        for key, entries in other.get_key_patches().items():
            if not key.endswith((".position_ids", ".logit_scale", "text_projection.weight")):
                each.add_patches({key: entries}, 0.25, 0.7)
        results.append(each.encode_from_tokens(each.tokenize("a cat"), return_pooled=True))
    assert equal(stock, *results) and served() >= 1


def test_an_interrupt_ends_the_waiting(stock, clip):
    """With ComfyUI's own exception."""
    stock.management.interrupt_current_processing()
    with pytest.raises((stock.management.InterruptProcessingException, RequestCancelled)):
        for number in range(50):
            clip.encode(f"prompt {number} " + "word " * 300)


def test_killed_and_back(stock, clip_l, local_clip, local_vae, tmp_path, inference, make_lora, caplog):
    """The daemon ends: the prompt finishes here. A new one on the same port: it is used again, and told."""
    settings = {
        "backend": "comfy", "comfyui_path": COMFYUI_PATH, "comfyui_python": sys.executable,
        "model_dirs": os.pathsep.join([str(DEMO_VAE.parent), str(clip_l.parent)]),
    }  # fmt: skip
    latent = random(stock, 1, 16, 8, 8)
    with daemons_below(tmp_path) as start:
        first = start(**settings)
        client = first.client()
        vae = make_vae([DEMO_VAE], client=client)
        assert stock.torch.equal(vae.decode(latent), local_vae.decode(latent))
        first.expected_to_die = True
        first.process.kill()
        first.process.wait()
        assert stock.torch.equal(vae.decode(latent), local_vae.decode(latent))
        assert client.fallbacks == 1 and caplog.text.count("steps in") == 1
        second = start(port=first.port, **settings)
        assert stock.torch.equal(vae.decode(latent), local_vae.decode(latent))
        assert second.info()["fallbacks"] == 1 and "is back" in caplog.text
