"""The daemon against the local object, bit for bit: every family of text encoders by every use, and every kind of VAE.

Text encoders of real sizes need gigabytes and minutes. Their sizes are in ComfyUI's own JSON files, so the worker runs
a copy of this ComfyUI whose JSON files say small sizes, and this process reads the same ones: code, layout, detection
and number of layers are ComfyUI's. VAEs have their sizes in the code and are real, with random weights.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from luna_daemon.shells.build import make_clip, make_vae
from tests.comfy.shell_helpers import DEMO_VAE
from tests.comfy.test_nodes import make_taesd
from tests.comfy.test_shells_clip import ENCODERS
from tests.comfy.test_shells_vae import FAMILIES as VAE_KEYS
from tests.comfy.test_shells_vae import family as empty_vae
from tests.comfy.test_stock_nodes import Counts
from tests.integration.conftest import daemons_below

pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("inference")]

FAMILIES = {
    "SD1": ("stable_diffusion", ("clip_l",)), "SDXL": ("sdxl", ("clip_l", "clip_g")),
    "SD3": ("sd3", ("clip_l", "clip_g")), "SD3 with T5": ("sd3", ("clip_l", "clip_g", "t5xxl")),
    "Flux": ("flux", ("clip_l", "t5xxl")),
}  # fmt: skip
SIZES = {
    "sd1_clip_config.json": {
        "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 96
    },
    "clip_config_bigg.json": {
        "hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 4, "projection_dim": 160
    },
    # Its width tells ComfyUI that it is a T5-XXL.
    "text_encoders/t5_config_xxl.json": {"d_ff": 64, "d_kv": 8, "num_heads": 8},
}  # fmt: skip
SMALL_MODULES = ("comfy.sd1_clip", "comfy.sdxl_clip", "comfy.text_encoders.sd3_clip", "comfy.cli_args")
"""They find the sizes beside their own file; the last one's place is where a shell says that its ComfyUI is."""
PROMPT = "a (lighthouse:1.3) in a [storm], oil painting"


# --- the setting: small encoders, a daemon that knows them --------------------------------------------------------


@pytest.fixture(scope="module")
def small_comfyui(comfy, tmp_path_factory) -> Path:
    """A copy of ComfyUI with small text encoders; this process' ComfyUI reads the same sizes while the module runs."""
    folder, root = tmp_path_factory.mktemp("comfyui"), Path(os.environ["COMFYUI_PATH"])
    for path in root.iterdir():
        if path.name not in ("comfy", "models", "output", "temp", "user", ".git"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(root / "comfy", folder / "comfy", ignore=shutil.ignore_patterns("__pycache__"))
    for name, sizes in SIZES.items():
        path = folder / "comfy" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    with pytest.MonkeyPatch.context() as patch:
        for name in SMALL_MODULES:
            file = folder / Path(*name.split(".")).with_suffix(".py")
            patch.setattr(importlib.import_module(name), "__file__", str(file))
        yield folder


@pytest.fixture(scope="module")
def files(stock, small_comfyui, tmp_path_factory) -> dict[str, Path]:
    """Small text encoders and VAEs of random weights, by name."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "vae_approx").mkdir()
    with pytest.MonkeyPatch.context() as patch, stock.torch.device("meta"):
        patch.setattr(stock.torch.nn.Module, "load_state_dict", lambda self, state, strict=True: ((), ()))
        empty = stock.sd.load_text_encoder_state_dicts(
            [{key: stock.torch.empty(shape) for key, shape in ENCODERS[one].items()} for one in ("l", "g", "t5")],
            clip_type=stock.sd.CLIPType.SD3, model_options={"initial_device": stock.torch.device("meta")},
        ).cond_stage_model  # fmt: skip
    networks = {name: getattr(empty, name).transformer for name in ("clip_l", "clip_g", "t5xxl")}
    networks |= {"KL": empty_vae(stock, VAE_KEYS["SDXL"]), "KL 16": empty_vae(stock, VAE_KEYS["Flux"])}
    found = {}
    for seed, (name, network) in enumerate(networks.items()):
        network = getattr(network, "first_stage_model", network)
        found[name] = folder / f"{name.replace(' ', '_')}.safetensors"
        stock.utils.save_torch_file(_random_weights(stock.torch, network, seed), str(found[name]))
    make_taesd(stock, folder)
    return found


def _random_weights(torch, network, seed):
    """Weights that neither vanish nor explode, float16; large ones repeat a million values, which is much faster."""
    noise, state = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)), {}
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if not tensor.is_floating_point():
            state[name] = torch.arange(tensor.numel()).reshape(tensor.shape)
            continue
        matrix = tensor.dim() > 1
        size = 0.1 if not matrix else 1.0 if "embed" in name or "shared" in name else tensor[0].numel() ** -0.5
        values = (noise.roll(number) * size + (not matrix and name.endswith("weight"))).half()
        state[name] = values.repeat(tensor.numel() // len(values) + 1)[: tensor.numel()].reshape(tensor.shape)
    return state


@pytest.fixture(scope="module")
def daemon(comfy, small_comfyui, files, tmp_path_factory):
    """Its workers have as many threads as this process; no prompt is remembered."""
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        yield start(
            backend="comfy", comfyui_path=small_comfyui,
            comfyui_python=os.environ.get("COMFYUI_PYTHON") or sys.executable,
            model_dirs=os.pathsep.join(map(str, (DEMO_VAE.parent, files["clip_l"].parent))), max_vae_workers=1,
            cpu_threads=comfy.torch.get_num_threads(), max_clip_workers=1, conditioning_cache_mb=0,
        )  # fmt: skip


@pytest.fixture
def counts(daemon) -> Counts:
    return Counts(daemon)


@pytest.fixture(scope="module")
def clips(stock, daemon, files):
    """A family's ``[shell, real]``; the real one is loaded once."""
    loaded: dict[str, object] = {}

    def pair(family):
        kind, names = FAMILIES[family]
        paths = [files[name] for name in names]
        if family not in loaded:
            loaded.clear()
            loaded[family] = stock.sd.load_clip([str(path) for path in paths], clip_type=_type(stock, kind))
        return [make_clip(paths, kind, client=daemon.client()), loaded[family].clone()]

    return pair


def _type(stock, kind):
    return getattr(stock.sd.CLIPType, kind.upper(), stock.sd.CLIPType.STABLE_DIFFUSION)


def random(stock, *shape, seed=0):
    return stock.torch.rand(*shape, generator=stock.torch.Generator().manual_seed(seed))


# --- text encoders: each use gives its tensors and says how many requests it takes --------------------------------


def plain(stock, clip, text="a cat", pooled=True):
    return [*clip.encode_from_tokens(clip.tokenize(text), return_pooled=pooled)], 1


def weighted(stock, clip):
    return plain(stock, clip, PROMPT)


def chunks(stock, clip):
    """Three of CLIP's, or one long one of T5's; the weights make the empty prompt part of the batch."""
    return plain(stock, clip, "(start:1.2) " + "word " * 160)


def clip_skip(stock, clip):
    clip.clip_layer(-3)
    return plain(stock, clip, PROMPT)


def unprojected(stock, clip):
    return plain(stock, clip, PROMPT, pooled="unprojected")


def all_results(stock, clip):
    return list(clip.encode_from_tokens(clip.tokenize(PROMPT), return_dict=True).values()), 1


def textual_inversion(stock, clip):
    """Two vectors in the place of tokens, in every encoder."""
    tokens = clip.tokenize(PROMPT)
    for name, chunk in tokens.items():
        network = getattr(clip.cond_stage_model, name if name == "t5xxl" else f"clip_{name}")
        if network is None:  # SD3 has tokens for a T5 that it can do without
            continue
        width = network.transformer.get_input_embeddings().weight.shape[1]
        for place in (2, 3):
            chunk[0][place] = (random(stock, width, seed=place) - 0.5, 1.1)
    return [*clip.encode_from_tokens(tokens, return_pooled=True)], 1


def one_lora(stock, clip):
    return plain(stock, with_loras(stock, clip, (1, 0.8)), PROMPT)


def two_loras(stock, clip):
    return plain(stock, with_loras(stock, clip, (1, 0.8), (2, -0.5)), PROMPT)


def two_loras_the_other_way(stock, clip):
    return plain(stock, with_loras(stock, clip, (2, -0.5), (1, 0.8)), PROMPT)


def hooks(stock, clip):
    """A LoRA by the schedule of two keyframes, over another that is always there."""
    clip, group = with_loras(stock, clip, (1, 0.8)), stock.hooks.create_hook_lora(lora(stock, clip, 2), 1.0, 0.7)
    frames = stock.hooks.HookKeyframeGroup()
    for percent, strength in ((0.0, 1.0), (0.5, 0.3)):
        frames.add(stock.hooks.HookKeyframe(strength=strength, start_percent=percent))
    group.set_keyframes_on_hooks(frames)
    clip.patcher.forced_hooks, clip.use_clip_schedule = group.clone(), True
    target = stock.hooks.create_target_dict(stock.hooks.EnumWeightTarget.Clip)
    clip.patcher.register_all_hook_patches(group, target)
    made = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    assert len(made) == 2 and not stock.torch.equal(made[0][0], made[1][0])
    return [entry[0] for entry in made] + [entry[1]["pooled_output"] for entry in made], 2


def with_loras(stock, clip, *loras):
    for seed, strength in loras:
        clip = stock.sd.load_lora_for_models(None, clip, lora(stock, clip, seed), 1.0, strength)[1]
    return clip


LORA_PLACES = (
    "layers.1.mlp.fc1.weight", "layers.0.self_attn.q_proj.weight", "block.1.layer.0.SelfAttention.v.weight",
    "block.0.layer.1.DenseReluDense.wo.weight",
)  # fmt: skip


def lora(stock, clip, seed):
    """A LoRA for two matrices of each encoder."""
    generator, state = stock.torch.Generator().manual_seed(seed), {}
    for name, weight in clip.cond_stage_model.state_dict().items():
        if any(part in name for part in LORA_PLACES):
            key, (rows, columns) = f"text_encoders.{name.removesuffix('.weight')}", weight.shape
            state[f"{key}.lora_up.weight"] = stock.torch.randn(rows, 4, generator=generator) * 0.2
            state[f"{key}.lora_down.weight"] = stock.torch.randn(4, columns, generator=generator) * 0.2
            state[f"{key}.alpha"] = stock.torch.tensor(4.0)
    return state


USES = (
    plain, weighted, chunks, clip_skip, unprojected, all_results, textual_inversion, one_lora, two_loras,
    two_loras_the_other_way, hooks,
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_text_encoders(stock, clips, counts, family, use):
    """What the daemon answers is what the local encoder gives; it was the daemon, with as many requests as asked."""
    shell, real = clips(family)
    (mine, requests), (theirs, _) = use(stock, shell), use(stock, real)
    asked = counts()
    assert asked.pop("clip.encode") == requests and asked.keys() <= {"clip.patch"}
    for found, expected in zip(mine, theirs, strict=True):
        if expected is None:
            assert found is None
            continue
        assert expected.isfinite().all() and expected.float().std() > 1e-3
        assert found.dtype == expected.dtype and stock.torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_use_has_a_result_of_its_own(stock, clips, family):
    """An equality of two things that both left the option out would prove nothing."""
    _, real = clips(family)
    conds = {use.__name__: use(stock, real.clone())[0][0] for use in USES if use not in (unprojected, all_results)}
    names = list(conds)
    for number, name in enumerate(names):
        for other in names[:number]:
            assert conds[name].shape != conds[other].shape or not stock.torch.equal(conds[name], conds[other]), (
                name, other,
            )  # fmt: skip


# --- VAEs ---------------------------------------------------------------------------------------------------------

VAES = {"KL": 4, "KL 16": 16, "TAESD": 4, "TAESD 16": 16}
"""SD's and SDXL's are one network, the first; the second is SD3's and Flux's."""


@pytest.fixture(scope="module")
def vaes(stock, daemon, files):
    """A VAE's ``(shell, real)``."""
    loaded: dict[str, object] = {}

    def pair(name):
        folder = files["clip_l"].parent / "vae_approx"
        if name == "TAESD":
            paths = [folder / f"taesd_{half}.safetensors" for half in ("encoder", "decoder")]
        else:
            paths = [DEMO_VAE if name == "TAESD 16" else files[name]]
        if name not in loaded:
            loaded.clear()
            state = {}
            for path in paths:
                half = "" if len(paths) == 1 else f"{path.stem}."
                state |= {half + key: value for key, value in stock.utils.load_torch_file(str(path)).items()}
            if name == "TAESD":
                state |= {"vae_scale": stock.torch.tensor(0.18215), "vae_shift": stock.torch.tensor(0.0)}
            loaded[name] = stock.sd.VAE(sd=state)
        return make_vae(paths, client=daemon.client()), loaded[name]

    return pair


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("work", ["encode", "decode", "encode_tiled", "decode_tiled", "batch", "odd"])
def test_vaes(stock, vaes, counts, name, work):
    """Plain, in tiles, a batch against a stock VAE that takes one at a time, and sizes that are no multiple of 8."""
    shell, real = vaes(name)
    encodes = work != "decode" and work != "decode_tiled"
    if work == "batch":
        pictures, latents = random(stock, 3, 32, 40, 3), random(stock, 3, VAES[name], 4, 5) * 4 - 2
        single = [real.encode(pictures[number : number + 1]) for number in range(3)]
        assert stock.torch.equal(shell.encode(pictures), stock.torch.cat(single))
        single = [real.decode(latents[number : number + 1]) for number in range(3)]
        assert stock.torch.equal(shell.decode(latents), stock.torch.cat(single))
        assert counts() == {"vae.encode": 1, "vae.decode": 1}
        return
    shapes = {"odd": (1, 45, 51, 3), "encode": (1, 40, 48, 3), "encode_tiled": (1, 64, 80, 3)}
    given = random(stock, *shapes[work]) if encodes else random(stock, 1, VAES[name], 6, 8) * 4 - 2
    tiles = {"encode_tiled": (64, 64, 16), "decode_tiled": (4, 4, 1)}.get(work)
    options = dict(zip(("tile_x", "tile_y", "overlap"), tiles)) if tiles else {}
    method = "encode" if work == "odd" else work
    mine, theirs = (getattr(each, method)(given, **options) for each in (shell, real))
    assert mine.dtype == theirs.dtype == stock.torch.float32 and theirs.isfinite().all() and theirs.std() > 1e-3
    assert stock.torch.equal(mine, theirs) and mine.mul_(2) is mine
    assert counts() == {"vae.encode" if encodes else "vae.decode": 1}


@pytest.mark.parametrize("name", ["KL", "TAESD 16"])
def test_four_channels(stock, vaes, name):
    """A picture with alpha: what this version of ComfyUI makes of it, result or error."""
    shell, real = vaes(name)
    picture = random(stock, 1, 32, 32, 4)
    try:
        expected = real.encode(picture)
    except RuntimeError:
        with pytest.raises(Exception, match=r"channels|4"):
            shell.encode(picture)
    else:
        assert stock.torch.equal(shell.encode(picture), expected)
