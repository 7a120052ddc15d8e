"""Stock nodes driven with shells on a real daemon: each result is that of the stock objects, bit for bit.

Each test reads the daemon's counters: who computed, what stepped in, what was loaded here.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import SimpleNamespace

import pytest

from luna_daemon.shells.build import make_clip, make_vae
from tests.comfy.shell_helpers import DEMO_VAE
from tests.comfy.test_nodes import make_tiny_sd3
from tests.integration.conftest import ROOT, daemons_below

pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("inference")]

LORAS = ["stock_nodes_0.safetensors", "stock_nodes_1.safetensors", "stock_nodes_2.safetensors"]
"""Each of other content: the daemon keeps what one test has uploaded."""
PROMPT = "a lighthouse, (storm:1.3), oil painting"
MODULES = ("nodes", "comfy_extras.nodes_clip_sdxl", "comfy_extras.nodes_hooks", "comfy_extras.nodes_model_merging",
           "comfy_extras.nodes_sd3")  # fmt: skip


@pytest.fixture(scope="module")
def node(stock) -> SimpleNamespace:
    """ComfyUI's node classes by name."""
    modules = [vars(importlib.import_module(name)) for name in MODULES]
    return SimpleNamespace(**{key: value for module in modules for key, value in module.items()})


@pytest.fixture(scope="module")
def folders(stock, tmp_path_factory):
    """ComfyUI's folders: LoRAs among its files, and a place for what nodes save."""
    paths, folder = importlib.import_module("folder_paths"), tmp_path_factory.mktemp("stock")
    for seed, name in enumerate(LORAS):
        stock.utils.save_torch_file(_lora(stock.torch, seed), str(folder / name))
    paths.add_model_folder_path("loras", str(folder))
    before = paths.get_output_directory()
    paths.set_output_directory(str(folder))
    yield folder
    paths.set_output_directory(before)


def _lora(torch, seed):
    """A small one for CLIP-L."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for layer in (3, 9):
        key = f"text_encoders.clip_l.transformer.text_model.encoder.layers.{layer}.mlp.fc1"
        state[f"{key}.lora_up.weight"] = torch.randn(3072, 4, generator=generator) * 0.2
        state[f"{key}.lora_down.weight"] = torch.randn(4, 768, generator=generator) * 0.2
        state[f"{key}.alpha"] = torch.tensor(4.0)
    return state


@pytest.fixture(scope="module")
def daemon(stock, clip_l, tmp_path_factory):
    """A daemon whose workers run this ComfyUI, with as many threads as this process; no prompt is remembered."""
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        yield start(
            backend="comfy", comfyui_path=os.environ["COMFYUI_PATH"],
            comfyui_python=os.environ.get("COMFYUI_PYTHON") or sys.executable,
            model_dirs=os.pathsep.join(map(str, (DEMO_VAE.parent, clip_l.parent))), cpu_threads=1, max_vae_workers=1,
            max_clip_workers=1, conditioning_cache_mb=0,
        )  # fmt: skip


class Counts:
    """What the daemon has counted since the test began."""

    def __init__(self, daemon) -> None:
        self._daemon, self._before = daemon, daemon.info()

    def __call__(self) -> dict[str, int]:
        """Requests about models, and what was done without the daemon; nothing that is zero."""
        info = self._daemon.info()
        found = {op: info["requests"].get(op, 0) - self._before["requests"].get(op, 0) for op in OPS}
        found |= {name: info[name] - self._before[name] for name in ("fallbacks", "materialised")}
        return {name: count for name, count in found.items() if count}


OPS = ("vae.encode", "vae.decode", "clip.encode", "clip.patch")


@pytest.fixture
def counts(daemon) -> Counts:
    return Counts(daemon)


@pytest.fixture
def vae(daemon):
    return make_vae([DEMO_VAE], client=daemon.client())


@pytest.fixture
def clip(daemon, clip_l):
    return make_clip([clip_l], "stable_diffusion", client=daemon.client())


def random(stock, *shape, seed=0):
    return stock.torch.rand(*shape, generator=stock.torch.Generator().manual_seed(seed))


def same(stock, mine, theirs) -> bool:
    """Whether two conditionings are equal: tensors bit for bit, settings by value, hooks by their number."""
    return len(mine) == len(theirs) and all(
        stock.torch.equal(a, b) and _same_settings(stock, first, second)
        for (a, first), (b, second) in zip(mine, theirs)
    )


def _same_settings(stock, mine, theirs) -> bool:
    for key in mine.keys() | theirs.keys():
        a, b = mine.get(key), theirs.get(key)
        if key == "hooks":
            a, b = len(a.hooks), len(b.hooks)
        if not (stock.torch.equal(a, b) if hasattr(a, "untyped_storage") else a == b):
            return False
    return True


# --- VAE ----------------------------------------------------------------------------------------------------------


def test_vae_encode_for_inpaint(stock, node, vae, local_vae, counts):
    """The masked picture's latents and the noise mask are the stock VAE's; one request."""
    image, mask = random(stock, 1, 72, 96, 3), random(stock, 1, 72, 96, seed=1).round()
    mine, theirs = (node.VAEEncodeForInpaint().encode(each, image, mask, 6)[0] for each in (vae, local_vae))
    assert mine.keys() == theirs.keys() and all(stock.torch.equal(mine[key], theirs[key]) for key in mine)
    assert counts() == {"vae.encode": 1}


def test_vae_decode_tiled(stock, node, vae, local_vae, counts):
    """Tile sizes and overlaps in pixels come out as the stock VAE's tiles; one request for all of them."""
    latent = {"samples": random(stock, 1, 16, 24, 32) * 4 - 2}
    for tile, overlap in ((64, 16), (128, 32)):
        mine, theirs = (node.VAEDecodeTiled().decode(each, latent, tile, overlap)[0] for each in (vae, local_vae))
        assert mine.shape == theirs.shape and stock.torch.equal(mine, theirs)
    assert counts() == {"vae.decode": 2}


def test_kl_vae(stock, node, daemon, counts):
    """SDXL's KL VAE at its real size: what the stock VAE makes of each picture by itself, in one request a batch."""
    path = ROOT / "build" / "models" / "sdxl_vae.safetensors"
    if not path.exists():
        pytest.skip("build/models/sdxl_vae.safetensors is not there: 'make bench' makes it")
    shell, real = make_vae([path], client=daemon.client()), stock.sd.VAE(sd=stock.utils.load_torch_file(str(path)))
    images, latents = random(stock, 2, 64, 48, 3), random(stock, 2, 4, 8, 6) * 4 - 2
    found = (
        node.VAEEncode().encode(shell, images)[0]["samples"],
        node.VAEDecode().decode(shell, {"samples": latents})[0],
    )
    for mine, work, given in ((found[0], real.encode, images), (found[1], real.decode, latents)):
        assert stock.torch.equal(mine, stock.torch.cat([work(given[i : i + 1]) for i in range(2)]))
        assert (mine - work(given)).abs().max() < 1e-4, "a stock batch differs by rounding only"
    assert counts() == {"vae.encode": 1, "vae.decode": 1}


def test_vae_save(stock, node, folders, vae, local_vae, counts):
    """The file is the stock one; it needs true weights, which are loaded here once."""
    files = []
    for name, each in (("vae_mine", vae), ("vae_theirs", local_vae)):
        node.VAESave().save(each, name)
        files += folders.glob(f"{name}*.safetensors")
    mine, theirs = (stock.utils.load_torch_file(str(file)) for file in files)
    assert mine.keys() == theirs.keys() and all(stock.torch.equal(mine[key], theirs[key]) for key in mine)
    assert counts() == {"materialised": 1}


# --- text encoders ------------------------------------------------------------------------------------------------


def test_clip_set_last_layer(stock, node, clip, local_clip, counts):
    """Clip skip on a clone; the other clones keep the last layer."""
    found = []
    for each in (clip, local_clip.clone()):
        skipped = node.CLIPSetLastLayer().set_last_layer(each, -3)[0]
        assert type(skipped) is type(each) and each.layer_idx is None
        found.append([node.CLIPTextEncode().encode(one, PROMPT)[0] for one in (skipped, each)])
    assert all(same(stock, *pair) for pair in zip(*found)) and not same(stock, *found[0])
    assert counts() == {"clip.encode": 2}


def test_conditioning_combine(stock, node, clip, local_clip, counts):
    """Two prompts in one conditioning, in their order."""
    found = []
    for each in (clip, local_clip.clone()):
        one, two = (node.CLIPTextEncode().encode(each, text)[0] for text in (PROMPT, "two foxes"))
        found.append(node.ConditioningCombine().combine(one, two)[0])
    assert len(found[0]) == 2 and same(stock, *found) and counts() == {"clip.encode": 2}


def test_lora_loader(stock, node, folders, clip, local_clip, counts):
    """A LoRA by the stock loader is uploaded once, and never seen by who has not asked for it."""
    plain, found = [], []
    for each in (clip, local_clip.clone()):
        model, patched = node.LoraLoader().load_lora(None, each, LORAS[0], 0.0, 0.8)
        assert model is None and type(patched) is type(each) and patched.patcher.patches
        found.append([node.CLIPTextEncode().encode(patched, text)[0] for text in (PROMPT, "two foxes")])
        plain.append(node.CLIPTextEncode().encode(each, PROMPT)[0])
    assert all(same(stock, *pair) for pair in zip(*found)) and same(stock, *plain)
    assert not same(stock, found[0][0], plain[0])
    assert counts() == {"clip.encode": 3, "clip.patch": 1}


def test_clip_merge_simple(stock, node, folders, clip, local_clip, clip_l, daemon, counts):
    """The second CLIP's weights are named, its LoRA uploaded; the daemon merges them, the first CLIP stays clean."""
    other = make_clip([clip_l], "stable_diffusion", client=daemon.client())
    found = []
    for first, second in ((clip, other), (local_clip.clone(), local_clip.clone())):
        second = node.LoraLoader().load_lora(None, second, LORAS[0], 0.0, 0.8)[1]
        merged = node.CLIPMergeSimple().merge(first, second, 0.4)[0]
        found.append([node.CLIPTextEncode().encode(each, PROMPT)[0] for each in (merged, first)])
    assert all(same(stock, *pair) for pair in zip(*found)) and not same(stock, *found[0])
    assert counts() == {"clip.encode": 2, "clip.patch": 1}


def test_clip_save(stock, node, folders, clip, local_clip, counts):
    """The file is the stock one, LoRA applied; it needs true weights, which are loaded here once."""
    states = []
    for name, each in (("mine", clip), ("theirs", local_clip.clone())):
        patched = node.LoraLoader().load_lora(None, each, LORAS[0], 0.0, 0.8)[1]
        node.CLIPSave().save(patched, name)
        (file,) = folders.glob(f"{name}*.safetensors")
        states.append(stock.utils.load_torch_file(str(file)))
    mine, theirs = states
    assert mine.keys() == theirs.keys()
    # The encoder's file has no text projection: ComfyUI leaves what was in memory there, another each time.
    assert all(stock.torch.equal(mine[key], theirs[key]) for key in mine if key != "text_projection.weight")
    assert counts() == {"materialised": 1}


def test_checkpoint_save(stock, node, folders, vae, local_vae, clip_l, daemon, counts):
    """One file of a model, text encoders with a LoRA, and VAE: the stock one; both shells load their weights once."""
    make_tiny_sd3(stock, folders / "tiny_sd3.safetensors")
    model = stock.sd.load_diffusion_model(str(folders / "tiny_sd3.safetensors"))
    states = []
    clips = (
        make_clip([clip_l], "sd3", client=daemon.client()),
        stock.sd.load_clip([str(clip_l)], clip_type=stock.sd.CLIPType.SD3),
    )
    for name, clip, each in zip(("whole_mine", "whole_theirs"), clips, (vae, local_vae)):
        patched = node.LoraLoader().load_lora(None, clip, LORAS[0], 0.0, 0.8)[1]
        node.CheckpointSave().save(model, patched, each, name)
        (file,) = folders.glob(f"{name}*.safetensors")
        states.append(stock.utils.load_torch_file(str(file)))
    mine, theirs = states
    assert mine.keys() == theirs.keys() and {key.split(".")[0] for key in mine} >= {"model", "first_stage_model"}
    same = [key for key in mine if stock.torch.equal(mine[key], theirs[key])]
    assert {key for key in mine if key not in same} <= {"text_encoders.clip_l.transformer.text_projection.weight"}
    assert counts() == {"materialised": 2}


@pytest.mark.parametrize("schedule", [False, True])
def test_set_clip_hooks(stock, node, folders, clip, local_clip, counts, schedule):
    """A LoRA as a hook, with keyframes: one conditioning per range, computed by the daemon; the CLIP stays clean."""
    found, plain = [], []
    for each in (clip, local_clip.clone()):
        hooks = node.CreateHookLora().create_hook(LORAS[1 + schedule], 0.0, 0.8)[0]
        frames = node.CreateHookKeyframe().create_hook_keyframe(0.5, 0.0)[0]
        frames = node.CreateHookKeyframe().create_hook_keyframe(1.0, 0.6, frames)[0]
        hooks = node.SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]
        hooked = node.SetClipHooks().apply_hooks(each, schedule, True, hooks)[0]
        assert type(hooked) is type(each)
        found.append(node.CLIPTextEncode().encode(hooked, PROMPT)[0])
        plain.append(node.CLIPTextEncode().encode(each, PROMPT)[0])
    assert len(found[0]) == (2 if schedule else 1) and same(stock, *found) and same(stock, *plain)
    assert not stock.torch.equal(found[0][0][0], plain[0][0][0])
    assert counts() == {"clip.encode": len(found[0]) + 1, "clip.patch": 1}


def test_clip_text_encode_sdxl(stock, node, counts, daemon, clip_l):
    """Two prompts for two encoders and the sizes, of SDXL's CLIP-L and CLIP-G at their real size."""
    clip_g = ROOT / "build" / "models" / "clip_g.safetensors"
    if not clip_g.exists():
        pytest.skip("build/models/clip_g.safetensors is not there: 'make bench' makes it")
    files = [clip_l, clip_g]
    real = stock.sd.load_clip([str(file) for file in files], clip_type=stock.sd.CLIPType.STABLE_DIFFUSION)
    sizes = (1024, 768, 0, 8, 1024, 768)
    mine, theirs = (
        node.CLIPTextEncodeSDXL.execute(each, *sizes, "an oil painting of a storm", PROMPT).args[0]
        for each in (make_clip(files, "sdxl", client=daemon.client()), real)
    )
    assert same(stock, mine, theirs) and mine[0][1]["crop_h"] == 8 and mine[0][0].shape[-1] == 2048
    assert counts() == {"clip.encode": 1}


# --- in the middle of sampling ------------------------------------------------------------------------------------


def _control_net(torch, seed):
    """A small SD3 ControlNet, of the kind that encodes its picture itself: seeded weights, two blocks."""
    from comfy.cldm.mmdit import ControlNet as Network
    from comfy.controlnet import ControlNet
    from comfy.latent_formats import SD3
    from comfy.ops import disable_weight_init

    context = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 256}}
    network = Network(
        num_blocks=2, control_latent_channels=16, input_size=None, patch_size=2, in_channels=16, depth=4,
        num_patches=32 * 32, pos_embed_max_size=32, adm_in_channels=64, context_embedder_config=context,
        dtype=torch.float32, device="cpu", operations=disable_weight_init,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return ControlNet(network, compression_ratio=1, latent_format=SD3(), load_device=torch.device("cpu"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("apply", ["ControlNetApplyAdvanced", "ControlNetApplySD3"])
def test_a_control_net_encodes_in_mid_sampling(stock, node, tiny, vae, local_vae, counts, apply):
    """The shell's VAE is asked by the sampler itself, once for both prompts; the samples are the stock VAE's."""
    sd3, image = tiny("sd3"), random(stock, 1, 128, 128, 3, seed=4)
    control, found = _control_net(stock.torch, 3), []
    plain = {"positive": sd3.positive, "negative": sd3.negative}
    for each in (vae, local_vae, None):
        given = plain
        if each is not None:
            options = {**plain, "control_net": control, "vae": each, "image": image, "strength": 0.9}
            options |= {"start_percent": 0.0, "end_percent": 1.0}
            if apply == "ControlNetApplySD3":
                positive, negative = node.ControlNetApplySD3.execute(**options).args
            else:
                positive, negative = node.ControlNetApplyAdvanced().apply_controlnet(**options)
            given = {"positive": positive, "negative": negative}
        sd3.__dict__.update(given)
        found.append(sd3.sample(steps=4))
    mine, theirs, without = found
    assert stock.torch.equal(mine, theirs) and not stock.torch.equal(mine, without)
    assert counts() == {"vae.encode": 1}
