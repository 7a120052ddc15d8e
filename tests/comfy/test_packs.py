"""Node packs of others in a real ComfyUI server: with the daemon's CLIP and VAE they make what the stock ones make.

``COMFYUI_PACKS`` is a folder with the packs as ComfyUI's ``custom_nodes`` has them; a test whose pack is not there is
skipped and says which. Each workflow runs twice over HTTP, once with Luna's loaders and once with ComfyUI's, and every
tensor that comes out is compared bit for bit; the daemon's counters say who computed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.test_nodes import make_lora, make_tiny_sd3
from tests.comfy.test_stock_nodes import Counts
from tests.comfy.test_two_servers import Server, start_server
from tests.integration.conftest import DEMO_VAE, ROOT, daemons_below

PACKS = os.environ.get("COMFYUI_PACKS", "")
pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PACKS, reason="COMFYUI_PACKS is not set: needs a folder of node packs"),
]

VAE, CLIP_L, CLIP_G, UNET, LORA = "vae", "clip_l", "clip_g", "tiny_sd3", "style"
PROMPT = "a lighthouse, (storm:1.3), oil painting"
Node, Link = dict[str, Any], list[Any]


# --- the setting: one server with every pack, one daemon ----------------------------------------------------------


@pytest.fixture(scope="module")
def models(comfy, clip_l, tmp_path_factory) -> Path:
    """A model folder as ComfyUI has it."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("vae", "text_encoders", "diffusion_models", "loras"):
        (folder / kind).mkdir()
    shutil.copy(DEMO_VAE, folder / "vae" / f"{VAE}.safetensors")
    (folder / "text_encoders" / f"{CLIP_L}.safetensors").symlink_to(clip_l)
    clip_g = ROOT / "build" / "models" / "clip_g.safetensors"
    if clip_g.exists():
        (folder / "text_encoders" / f"{CLIP_G}.safetensors").symlink_to(clip_g)
    sdxl_vae = ROOT / "build" / "models" / "sdxl_vae.safetensors"
    if sdxl_vae.exists():
        (folder / "vae" / "sdxl_vae.safetensors").symlink_to(sdxl_vae)
    make_tiny_sd3(comfy, folder / "diffusion_models" / f"{UNET}.safetensors")
    make_lora(comfy, folder / "loras" / f"{LORA}.safetensors")
    return folder


@pytest.fixture(scope="module")
def daemon(models, clip_l, tmp_path_factory):
    """A daemon whose workers run this ComfyUI with one thread; each prompt is computed, none remembered."""
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        yield start(
            backend="comfy", comfyui_path=os.environ["COMFYUI_PATH"], comfyui_python=os.environ.get("COMFYUI_PYTHON"),
            model_dirs=os.pathsep.join([str(models), str(clip_l.parent)]), cpu_threads=1, max_vae_workers=1,
            max_clip_workers=1, conditioning_cache_mb=0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(daemon, models, tmp_path_factory) -> Iterator[Server]:
    """A ComfyUI with copies of the packs: some write into their own folder."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "custom_nodes").mkdir()
    packs = sorted(path.name for path in Path(PACKS).iterdir() if (path / "__init__.py").exists())
    for name in packs:
        shutil.copytree(Path(PACKS) / name, folder / "custom_nodes" / name, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(Path(__file__).with_name("pack_nodes.py"), folder / "custom_nodes")
    with contextlib.ExitStack() as ends:
        running = start_server(folder, daemon, models, ends, packs=[*packs, "pack_nodes.py"])
        running.wait_until_it_answers()
        yield running


class Bench:
    """Runs a workflow with Luna's loaders and with ComfyUI's, and compares what its ``TestKeep`` nodes kept."""

    def __init__(self, server: Server, daemon: Any) -> None:
        self.server, self.daemon, self._facts = server, daemon, server.ask("/object_info")

    def need(self, pack: str) -> None:
        """Skip without this pack; fail if ComfyUI could not load it."""
        if not (Path(PACKS) / pack / "__init__.py").exists():
            pytest.skip(f"{pack} is not in COMFYUI_PACKS")
        log = self.server.log.read_text(errors="replace")
        failed = [line for line in log.splitlines() if "IMPORT FAILED" in line and line.rstrip().endswith(pack)]
        assert not failed, log[-8000:]

    def node(self, kind: str, **inputs: Any) -> Node:
        """A node with its own defaults for what is not given; a list is a link, ``["other", 0]``."""
        found = {}
        for name, (type_, *options) in self._facts[kind]["input"].get("required", {}).items():
            if options and "default" in options[0]:
                found[name] = options[0]["default"]
            elif isinstance(type_, list) and type_:
                found[name] = type_[0]
        return {"class_type": kind, "inputs": found | inputs}

    def same(
        self, nodes: dict[str, Node], kept: dict[str, Link], *, vae: str = VAE, clip: str = "sd3",
        materialised: int = 0, warns: str = "", **least: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Run both ways and return what was kept, by name and place.

        ``least`` says how many requests of each kind the daemon answers at the least ("vae_decode"); none of another
        kind, no fallback, and ``materialised`` objects whose weights were loaded here. ``clip_patch=0`` is for a LoRA
        that the daemon may keep from another test. ``warns`` is in the log.
        """
        results = []
        for source in ("luna", "stock"):
            counts, started = Counts(self.daemon), len(self.server.log.read_text(errors="replace"))
            keepers = {
                f"keep-{name}": self.node("TestKeep", value=link, name=f"{source}-{name}")
                for name, link in kept.items()
            }
            self._run({**self._loaders(source, vae, clip), **nodes, **keepers})
            said, asked = self.server.log.read_text(errors="replace")[started:], counts()
            assert "Traceback" not in said and "steps in" not in said, said
            assert ("are loaded here" in said) == (source == "luna" and materialised > 0), said
            if source == "luna":
                assert warns in said, said
                wanted = {name.replace("_", "."): count for name, count in least.items()}
                assert asked.pop("materialised", 0) == materialised
                assert asked.keys() <= wanted.keys(), asked
                assert all(asked.get(op, 0) >= count for op, count in wanted.items()), asked
            else:
                assert not asked, "stock loaders have nothing to do with the daemon"
            results.append(self._kept(source, kept))
        mine, theirs = results
        assert mine.keys() == theirs.keys() and any(tensor.numel() > 100 for tensor in theirs.values())
        for place, tensor in theirs.items():
            assert tensor.isfinite().all() and (tensor.numel() < 100 or tensor.unique().numel() > 10), place
            assert mine[place].dtype == tensor.dtype and mine[place].equal(tensor), place
        return theirs

    def _loaders(self, source: str, vae: str, clip: str) -> dict[str, Node]:
        names = [f"{name}.safetensors" for name in ((CLIP_L, CLIP_G) if clip == "sdxl" else (CLIP_L,))]
        if source == "luna":
            found = {f"clip_name{number}": name for number, name in enumerate(names, 1)}
            encoders = self.node("LunaLoadCLIP", **found, type=clip)
            decoder = self.node("LunaLoadVAE", vae_name=f"{vae}.safetensors")
        else:
            encoders = (
                self.node("DualCLIPLoader", clip_name1=names[0], clip_name2=names[1], type=clip)
                if len(names) > 1
                else self.node("CLIPLoader", clip_name=names[0], type=clip)
            )
            decoder = self.node("VAELoader", vae_name=f"{vae}.safetensors")
        return {
            "clip": encoders, "vae": decoder,
            "unet": self.node("UNETLoader", unet_name=f"{UNET}.safetensors", weight_dtype="default"),
        }  # fmt: skip

    def _run(self, workflow: dict[str, Node]) -> None:
        status = self.server.history(self.server.post(workflow))["status"]
        assert status["status_str"] == "success", (status["messages"][-1], self.server.said())

    def _kept(self, source: str, kept: dict[str, Link]) -> dict[str, Any]:
        from safetensors.torch import load_file

        files = {name: self.server.folder / "output" / f"{source}-{name}.safetensors" for name in kept}
        found = {
            f"{name}: {place}": tensor for name, file in files.items() for place, tensor in load_file(file).items()
        }
        for file in files.values():
            file.unlink()
        return found


@pytest.fixture(scope="module")
def bench(server, daemon) -> Bench:
    return Bench(server, daemon)


def needs_sdxl() -> None:
    if not (ROOT / "build" / "models" / "clip_g.safetensors").exists():
        pytest.skip("build/models/clip_g.safetensors is not there: 'make bench' makes it")


def conditioned(bench: Bench) -> dict[str, Node]:
    """Two prompts by stock nodes, for nodes that sample."""
    texts = {"positive": PROMPT, "negative": "blurry"}
    return {name: bench.node("CLIPTextEncode", clip=["clip", 0], text=text) for name, text in texts.items()}


SAMPLING = {
    "model": ["unet", 0], "positive": ["positive", 0], "negative": ["negative", 0], "seed": 5, "steps": 2, "cfg": 3.0,
    "sampler_name": "euler", "scheduler": "simple",
}  # fmt: skip


# --- text encoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "normalization", "interpretation"),
    [
        ("stable_diffusion", "none", "comfy++"), ("stable_diffusion", "length+mean", "A1111"),
        ("stable_diffusion", "mean", "compel"), ("stable_diffusion", "length", "down_weight"),
        ("sdxl", "none", "comfy++"), ("sdxl", "length+mean", "A1111"),
    ],
)  # fmt: skip
def test_adv_clip_emb(bench, family, normalization, interpretation):
    """Its own weighting of prompts, on one encoder and, by the type of the network, on SDXL's two."""
    bench.need("ComfyUI_ADV_CLIP_emb")
    if family == "sdxl":
        needs_sdxl()
    node = bench.node(
        "BNK_CLIPTextEncodeAdvanced", clip=["clip", 0], text="a (storm:1.4), [sea]",
        token_normalization=normalization, weight_interpretation=interpretation,
    )  # fmt: skip
    requests = 2 if family == "sdxl" else 1
    bench.same({"node": node}, {"cond": ["node", 0]}, clip=family, clip_encode=requests)


def test_tinyterra(bench):
    """Its copy of that weighting, on SDXL's two encoders, and LoRA tags."""
    bench.need("ComfyUI_tinyterraNodes")
    needs_sdxl()
    node = bench.node(
        "ttN conditioning", model=["unet", 0], clip=["clip", 0], loras=f"<lora:{LORA}:0.7:0.6>", positive=PROMPT,
        negative="blurry", positive_weight_interpretation="A1111", positive_token_normalization="mean",
        negative_weight_interpretation="compel",
    )  # fmt: skip
    bench.same(
        {"node": node}, {"positive": ["node", 1], "negative": ["node", 2]}, clip="sdxl", clip_encode=4, clip_patch=0
    )


def test_essentials(bench):
    """Attention of single layers scaled, as patches without weights."""
    bench.need("ComfyUI_essentials")
    seeker = bench.node("SD3AttentionSeekerLG+", clip=["clip", 0], clip_l_1=1.4, clip_l_7=0.6)
    encode = bench.node("CLIPTextEncode", clip=["seeker", 0], text=PROMPT)
    plain = bench.node("CLIPTextEncode", clip=["clip", 0], text=PROMPT)
    made = bench.same(
        {"seeker": seeker, "encode": encode, "plain": plain}, {"scaled": ["encode", 0], "plain": ["plain", 0]},
        clip_encode=2, clip_patch=0,
    )  # fmt: skip
    assert not made["scaled: value.0.0"].equal(made["plain: value.0.0"])


@pytest.mark.parametrize(
    "text",
    [
        # Not A1111's: it divides by the mean of the encoding, which random weights can make 0.
        "STYLE(compel, length) a (cat:1.3) on a [mat]",
        "a (cat:1.3) BREAK two dogs CAT a bird AVG(0.3) a fish",
        "STYLE(comfy++) TE_WEIGHT(all=0.8) a (cat:1.3), [CUT:white cat:white]",
    ],
)
def test_prompt_control(bench, text):
    """Its functions put into the encoder by name, and conditionings joined by hand."""
    bench.need("comfyui-prompt-control")
    node = bench.node("PCTextEncode", clip=["clip", 0], text=text)
    bench.same({"node": node}, {"cond": ["node", 0]}, clip="stable_diffusion", clip_encode=1)


def test_prompt_control_schedules(bench):
    """Prompts and LoRAs by ranges of the sampling: its nodes grow others, with hooks."""
    bench.need("comfyui-prompt-control")
    text = f"a [cat:dog:0.5] in the (snow:1.2) <lora:{LORA}:1:0.7> [<lora:{LORA}:0.5:0.9>::0.3]"
    loras = bench.node("PCLazyLoraLoader", model=["unet", 0], clip=["clip", 0], text=text)
    encode = bench.node("PCLazyTextEncode", clip=["loras", 1], text=text)
    made = bench.same({"loras": loras, "encode": encode}, {"cond": ["encode", 0]}, clip_encode=2, clip_patch=0)
    assert sum(place.endswith(".0") and tensor.dim() == 3 for place, tensor in made.items()) >= 2


def test_ppm_negpip(bench):
    """NegPip's function runs the network itself: the weights are loaded here, once, and all is as in stock."""
    bench.need("ComfyUI-ppm")
    nodes = {
        "small": bench.node("TestSmallSD1"),
        "pip": bench.node("CLIPNegPip", model=["small", 0], clip=["clip", 0]),
        "positive": bench.node("CLIPTextEncode", clip=["pip", 1], text="a cat, (dog:-0.8)"),
        "negative": bench.node("CLIPTextEncode", clip=["pip", 1], text="blurry"),
        "latent": bench.node("EmptyLatentImage", width=64, height=64),
        "sample": bench.node("KSampler", **SAMPLING | {"model": ["pip", 0]}, latent_image=["latent", 0]),
    }
    kept = {name: [name, 0] for name in ("positive", "negative", "sample")}
    made = bench.same(nodes, kept, clip="stable_diffusion", materialised=1, warns="clip_negpip")
    assert made["positive: value.0.0"].shape[1] == 154, "NegPip doubles the conditioning"


def test_ppm_break(bench):
    """Prompts joined at BREAK, and tokens counted with the tokenizers' own vocabulary."""
    bench.need("ComfyUI-ppm")
    text = "a cat BREAK (dark:1.2)"
    nodes = {
        "break": bench.node("CLIPTextEncodeBREAK", clip=["clip", 0], text=text),
        "count": bench.node("CLIPTokenCounter", clip=["clip", 0], text=text),
    }
    bench.same(nodes, {"cond": ["break", 0], "count": ["count", 0]}, clip="stable_diffusion", clip_encode=2)


def test_animatediff_evolved(bench):
    """Prompts interpolated by frame, under a schedule of hooks that the pack steps through itself."""
    bench.need("ComfyUI-AnimateDiff-Evolved")
    frames = bench.node("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)
    more = bench.node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.6, prev_hook_kf=["frames", 0])
    hook = bench.node("CreateHookLora", lora_name=f"{LORA}.safetensors", strength_model=0.0, strength_clip=0.9)
    nodes = {
        "frames": frames, "more": more, "hook": hook,
        "timed": bench.node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["more", 0]),
        "hooked": bench.node("SetClipHooks", clip=["clip", 0], hooks=["timed", 0], schedule_clip=True),
        "node": bench.node("ADE_PromptScheduling", clip=["hooked", 0], prompts='"0": "a cat", "4": "a (dog:1.2)"'),
        "plain": bench.node("ADE_PromptScheduling", clip=["clip", 0], prompts='"0": "a cat", "4": "a (dog:1.2)"'),
    }  # fmt: skip
    made = bench.same(
        nodes, {"cond": ["node", 0], "plain": ["plain", 0]}, clip="stable_diffusion", clip_encode=8, clip_patch=0
    )
    assert made["cond: value.0.0"].shape[0] == 5 and not made["cond: value.0.0"].equal(made["cond: value.1.0"])


def test_inspire(bench):
    """A LoRA by blocks on model and text encoders, and its own sampler."""
    bench.need("ComfyUI-Inspire-Pack")
    weights = bench.node(
        "LoraLoaderBlockWeight //Inspire", model=["unet", 0], clip=["clip", 0], lora_name=f"{LORA}.safetensors",
        strength_clip=0.7,
    )  # fmt: skip
    nodes = {
        "lora": weights,
        "positive": bench.node("CLIPTextEncode", clip=["lora", 1], text=PROMPT),
        "negative": bench.node("CLIPTextEncode", clip=["lora", 1], text="blurry"),
        "latent": bench.node("EmptySD3LatentImage", width=64, height=64),
        "sample": bench.node(
            "KSampler //Inspire", **SAMPLING | {"model": ["lora", 0]}, latent_image=["latent", 0], noise_mode="CPU"
        ),
    }
    bench.same(nodes, {"latent": ["sample", 0], "cond": ["positive", 0]}, clip_encode=2, clip_patch=0)


# --- nodes that sample, with VAE and CLIP -------------------------------------------------------------------------


def test_impact_detailer(bench):
    """Two segments, each encoded, sampled, decoded and pasted back, the prompt by its own wildcards."""
    bench.need("ComfyUI-Impact-Pack")
    nodes = conditioned(bench) | {
        "picture": bench.node("TestPicture", width=128, height=64, batch=1, seed=3),
        "segs": bench.node("ImpactMakeTileSEGS", images=["picture", 0], bbox_size=64, crop_factor=1.0, min_overlap=0),
        "detailer": bench.node(
            "DetailerForEach", **SAMPLING, image=["picture", 0], segs=["segs", 0], clip=["clip", 0], vae=["vae", 0],
            guide_size=64, max_size=128, wildcard="a {fox|fox} in the snow", denoise=0.6,
        ),
    }  # fmt: skip
    bench.same(nodes, {"image": ["detailer", 0]}, clip_encode=3, vae_encode=2, vae_decode=2)


def test_impact_upscaler(bench):
    """An iterative upscale through pixels: decode, resize, encode, sample."""
    bench.need("ComfyUI-Impact-Pack")
    nodes = conditioned(bench) | {
        "picture": bench.node("TestPicture", width=64, height=96, batch=1, seed=4),
        "provider": bench.node(
            "PixelKSampleUpscalerProvider", **SAMPLING, vae=["vae", 0], denoise=0.5, scale_method="lanczos",
        ),
        "upscale": bench.node(
            "IterativeImageUpscale", pixels=["picture", 0], upscale_factor=1.5, steps=2, upscaler=["provider", 0],
            vae=["vae", 0],
        ),
    }  # fmt: skip
    bench.same(nodes, {"image": ["upscale", 0]}, clip_encode=2, vae_encode=3, vae_decode=3)


def test_impact_wildcards(bench):
    """Its prompt node loads the LoRA that the text names."""
    bench.need("ComfyUI-Impact-Pack")
    text = f"{PROMPT} <lora:{LORA}:0.5:0.8>"
    node = bench.node(
        "ImpactWildcardEncode", model=["unet", 0], clip=["clip", 0], wildcard_text=text, populated_text=text, mode=False
    )
    bench.same({"node": node}, {"cond": ["node", 2]}, clip_encode=1, clip_patch=0)


@pytest.mark.parametrize(("tiled", "batch"), [(False, 1), (True, 1), (False, 2)])
def test_ultimate_sd_upscale(bench, tiled, batch):
    """Tiles of a picture sampled one after the other, the seams repaired."""
    bench.need("ComfyUI_UltimateSDUpscale")
    nodes = conditioned(bench) | {
        "picture": bench.node("TestPicture", width=128, height=64, batch=1, seed=5),
        "node": bench.node(
            "UltimateSDUpscaleNoUpscale", **SAMPLING, upscaled_image=["picture", 0], vae=["vae", 0], denoise=0.5,
            tile_width=64, tile_height=64, tile_padding=16, mask_blur=4, tiled_decode=tiled, batch_size=batch,
            seam_fix_mode="Half Tile", seam_fix_denoise=0.4, seam_fix_padding=8,
        ),
    }  # fmt: skip
    bench.same(nodes, {"image": ["node", 0]}, clip_encode=2, vae_encode=2, vae_decode=2)


# --- VAE ----------------------------------------------------------------------------------------------------------


def test_vae_utils(bench):
    """A shallow copy with an attribute of its own, and its decode node plain and tiled."""
    bench.need("ComfyUI-VAE-Utils")
    nodes = {
        "picture": bench.node("TestPicture", width=96, height=64, batch=1, seed=6),
        "copy": bench.node("VAEUtils_DisableVAEOffload", vae=["vae", 0]),
        "encode": bench.node("VAEEncode", pixels=["picture", 0], vae=["copy", 0]),
    }
    for name, tile in (("plain", False), ("tiled", True)):
        nodes[name] = bench.node(
            "VAEUtils_VAEDecodeTiled", samples=["encode", 0], vae=["copy", 0], tile=tile, tile_size=64, overlap=16
        )
    kept = {name: [name, 0] for name in ("encode", "plain", "tiled")}
    bench.same(nodes, kept, vae_encode=1, vae_decode=2)


def test_tiled_diffusion(bench):
    """Tiled VAE runs the layers itself: the weights are loaded here, once, and the picture is the stock one."""
    bench.need("ComfyUI-TiledDiffusion")
    if not (ROOT / "build" / "models" / "sdxl_vae.safetensors").exists():
        pytest.skip("build/models/sdxl_vae.safetensors is not there: 'make bench' makes it")
    nodes = {
        "picture": bench.node("TestPicture", width=320, height=64, batch=1, seed=7),
        "encode": bench.node("VAEEncodeTiled_TiledDiffusion", pixels=["picture", 0], vae=["vae", 0], tile_size=256),
        "decode": bench.node("VAEDecodeTiled_TiledDiffusion", samples=["encode", 0], vae=["vae", 0], tile_size=384),
    }
    bench.same(
        nodes, {"latent": ["encode", 0], "image": ["decode", 0]}, vae="sdxl_vae", materialised=1, warns="loaded here"
    )


@pytest.mark.parametrize("circular", [False, True])
def test_comfyroll(bench, circular):
    """Its decode; circular, it sets the padding of the layers, which travels with the call."""
    bench.need("ComfyUI_Comfyroll_CustomNodes")
    nodes = {
        "picture": bench.node("TestPicture", width=64, height=64, batch=1, seed=8),
        "encode": bench.node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "decode": bench.node("CR VAE Decode", samples=["encode", 0], vae=["vae", 0], circular=circular),
    }
    bench.same(nodes, {"image": ["decode", 0]}, vae_encode=1, vae_decode=1)
