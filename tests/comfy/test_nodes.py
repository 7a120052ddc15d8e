"""The node pack in a real ComfyUI, with a real daemon whose workers run that ComfyUI.

Every result is compared bit for bit with the stock nodes', and the daemon's counters say who computed it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from luna_daemon.client import get_client, reset_clients
from luna_daemon.core import BadRequest, DaemonConnectionError
from tests.integration.conftest import ROOT, daemons_below, free_port

pytest_plugins = ["tests.comfy.shell_fixtures"]

VAE, CLIP, UNET, LORA = "demo_vae.safetensors", "clip_l.safetensors", "tiny_sd3.safetensors", "style.safetensors"
NODES = {
    "LunaModelRouter", "LunaConfigGateway", "LunaPipeOut", "LunaLoadVAE", "LunaLoadCLIP", "LunaLoadLoRA",
    "LunaCheckpointTunnel", "LunaDaemonStatus", "LunaFreeModels",
}  # fmt: skip
PROMPT = "a lighthouse, (storm:1.3), oil painting"


# --- the setting: ComfyUI with this pack, models, a daemon --------------------------------------------------------


@pytest.fixture(scope="module")
def ui(comfy: SimpleNamespace) -> SimpleNamespace:
    """ComfyUI's own modules of nodes and folders, this pack loaded as ComfyUI loads it."""
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(ROOT)))
    return SimpleNamespace(
        **vars(comfy), nodes=nodes, folders=importlib.import_module("folder_paths"), node=nodes.NODE_CLASS_MAPPINGS
    )


@pytest.fixture(scope="module")
def models(ui, clip_l, tmp_path_factory) -> Path:
    """A folder of small models that ComfyUI's loaders list."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("vae", "text_encoders", "diffusion_models", "checkpoints", "loras", "vae_approx"):
        (folder / kind).mkdir()
        ui.folders.add_model_folder_path(kind, str(folder / kind))
    shutil.copy(ROOT / "demo" / "model" / "luna_demo_vae.safetensors", folder / "vae" / VAE)
    (folder / "text_encoders" / CLIP).symlink_to(clip_l)
    make_tiny_sd3(ui, folder / "diffusion_models" / UNET)
    make_lora(ui, folder / "loras" / LORA)
    make_taesd(ui, folder)
    return folder


def save(ui, state, path):
    importlib.import_module("safetensors.torch").save_file(state, str(path))


def make_tiny_sd3(ui, path):
    """SD3's transformer, of depth 2, with seeded random weights: 6.6 million parameters."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ops import disable_weight_init

    torch = ui.torch
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    network = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=2, num_patches=192 * 192, pos_embed_max_size=192,
        adm_in_channels=2048, context_embedder_config=context, dtype=torch.float32, device="cpu",
        operations=disable_weight_init,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.02 if value.dim() > 1 else torch.zeros(value.shape)
        for name, value in network.state_dict().items()
    }
    save(ui, state, path)


def make_lora(ui, path):
    """A LoRA for CLIP-L and for the tiny transformer."""
    torch = ui.torch
    generator = torch.Generator().manual_seed(7)
    targets = {
        "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1": (3072, 768),
        "diffusion_model.joint_blocks.0.x_block.mlp.fc1": (512, 128),
    }
    state = {}
    for name, (rows, columns) in targets.items():
        state[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
        state[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.2
        state[f"{name}.alpha"] = torch.tensor(4.0)
    save(ui, state, path)


def make_taesd(ui, folder):
    """A TAESD in two files, seeded."""
    from comfy.taesd.taesd import TAESD

    network, generator = TAESD(latent_channels=4), ui.torch.Generator().manual_seed(3)
    for half in ("encoder", "decoder"):
        shapes = {name: value.shape for name, value in getattr(network, f"taesd_{half}").state_dict().items()}
        state = {name: ui.torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
        save(ui, state, folder / "vae_approx" / f"taesd_{half}.safetensors")


@pytest.fixture(scope="module")
def daemon(models, clip_l, tmp_path_factory):
    """A daemon whose workers run this ComfyUI; this process' default client finds it."""
    comfyui = os.environ["COMFYUI_PATH"]
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        running = start(
            backend="comfy", comfyui_path=comfyui, comfyui_python=os.environ.get("COMFYUI_PYTHON") or sys.executable,
            model_dirs=os.pathsep.join([str(models), str(clip_l.parent)]), cpu_threads=1, max_vae_workers=1,
            max_clip_workers=1, conditioning_cache_mb=0,
        )  # fmt: skip
        yield running


@pytest.fixture
def served(daemon, monkeypatch):
    """The daemon, as nodes find it, and a check at the end that nothing was computed here instead."""
    use(monkeypatch, daemon.port, daemon.runtime_dir)
    before = daemon.info()
    yield daemon
    after = daemon.info()
    assert (after["fallbacks"], after["materialised"]) == (before["fallbacks"], before["materialised"])
    reset_clients()


@pytest.fixture
def no_daemon(monkeypatch, tmp_path):
    """Nodes that find no daemon."""
    use(monkeypatch, free_port(), tmp_path)
    yield
    reset_clients()


def use(monkeypatch, port, runtime_dir):
    for name in list(os.environ):
        if name.startswith("LUNA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LUNA_PORT", str(port))
    monkeypatch.setenv("LUNA_RUNTIME_DIR", str(runtime_dir))
    reset_clients()


@pytest.fixture(autouse=True)
def inference(comfy):
    """As ComfyUI runs nodes."""
    with comfy.torch.inference_mode():
        yield


def asked(daemon) -> dict[str, int]:
    requests = daemon.info()["requests"]
    return {op: requests.get(op, 0) for op in ("vae.encode", "vae.decode", "clip.encode")}


def more(daemon, before) -> dict[str, int]:
    return {op: count - before[op] for op, count in asked(daemon).items() if count != before[op]}


def pixels(ui, *shape):
    return ui.torch.rand(*shape, generator=ui.torch.Generator().manual_seed(1))


def same(ui, mine, theirs) -> bool:
    """Whether two conditionings are equal bit for bit."""
    equal = ui.torch.equal
    return equal(mine[0][0], theirs[0][0]) and equal(mine[0][1]["pooled_output"], theirs[0][1]["pooled_output"])


# --- the pack itself ----------------------------------------------------------------------------------------------


def test_comfyui_registers_every_node(ui, models):
    """All class ids are there, each can be made, and says in ComfyUI's words what it takes and gives."""
    assert ui.node.keys() >= NODES
    for name in NODES:
        node = ui.node[name]
        inputs = node.INPUT_TYPES()
        json.dumps(inputs)
        assert callable(getattr(node(), node.FUNCTION)) and node.CATEGORY == "Luna" and node.SEARCH_ALIASES
        assert len(node.RETURN_TYPES) == len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))
        assert name in ui.nodes.NODE_DISPLAY_NAME_MAPPINGS
        assert (ROOT / "web" / "docs" / f"{name}.md").is_file()


def test_loaders_list_what_the_stock_loaders_list(ui, models):
    """Names of VAEs, TAESD included, text encoders and types are the stock loaders' own."""
    mine = ui.node["LunaLoadVAE"].INPUT_TYPES()["required"]["vae_name"][0]
    assert mine == ui.node["VAELoader"].INPUT_TYPES()["required"]["vae_name"][0] and {VAE, "taesd"} <= set(mine)
    inputs = ui.node["LunaLoadCLIP"].INPUT_TYPES()["required"]
    assert inputs["clip_name1"][0] == ui.node["CLIPLoader"].INPUT_TYPES()["required"]["clip_name"][0]
    for stock in ("CLIPLoader", "DualCLIPLoader"):
        assert set(ui.node[stock].INPUT_TYPES()["required"]["type"][0]) <= set(inputs["type"][0])


@pytest.mark.parametrize("name", ["luna-daemon", "luna_daemon", "Luna.Daemon"])
def test_there_is_one_package_whatever_the_folder_is_called(ui, tmp_path, name):
    """In a fresh ComfyUI without the package installed, the pack's own is found, once, and nothing is shadowed."""
    folder = tmp_path / "custom_nodes" / name
    folder.mkdir(parents=True)
    for part in ("__init__.py", "nodes", "luna_daemon", "web", "pyproject.toml"):
        (folder / part).symlink_to(ROOT / part)
    code = (
        "import sys, asyncio, json; sys.path[:] = [p for p in sys.path if not p.endswith('main')]\n"
        "import importlib.util as u; assert u.find_spec('luna_daemon') is None, 'installed'\n"
        "sys.argv = ['main.py', '--cpu']; import comfy.options; comfy.options.enable_args_parsing()\n"
        f"import nodes; assert asyncio.run(nodes.load_custom_node({str(folder)!r}))\n"
        "import luna_daemon.core\n"
        "own = sorted(name for name, m in sys.modules.items() if '__version__' in vars(m) and 'client' in vars(m))\n"
        "found = [name for name in nodes.NODE_CLASS_MAPPINGS if 'Luna' in name]\n"
        "own = [name for name in own if 'luna' in name.lower()]\n"
        "print(json.dumps([own, sys.path[-1], nodes.__file__, found]))"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("LUNA_", "PYTHONPATH"))}
    comfyui = os.environ["COMFYUI_PATH"]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=comfyui, env=environ, capture_output=True, text=True, timeout=100
    )
    if "installed" in done.stderr:
        pytest.skip("luna_daemon is installed in this interpreter")
    assert done.returncode == 0, done.stderr
    own, last, nodes_file, found = json.loads(done.stdout.strip().splitlines()[-1])
    assert own == ["luna_daemon"] and last == str(folder) and nodes_file == str(Path(comfyui) / "nodes.py")
    assert set(found) == NODES


# --- loaders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), [(VAE, 16), ("taesd", 4)])
def test_the_vae_equals_the_stock_loaders(ui, served, name, channels):
    """Stock nodes encode and decode with it: the same bits, computed by the daemon."""
    mine, theirs = (ui.node[loader]().load_vae(name)[0] for loader in ("LunaLoadVAE", "VAELoader"))
    encode, decode, tiled = (ui.node[node]() for node in ("VAEEncode", "VAEDecode", "VAEDecodeTiled"))
    image, before = pixels(ui, 1, 72, 64, 3), asked(served)
    latents = [encode.encode(vae, image)[0] for vae in (mine, theirs)]
    assert latents[0]["samples"].shape[1] == channels
    assert ui.torch.equal(latents[0]["samples"], latents[1]["samples"])
    assert ui.torch.equal(*(decode.decode(vae, latents[0])[0] for vae in (mine, theirs)))
    assert ui.torch.equal(*(tiled.decode(vae, latents[0], 64, 16)[0] for vae in (mine, theirs)))
    assert more(served, before) == {"vae.encode": 1, "vae.decode": 2}


@pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
def test_text_encoders_equal_the_stock_loaders(ui, served, family):
    """CLIPTextEncode and clip skip on it: the same bits, computed by the daemon."""
    mine = ui.node["LunaLoadCLIP"]().load_clip(CLIP, family)[0]
    theirs = ui.node["CLIPLoader"]().load_clip(CLIP, family)[0]
    encode, skip, before = ui.node["CLIPTextEncode"](), ui.node["CLIPSetLastLayer"](), asked(served)
    assert type(mine.cond_stage_model).__name__ == type(theirs.cond_stage_model).__name__
    assert same(ui, encode.encode(mine, PROMPT)[0], encode.encode(theirs, PROMPT)[0])
    mine, theirs = skip.set_last_layer(mine, -2)[0], skip.set_last_layer(theirs, -2)[0]
    assert same(ui, encode.encode(mine, PROMPT)[0], encode.encode(theirs, PROMPT)[0])
    assert more(served, before) == {"clip.encode": 2}


def test_a_lora_equals_the_stock_loaders_and_is_read_once(ui, served):
    """Model and text encoders change as by LoraLoader; a second instance gets the file from the daemon's RAM."""
    model = ui.node["UNETLoader"]().load_unet(UNET, "default")[0]
    mine, theirs = (
        ui.node["LunaLoadCLIP"]().load_clip(CLIP, "sd3")[0],
        ui.node["CLIPLoader"]().load_clip(CLIP, "sd3")[0],
    )
    for strengths in ((0.8, 0.5), (0.8, 0.5)):
        model_a, clip_a = ui.node["LunaLoadLoRA"]().load_lora(model, mine, LORA, *strengths)
        model_b, clip_b = ui.node["LoraLoader"]().load_lora(model, theirs, LORA, *strengths)
        assert model_a.patches.keys() == model_b.patches.keys() and model_a.patches
        encode = ui.node["CLIPTextEncode"]().encode
        assert same(ui, encode(clip_a, PROMPT)[0], encode(clip_b, PROMPT)[0])
    assert not same(ui, encode(clip_a, PROMPT)[0], encode(mine, PROMPT)[0])
    figures = lora_figures(served)
    assert (figures["kind"], figures["misses"], figures["clients"]) == ("file", 1, 1) and figures["hits"] >= 1


def lora_figures(served, name=LORA):
    return served.info()["caches"]["lora"]["loras"][name]


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_loras_state_dict_is_comfyuis_own(ui, served, models, ending):
    """Key for key and bit for bit, mapped or converted; a write stays with whoever wrote."""
    from comfy.utils import load_torch_file

    path = models / "loras" / f"other{ending}"
    if ending == ".pt":
        state = load_torch_file(str(models / "loras" / LORA))
        ui.torch.save({key: value.clone() for key, value in state.items()}, path)
    else:
        shutil.copy(models / "loras" / LORA, path)
    read_lora = ui.node["LunaLoadLoRA"].load_lora.__globals__["loras"].read_lora
    theirs = load_torch_file(str(path), safe_load=True)
    for times in range(2):
        mine = read_lora(str(path))
        assert mine.keys() == theirs.keys() and all(ui.torch.equal(mine[key], theirs[key]) for key in theirs)
        assert {key: value.dtype for key, value in mine.items()} == {key: value.dtype for key, value in theirs.items()}
        next(iter(mine.values())).zero_()
        figures = lora_figures(served, path.name)
        assert (figures["misses"], figures["hits"]) == (1, times)
    assert figures["kind"] == ("arena" if ending == ".pt" else "file")


def test_a_lora_that_the_daemon_does_not_know_is_read_by_comfyui(ui, served, tmp_path, caplog):
    """Outside the daemon's folders: the stock way steps in, with the reason in the log."""
    path = tmp_path / "elsewhere.safetensors"
    make_lora(ui, path)
    read_lora = ui.node["LunaLoadLoRA"].load_lora.__globals__["loras"].read_lora
    with caplog.at_level(logging.INFO, "luna_daemon"):
        assert read_lora(str(path)).keys() and "outside the LoRA folders" in caplog.text


# --- router, gateway, pipe ----------------------------------------------------------------------------------------


def router(ui, **changes):
    inputs = {
        "model_source": "diffusion_models", "model_name": UNET, "model_type": "SD3", "dynamic_precision": "None",
        "clip_1": CLIP, "clip_2": "None", "clip_3": "None", "clip_4": "None", "vae_name": VAE, "daemon_mode": "auto",
    }  # fmt: skip
    return ui.node["LunaModelRouter"]().load(**inputs | changes)


def gateway(ui, model, clip, vae, **changes):
    inputs = {
        "width": 128, "height": 64, "batch_size": 1, "seed": 5, "steps": 3, "cfg": 3.0, "denoise": 1.0, "clip_skip": 0,
        "sampler": "euler", "scheduler": "simple", "positive_prompt": f"{PROMPT} <lora:style:0.8:0.5>",
        "negative_prompt": "blurry",
    }  # fmt: skip
    return ui.node["LunaConfigGateway"]().process(model, clip, vae, **inputs | changes)


def sampled(ui, model, positive, negative, latent):
    return ui.node["KSampler"]().sample(model, 5, 3, 3.0, "euler", "simple", positive, negative, latent, 1.0)[0]


def test_router_and_gateway_make_the_stock_picture(ui, served):
    """Router, gateway with a LoRA tag, sampler, decode: the picture of the stock loaders, pixel for pixel."""
    before, stats = asked(served), served.info()["caches"]["lora"]["loras"].get(LORA, {"hits": 0, "misses": 0})
    loads = stats["hits"] + stats["misses"]
    model, clip, vae, _, _, name, status = router(ui)
    assert (name, "daemon |" in status) == ("tiny_sd3", True)
    pipe, *plain, metadata = gateway(ui, model, clip, vae, model_name=f"{name}.safetensors")
    parts = dict(zip(ui.node["LunaPipeOut"].RETURN_NAMES, ui.node["LunaPipeOut"]().unpack(pipe)))
    latent = sampled(ui, parts["model"], parts["positive"], parts["negative"], parts["latent"])
    mine = ui.node["VAEDecode"]().decode(parts["vae"], latent)[0]
    assert more(served, before) == {"clip.encode": 2, "vae.decode": 1}
    now = lora_figures(served)
    assert now["hits"] + now["misses"] == loads + 1

    model = ui.node["UNETLoader"]().load_unet(UNET, "default")[0]
    clip = ui.node["CLIPLoader"]().load_clip(CLIP, "sd3")[0]
    model, clip = ui.node["LoraLoader"]().load_lora(model, clip, LORA, 0.8, 0.5)
    encode, vae = ui.node["CLIPTextEncode"]().encode, ui.node["VAELoader"]().load_vae(VAE)[0]
    empty = {"samples": ui.torch.zeros(1, 16, 8, 16)}
    latent = sampled(ui, model, encode(clip, PROMPT)[0], encode(clip, "blurry")[0], empty)
    assert mine.shape == (1, 64, 128, 3) and ui.torch.equal(mine, ui.node["VAEDecode"]().decode(vae, latent)[0])
    assert plain[6:] == [5, 3, 3.0, "euler", "simple", 1.0]
    assert metadata["loras"] == "style:0.8:0.5" and metadata["positive_clean"] == PROMPT
    assert (metadata["model"], metadata["width"], metadata["seed"]) == ("tiny_sd3", 128, 5)
    json.dumps(metadata)


def test_the_gateway_takes_stacks_clip_skip_and_first_block_cache(ui, served):
    """A stack's LoRA is overruled by a tag of the same name; clip skip and cache are set on clones."""
    model, clip, vae, *_ = router(ui)
    found = gateway(
        ui, model, clip, vae, lora_stack=[("style", 0.1, 0.1)], clip_skip=-2, fb_cache_enabled=True,
        fb_cache_threshold=0.2,
    )  # fmt: skip
    from luna_daemon.wavespeed_utils import fb_cache_info

    assert found[-1]["loras"] == "style:0.8:0.5" and found[2].layer_idx == -2 and clip.layer_idx is None
    assert fb_cache_info(found[1]).method == "blocks" and fb_cache_info(model) is None
    with pytest.raises(BadRequest, match="no LoRA named 'absent'"):
        gateway(ui, model, clip, vae, positive_prompt="a cat <lora:absent:1>")


def test_the_router_says_what_is_missing(ui, served):
    """Encoders, precisions, GGUF, unserved outputs: each error names what and how to go on."""
    for changes, words in (
        ({"model_type": "Flux"}, r"Flux needs clip_3 \(T5-XXL\)"),
        ({"clip_1": "None"}, r"SD3 needs clip_1 \(CLIP-L\) or clip_2"),
        ({"dynamic_precision": "nf4"}, "dynamic_precision='nf4'"),
        ({"clip_1": "clip_gguf/qwen.gguf"}, "is GGUF, which is not served"),
    ):
        with pytest.raises(BadRequest, match=words):
            router(ui, **changes)
    _, _, vae, llm, vision, _, _ = router(ui, vae_name="None")
    with pytest.raises(AttributeError, match="output 'vae' is empty: vae_name is None"):
        ui.node["VAEDecode"]().decode(vae, {"samples": ui.torch.zeros(1, 16, 8, 8)})
    with pytest.raises(AttributeError, match="language models are not served"):
        llm.generate("a prompt")
    with pytest.raises(AttributeError, match="Load CLIP Vision"):
        ui.node["CLIPVisionEncode"]().encode(vision, pixels(ui, 1, 8, 8, 3), "none")


def test_a_checkpoint_carries_clip_and_vae(ui, models, served):
    """Router with everything None: CLIP and VAE are the checkpoint's, in the daemon; the tunnel finds them too."""
    name = "tiny.safetensors"
    if name not in ui.folders.get_filename_list("checkpoints"):
        make_checkpoint(ui, models, name)
    before = asked(served)
    _, clip, vae, *_ = router(ui, model_source="checkpoints", model_name=name, clip_1="None", vae_name="None")
    theirs = ui.node["CheckpointLoaderSimple"]().load_checkpoint(name)
    encode = ui.node["CLIPTextEncode"]().encode
    assert same(ui, encode(clip, PROMPT)[0], encode(theirs[1], PROMPT)[0])
    image = pixels(ui, 1, 64, 64, 3)
    assert ui.torch.equal(vae.encode(image), theirs[2].encode(image))
    assert more(served, before) == {"clip.encode": 1, "vae.encode": 1}


def make_checkpoint(ui, models, name):
    """One file with the tiny transformer, CLIP-L and the demo VAE, named as SD3's."""
    load = importlib.import_module("comfy.utils").load_torch_file
    parts = (("diffusion_models", UNET, "model.diffusion_model."), ("vae", VAE, "first_stage_model."))
    state = {p + k: v for kind, file, p in parts for k, v in load(str(models / kind / file)).items()}
    encoder = load(str(models / "text_encoders" / CLIP))
    state |= {f"text_encoders.clip_l.transformer.{key}": value for key, value in encoder.items()}
    save(ui, {key: value.contiguous() for key, value in state.items()}, models / "checkpoints" / name)


# --- the tunnel ---------------------------------------------------------------------------------------------------


class Graph:
    """What ComfyUI's DynamicPrompt is to a node."""

    def __init__(self, **nodes):
        self.nodes = nodes

    def get_node(self, number):
        kind, inputs = self.nodes[number]
        return {"class_type": kind, "inputs": inputs}


def test_the_tunnel_puts_the_daemon_under_stock_loaders(ui, served):
    """Followed back through a LoRA to the files: the same bits as the stock objects, computed by the daemon."""
    vae = ui.node["VAELoader"]().load_vae(VAE)[0]
    clip = ui.node["CLIPLoader"]().load_clip(CLIP, "sd3")[0]
    model, clip = ui.node["LoraLoader"]().load_lora(None, clip, LORA, 0.0, 0.5)
    clip = ui.node["CLIPSetLastLayer"]().set_last_layer(clip, -3)[0]
    graph = Graph(
        c=("CLIPLoader", {"clip_name": CLIP, "type": "sd3"}), o=("LoraLoader", {"clip": ["c", 0]}),
        s=("CLIPSetLastLayer", {"clip": ["o", 1]}), v=("VAELoader", {"vae_name": VAE}),
        t=("LunaCheckpointTunnel", {"clip": ["s", 0], "vae": ["v", 0]}),
    )  # fmt: skip
    before = asked(served)
    found = ui.node["LunaCheckpointTunnel"]().tunnel(model, clip, vae, graph, "t")
    encode, image = ui.node["CLIPTextEncode"]().encode, pixels(ui, 1, 64, 64, 3)
    assert found[0] is model and found[1] is not clip and found[2] is not vae
    assert same(ui, encode(found[1], PROMPT)[0], encode(clip, PROMPT)[0])
    assert ui.torch.equal(found[2].encode(image), vae.encode(image))
    assert more(served, before) == {"clip.encode": 1, "vae.encode": 1}


def test_the_tunnel_finds_files_by_their_contents(ui, served):
    """From loaders of other packs, which no workflow tells the file of."""
    vae = ui.node["VAELoader"]().load_vae(VAE)[0]
    clip = ui.node["CLIPLoader"]().load_clip(CLIP, "stable_diffusion")[0]
    found = ui.node["LunaCheckpointTunnel"]().tunnel(None, clip, vae)
    before = asked(served)
    assert same(ui, *(ui.node["CLIPTextEncode"]().encode(one, PROMPT)[0] for one in (found[1], clip)))
    latents = ui.torch.randn(1, 16, 8, 8)
    assert ui.torch.equal(found[2].decode(latents), vae.decode(latents))
    assert more(served, before) == {"clip.encode": 1, "vae.decode": 1}


def test_what_the_tunnel_cannot_match_passes_with_a_warning(ui, served, caplog):
    """Other weights than any file's, or another file than was loaded; shells pass without a word."""
    vae = ui.node["VAELoader"]().load_vae(VAE)[0]
    with ui.torch.no_grad():
        for parameter in vae.first_stage_model.parameters():
            parameter.data = parameter.data + 0.01
    graph = Graph(v=("VAELoader", {"vae_name": VAE}), t=("LunaCheckpointTunnel", {"vae": ["v", 0]}))
    clip = ui.node["LunaLoadCLIP"]().load_clip(CLIP, "sd3")[0]
    for arguments, words in (((), "none of ComfyUI's model files"), ((graph, "t"), "has changed since")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "luna_daemon"):
            found = ui.node["LunaCheckpointTunnel"]().tunnel(None, clip, vae, *arguments)
        assert found == (None, clip, vae) and len(caplog.records) == 1 and words in caplog.text


# --- without a daemon ---------------------------------------------------------------------------------------------


def test_without_a_daemon_the_stock_path_steps_in(ui, models, no_daemon, caplog):
    """The same bits, one warning for each object, which ComfyUI's windows show as a toast."""
    toasts = []
    server = SimpleNamespace(
        PromptServer=SimpleNamespace(instance=SimpleNamespace(send_sync=lambda *event: toasts.append(event)))
    )
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "luna_daemon"):
        patch.setitem(sys.modules, "server", server)
        vae, clip = ui.node["LunaLoadVAE"]().load_vae(VAE)[0], ui.node["LunaLoadCLIP"]().load_clip(CLIP, "sd3")[0]
        caplog.clear()
        image = pixels(ui, 1, 64, 64, 3)
        latents = [vae.encode(image), vae.encode(image)]
        conditioning = [ui.node["CLIPTextEncode"]().encode(clip, PROMPT)[0] for _ in range(2)]
    theirs = ui.node["VAELoader"]().load_vae(VAE)[0].encode(image)
    assert ui.torch.equal(latents[0], theirs) and ui.torch.equal(latents[1], theirs)
    stock = ui.node["CLIPLoader"]().load_clip(CLIP, "sd3")[0]
    assert all(same(ui, one, ui.node["CLIPTextEncode"]().encode(stock, PROMPT)[0]) for one in conditioning)
    ours = [record for record in caplog.records if record.name == "luna_daemon"]
    assert [record.levelname for record in ours] == ["WARNING"] * 2
    assert [name for name, _ in toasts] == ["luna.toast"] * 2
    assert all("the local model steps in" in event["detail"] for _, event in toasts)
    assert get_client().fallbacks == 4


def test_modes_decide_who_may_compute(ui, models, no_daemon):
    """force_daemon is an error that says what to do; force_local is ComfyUI's own; auto waits for the first use."""
    with pytest.raises(DaemonConnectionError, match="force_daemon and no Luna Daemon answers"):
        router(ui, daemon_mode="force_daemon")
    _, clip, vae, *_, status = router(ui, daemon_mode="force_local")
    assert type(clip) is ui.sd.CLIP and type(vae) is ui.sd.VAE and "local" in status
    assert "daemon away" in router(ui)[-1]


def test_a_forced_daemon_has_no_substitute(ui, daemon, monkeypatch, tmp_path):
    """force_daemon and the daemon goes away: the call fails, and nothing is loaded here."""
    use(monkeypatch, daemon.port, daemon.runtime_dir)
    vae = router(ui, daemon_mode="force_daemon")[2]
    use(monkeypatch, free_port(), tmp_path)
    with pytest.raises(DaemonConnectionError, match="no local model may step in"):
        vae.encode(pixels(ui, 1, 64, 64, 3))
    reset_clients()


# --- the daemon's own nodes, and starting it -----------------------------------------------------------------------


def test_status_and_free_models(ui, served):
    """The text names what is loaded; freeing passes anything through and leaves nothing loaded."""
    ui.node["LunaLoadVAE"]().load_vae(VAE)[0].encode(pixels(ui, 1, 64, 64, 3))
    shown = ui.node["LunaDaemonStatus"]().status()
    text, running = shown["result"]
    assert running and shown["ui"]["text"] == [text] and "vae:demo_vae" in text and "backend comfy" in text
    thing = object()
    assert ui.node["LunaFreeModels"]().free(thing) == (thing,)
    served.wait_for(lambda info: not info["models"]["loaded"])


def test_status_without_a_daemon(ui, models, no_daemon):
    """It says so instead of failing."""
    text, running = ui.node["LunaDaemonStatus"]().status()["result"]
    assert not running and text.startswith("no daemon answers")
    assert ui.node["LunaFreeModels"]().free(3) == (3,)


def test_example_workflows_use_nodes_that_are_there(ui, models):
    """Each node of each example is known, has that many widgets at most, and its links fit."""
    files = sorted((ROOT / "example_workflows").glob("*.json"))
    assert files
    for file in files:
        graph = json.loads(file.read_text("utf-8"))
        nodes = {node["id"]: node for node in graph["nodes"]}
        for node in nodes.values():
            assert node["type"] in ui.node or node["type"] == "Note", (file.name, node["type"])
        for _, source, slot, target, place, kind in graph["links"]:
            output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
            assert output["type"] == kind and entry["link"] is not None, (file.name, source, target)
            expected = ui.node[nodes[source]["type"]].RETURN_TYPES[slot]
            assert str(expected) == kind, (file.name, source, slot)
            fields = ui.node[nodes[target]["type"]].INPUT_TYPES()
            assert entry["name"] in {**fields["required"], **fields.get("optional", {})}
