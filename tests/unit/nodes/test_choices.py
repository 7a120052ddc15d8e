"""What nodes offer and require: names, defaults, files behind names, and errors that say what is missing."""

from __future__ import annotations

import json
import operator

import pytest

from luna_daemon.core import BadRequest, DaemonConnectionError, ModelLoadError

ROUTER = [
    "model_source", "model_name", "model_type", "dynamic_precision", "clip_1", "clip_2", "clip_3", "clip_4", "vae_name",
    "daemon_mode",
]  # fmt: skip
GATEWAY = [
    "model", "clip", "vae", "width", "height", "batch_size", "seed", "steps", "cfg", "denoise", "clip_skip",
    "clip_skip_timing", "sampler", "scheduler",
]  # fmt: skip


def test_inputs_have_the_shape_that_comfyui_expects(pack, comfyui):
    """Tables of ``(type,)`` or ``(type, options)``, with defaults that may be chosen, and tooltips."""
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        json.dumps(inputs)
        assert set(inputs) <= {"required", "optional", "hidden"} and "required" in inputs
        for field, (kind, options) in {**inputs["required"], **inputs.get("optional", {})}.items():
            assert options["tooltip"], (name, field)
            if isinstance(kind, list) and kind and "default" in options:
                assert options["default"] in kind, (name, field)
        assert callable(getattr(node(), node.FUNCTION)) and node.DESCRIPTION and node.SEARCH_ALIASES


def test_the_routers_interface_is_that_of_saved_workflows(pack, comfyui):
    """Names, order, values and outputs."""
    node = pack.NODE_CLASS_MAPPINGS["LunaModelRouter"]
    inputs = node.INPUT_TYPES()
    assert list(inputs["required"]) == ROUTER and list(inputs["optional"]) == ["local_weights_dir"]
    assert inputs["required"]["model_source"][0] == ["checkpoints", "diffusion_models", "unet"]
    assert inputs["required"]["model_type"][0] == [
        "SD1.5", "SDXL", "SDXL + Vision", "Flux", "Flux + Vision", "SD3", "Z-IMAGE",
    ]  # fmt: skip
    assert inputs["required"]["dynamic_precision"][0][:4] == ["None", "bf16", "fp16", "fp8_e4m3fn"]
    assert inputs["required"]["daemon_mode"][0] == ["auto", "force_daemon", "force_local"]
    assert inputs["required"]["model_name"][0] == ["None", "base.safetensors", "both.safetensors", "flux.gguf"]
    assert inputs["required"]["clip_1"][0] == [
        "None", "clip_g.safetensors", "clip_l.safetensors", "LLM/qwen/model.safetensors", "LLM/qwen/notes.txt",
    ]  # fmt: skip
    assert node.RETURN_TYPES == ("MODEL", "CLIP", "VAE", "LLM", "CLIP_VISION", "STRING", "STRING")


def test_the_gateways_widgets_keep_their_order(pack, comfyui):
    """Saved workflows keep values by position."""
    node = pack.NODE_CLASS_MAPPINGS["LunaConfigGateway"]
    assert list(node.INPUT_TYPES()["required"]) == GATEWAY
    assert list(node.INPUT_TYPES()["optional"])[-2:] == ["positive_prompt", "negative_prompt"]
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == 14 and node.RETURN_NAMES[0] == "luna_pipe"


def test_the_loaders_offer_what_the_stock_loaders_offer(pack, comfyui):
    """Old nodes' lists and new nodes' options, each type once; ``none`` for encoders that are not needed."""
    vae = pack.NODE_CLASS_MAPPINGS["LunaLoadVAE"].INPUT_TYPES()["required"]["vae_name"][0]
    assert vae == ["sdxl.safetensors", "taesd", "pixel_space"]
    inputs = pack.NODE_CLASS_MAPPINGS["LunaLoadCLIP"].INPUT_TYPES()["required"]
    assert inputs["type"][0] == ["stable_diffusion", "sd3", "sdxl", "flux"]
    assert "none" not in inputs["clip_name1"][0] and inputs["clip_name4"][0][0] == "none"


def test_any_type_fits_every_other(part):
    """ComfyUI compares with ``!=``."""
    anything = part("host").ANY
    assert operator.ne(anything, "MODEL") is False and json.dumps(anything) == '"*"'


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("sdxl.safetensors", ["vae/sdxl.safetensors"]),
        ("taesd", ["vae_approx/taesd_encoder.pth", "vae_approx/taesd_decoder.pth"]),
        ("taew2_1.safetensors", ["vae_approx/taew2_1.safetensors"]),
        ("pixel_space", []),
    ],
)
def test_a_vaes_name_means_files(part, comfyui, name, files):
    """One, the two of a TAESD, or none."""
    assert part("models").vae_files(name) == [str(comfyui.models / file) for file in files]


def test_a_vae_that_is_not_there(part, comfyui):
    """ComfyUI's own words."""
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        part("models").vae_files("gone.safetensors")


CHOSEN = {
    ("SD1.5", "a", "None", "None", "None"): ["a"],
    ("SDXL", "a", "b", "None", "None"): ["a", "b"],
    ("SDXL + Vision", "a", "b", "None", "v"): ["a", "b"],
    ("Flux", "a", "ignored", "c", "None"): ["a", "c"],
    ("SD3", "None", "None", "c", "None"): ["c"],
    ("SD3", "a", "b", "c", "d"): ["a", "b", "c"],
    ("Z-IMAGE", "q", "None", "None", "None"): ["q"],
}


@pytest.mark.parametrize(("given", "wanted"), CHOSEN.items(), ids=str)
def test_a_model_type_takes_its_slots(part, given, wanted):
    """In the loader's order; what it does not need is left out."""
    assert part("loaders.encoders").clip_slots(given[0], given[1:]) == wanted


@pytest.mark.parametrize(
    ("kind", "chosen", "words"),
    [
        ("SDXL", ("a", "None", "None", "None"), r"SDXL needs clip_2 \(CLIP-G\)"),
        ("Flux", ("None",) * 4, r"Flux needs clip_1 \(CLIP-L\) and clip_3 \(T5-XXL\)"),
        ("SD3", ("None",) * 4, r"clip_1 \(CLIP-L\) or clip_2 \(CLIP-G\) or clip_3"),
        ("SD9", ("a",), "model_type='SD9' is unknown.*SD1.5"),
    ],
)
def test_missing_encoders_are_named(part, kind, chosen, words):
    """Each with its slot."""
    with pytest.raises(BadRequest, match=words):
        part("loaders.encoders").clip_slots(kind, chosen)


def test_a_checkpoint_may_bring_its_own_encoders(part):
    """If none is chosen; some chosen and some not is still an error."""
    slots = part("loaders.encoders").clip_slots
    assert slots("SDXL", ("None", "None", "None", "vision"), from_checkpoint=True) == []
    with pytest.raises(BadRequest, match="To use the checkpoint's own, set all of them to None"):
        slots("SDXL", ("a", "None", "None", "None"), from_checkpoint=True)


def test_encoders_below_other_folders(part, comfyui):
    """``folder/name`` as the router lists it; GGUF and missing files are named."""
    path = part("loaders.encoders").clip_path
    assert path("LLM/qwen/model.safetensors") == str(comfyui.models / "LLM/qwen/model.safetensors")
    assert path("clip_l.safetensors") == str(comfyui.models / "text_encoders/clip_l.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        path("LLM/absent.safetensors")
    with pytest.raises(BadRequest, match="GGUF"):
        path("clip_gguf/qwen.gguf")


def test_a_model_is_found_in_its_source_first(part, comfyui):
    """Then in the others."""
    folder = part("loaders.diffusion").model_folder
    assert folder("diffusion_models", "both.safetensors") == "diffusion_models"
    assert folder("checkpoints", "both.safetensors") == "checkpoints"
    assert folder("diffusion_models", "base.safetensors") == "checkpoints"
    assert folder("unet", "flux.gguf") == "unet_gguf" and folder("unet", "absent") == "unet"


def test_gguf_needs_its_node_pack(part, comfyui, monkeypatch):
    """Asked for when it is needed, since packs load in any order."""
    diffusion = part("loaders.diffusion")
    monkeypatch.setattr(diffusion, "wrap_model_for_inference", lambda model: ("wrapped", model))
    with pytest.raises(BadRequest, match="ComfyUI-GGUF is missing"):
        diffusion.load_diffusion("unet", "flux.gguf")

    class Loader:
        def load_unet(self, name):
            return (name,)

    monkeypatch.setitem(comfyui.nodes, "UnetLoaderGGUF", Loader)
    assert diffusion.load_diffusion("unet", "flux.gguf") == ("wrapped", "flux.gguf")
    with pytest.raises(BadRequest, match="does not apply to the GGUF file"):
        diffusion.load_diffusion("unet", "flux.gguf", "bf16")


class Shells:
    """Stands in for the module that makes shells."""

    def __init__(self, error=None):
        self.error = error

    def make_vae(self, files, source):
        if self.error:
            raise self.error
        return source


@pytest.mark.parametrize(
    ("mode", "error", "found"),
    [
        ("auto", None, "stock sdxl.safetensors"),
        ("auto", ModelLoadError("odd"), "stock sdxl.safetensors"),
        ("force_local", None, "stock sdxl.safetensors"),
        ("force_daemon", None, DaemonConnectionError),
        ("force_daemon", ModelLoadError("odd"), ModelLoadError),
    ],
)
def test_modes_decide_what_steps_in(part, comfyui, monkeypatch, caplog, mode, error, found):
    """The shell's local model is the stock loader's; with force_daemon there is none."""
    models = part("models")
    monkeypatch.setattr(models, "_shells", lambda: Shells(error))

    def load():
        vae = models.load_vae("sdxl.safetensors", mode)
        return vae() if callable(vae) else vae

    if isinstance(found, str):
        assert load() == found
    else:
        with pytest.raises(found):
            load()
    assert ("without the daemon: odd" in caplog.text) == (mode == "auto" and error is not None)


def test_a_vae_without_a_file_is_comfyuis(part, comfyui):
    """``pixel_space``."""
    assert part("models").load_vae("pixel_space") == "stock pixel_space"


def test_an_output_that_is_not_served_says_so(part):
    """Whatever a node does with it; ComfyUI may look it over."""
    nothing = part("not_served").NotServed("llm", "use another")
    for use in (lambda: nothing.generate("x"), lambda: nothing(1), lambda: nothing["cond"]):
        with pytest.raises((AttributeError, TypeError), match="output 'llm' is empty: use another"):
            use()
    assert not hasattr(nothing, "get_ram_usage") and "llm" in repr(nothing)
