"""Text encoders through the diffusers backend, against transformers' own modules in float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from luna_daemon.backends.diffusers.segmenters import find_segmenter
from luna_daemon.core import BadRequest, ModelLoadError, OutOfMemory

from .conftest import Load, clip_model, save, t5_model

pytest.importorskip("instant_clip_tokenizer")

PROMPT = "a (cat:1.4) on the moon"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name in "lg":
        weights = clip_model(name).state_dict()
        if name == "l":  # as in clip_l.safetensors
            del weights["text_projection.weight"]
        made[name] = save(tmp_path / f"{name}.safetensors", weights)
    t5 = {key: weight for key, weight in t5_model().state_dict().items() if "embed_tokens" not in key}
    made["t5xxl"] = save(tmp_path / "t5.safetensors", t5)
    return made


@pytest.fixture
def t5_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T5 tokenizer of letters."""

    def found(family: str, folder: Path | None) -> Any:
        return find_segmenter(family, folder) if family == "clip" else lambda text: [ord(c) % 200 for c in text]

    monkeypatch.setattr("luna_daemon.backends.diffusers.selection.find_segmenter", found)


def ids(chunks: list[list[tuple[int, float]]]) -> torch.Tensor:
    return torch.tensor([[token for token, _ in chunk] for chunk in chunks])


def interpolated(states: torch.Tensor, empty: torch.Tensor, chunks: list[list[tuple[int, float]]]) -> torch.Tensor:
    weights = torch.tensor([[weight for _, weight in chunk] for chunk in chunks])[..., None]
    return ((states - empty) * weights + empty).reshape(1, -1, states.shape[-1])


def clip_states(model: Any, chunks: list[list[tuple[int, float]]], pad: int, hidden: int | None) -> torch.Tensor:
    """Weighted states of a CLIP: a hidden layer's, or the last layer's normed output."""
    rows = torch.cat([ids(chunks), torch.tensor([[49406, 49407] + [pad] * 75])])
    with torch.inference_mode():
        out = model(rows, output_hidden_states=True)
    states = out.last_hidden_state if hidden is None else out.hidden_states[hidden]
    return interpolated(states[:-1], states[-1], chunks)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_sd15(files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["l"], type="sd15")
    tokens = model.tokenize(PROMPT)
    assert list(tokens) == ["l"] and len(tokens["l"][0]) == 77
    assert tokens["l"][0][:3] == [(49406, 1.0), (320, 1.0), (2368, 1.4)]
    result = model.encode(tokens, None, False)
    clip = clip_model("l")
    close(result["cond"], clip_states(clip, tokens["l"], 49407, None))
    end = [token for token, _ in tokens["l"][0]].index(49407)
    close(result["pooled_output"], clip(ids(tokens["l"])).last_hidden_state[:, end].detach())


def test_layers(files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["l"], type="sd15")
    tokens = model.tokenize("a cat")
    clip = clip_model("l")
    with torch.inference_mode():
        hidden = clip(ids(tokens["l"]), output_hidden_states=True).hidden_states
        penultimate = clip.text_model.final_layer_norm(hidden[-2])
    last = model.encode(tokens, None, False)["cond"]
    close(model.encode(tokens, -2, False)["cond"], penultimate)
    assert torch.equal(model.encode(tokens, -1, False)["cond"], last)
    assert torch.equal(model.encode(tokens, -24, False)["cond"], last)
    assert not torch.allclose(last, penultimate, atol=1e-3)
    with pytest.raises(BadRequest, match="layer is 3"):
        model.encode(tokens, 3, False)


def test_sdxl(files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["g"], files["l"], type="sdxl")
    assert model.properties()["cond_dim"] == 64 and model.properties()["pooled_dim"] == 32
    tokens = model.tokenize(PROMPT)
    assert tokens["g"][0][-1] == (0, 1.0) and tokens["l"][0][-1] == (49407, 1.0)
    result = model.encode(tokens, None, False)
    expected = [clip_states(clip_model(name), tokens[name], pad, -2) for name, pad in (("l", 49407), ("g", 0))]
    close(result["cond"], torch.cat(expected, dim=-1))
    end = [token for token, _ in tokens["g"][0]].index(49407)
    clip = clip_model("g")
    with torch.inference_mode():
        raw = clip(ids(tokens["g"]), output_hidden_states=True).last_hidden_state[:, end]
        close(result["pooled_output"], clip.text_projection(raw))
    close(model.encode(tokens, None, True)["pooled_output"], raw)


def test_three_chunks_are_joined_and_the_first_is_pooled(files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["l"], type="sd15")
    tokens = model.tokenize("a red castle on a hill, " * 25)
    assert len(tokens["l"]) == 3
    result = model.encode(tokens, None, False)
    assert result["cond"].shape == (1, 231, 32)
    first = model.encode({"l": tokens["l"][:1]}, None, False)
    close(result["cond"][:, :77], first["cond"])
    close(result["pooled_output"], first["pooled_output"])


def test_refiner_has_clip_g_alone(files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["g"], type="sdxl")
    tokens = model.tokenize(PROMPT)
    close(model.encode(tokens, None, False)["cond"], clip_states(clip_model("g"), tokens["g"], 0, -2))


def test_t5_in_float16_computes_in_float32(files: dict[str, Path], load: Load, t5_ids: None) -> None:
    model = load("clip", files["l"], files["t5xxl"], type="flux")
    tokens = model.tokenize(PROMPT)
    assert len(tokens["t5xxl"][0]) == 256
    t5 = t5_model()
    with torch.inference_mode():
        states = t5(ids(tokens["t5xxl"])).last_hidden_state
        empty = t5(torch.tensor([[1] + [0] * 255])).last_hidden_state
    result = model.encode(tokens, None, False)
    close(result["cond"], interpolated(states, empty, tokens["t5xxl"]))
    assert result["pooled_output"].shape == (1, 32)


def test_sd3_pads_clip_and_appends_t5(files: dict[str, Path], load: Load, t5_ids: None) -> None:
    model = load("clip", files["t5xxl"], files["l"], files["g"], type="sd3")
    tokens = model.tokenize("a cat")
    result = model.encode(tokens, None, False)
    assert result["cond"].shape == (1, 77 + 77, 64)
    sdxl = load("clip", files["l"], files["g"], type="sdxl").encode(tokens, None, False)
    close(result["cond"][:, :77], sdxl["cond"])
    assert torch.equal(result["pooled_output"][:, 32:], sdxl["pooled_output"])
    only_t5 = model.encode({"l": [], "g": [], "t5xxl": tokens["t5xxl"]}, None, False)
    assert torch.equal(only_t5["cond"], result["cond"][:, 77:])
    assert only_t5["pooled_output"].shape == (1, 2048) and not only_t5["pooled_output"].any()


def test_missing_clip_l_counts_as_zeros_in_sd3(files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["g"], type="sd3")
    result = model.encode(model.tokenize("a cat"), None, False)
    assert result["cond"].shape == (1, 77, 4096)
    assert not result["cond"][..., :768].any() and result["cond"][..., 768:800].any()
    assert result["pooled_output"].shape == (1, 768 + 32)


def open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Hugging Face CLIP renamed to open_clip's layout."""
    out: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        key = key.removeprefix("text_model.").replace("encoder.layers.", "transformer.resblocks.")
        for new, old in (
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm", "ln_final"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):
            key = key.replace(new, old)
        if key == "text_projection.weight":
            key, weight = "text_projection", weight.T
        if "self_attn.q_proj" in key:
            kind = key.rsplit(".", 1)[1]
            source = "text_model." + key.replace("transformer.resblocks.", "encoder.layers.")
            parts = [weights[source.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            key, weight = key.split("self_attn")[0] + f"attn.in_proj_{kind}", torch.cat(parts)
        if "self_attn" not in key:
            out[key] = weight
    return out


def test_an_sdxl_checkpoint_has_both(files: dict[str, Path], tmp_path: Path, load: Load) -> None:
    from safetensors.torch import load_file

    tensors = {f"conditioner.embedders.0.transformer.{k}": w for k, w in load_file(files["l"]).items()}
    tensors |= {f"conditioner.embedders.1.model.{k}": w for k, w in open_clip(load_file(files["g"])).items()}
    tensors["model.diffusion_model.x"] = torch.zeros(1)
    inside = load("clip", save(tmp_path / "checkpoint.safetensors", tensors), type="sdxl")
    apart = load("clip", files["g"], files["l"], type="sdxl")
    tokens = apart.tokenize(PROMPT)
    assert inside.tokenize(PROMPT) == tokens
    for key, value in apart.encode(tokens, None, False).items():
        close(inside.encode(tokens, None, False)[key], value)


def test_a_pipeline_folder_has_both(files: dict[str, Path], tmp_path: Path, load: Load) -> None:
    # transformers 5 leaves the prefix out of what it saves.
    save(tmp_path / "pipe" / "text_encoder" / "model.safetensors", clip_model("l").text_model.state_dict())
    save(tmp_path / "pipe" / "text_encoder_2" / "model.safetensors", clip_model("g").state_dict())
    whole = load("clip", tmp_path / "pipe", type="sdxl")
    apart = load("clip", files["g"], files["l"], type="sdxl")
    tokens = apart.tokenize(PROMPT)
    assert torch.equal(whole.encode(tokens, None, False)["cond"], apart.encode(tokens, None, False)["cond"])


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ({"l": [[(49408, 1.0)]]}, "token 49408"),
        ({"l": [[(-1, 1.0)]]}, "token -1"),
        ({"l": [[(1, 1.0)] * 78]}, r"\[78\] tokens"),
        ({"l": [[(1, 1.0)], [(1, 1.0)] * 2]}, r"\[1, 2\] tokens"),
        ({"g": [[(1, 1.0)]]}, "lack encoder l"),
    ],
)
def test_bad_tokens_are_named(tokens: Any, named: str, files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["l"], type="sd15")
    with pytest.raises(BadRequest, match=named):
        model.encode(tokens, None, False)


def test_no_memory(files: dict[str, Path], load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**arguments: Any) -> Any:
        return torch.empty(10**15)

    model = load("clip", files["l"], type="sd15")
    monkeypatch.setattr(model._encoders["l"], "_model", full)
    with pytest.raises(OutOfMemory, match="encoding 1 chunks with l on cpu"):
        model.encode(model.tokenize("a cat"), None, False)


def test_no_chunks_encode_the_empty_prompt(files: dict[str, Path], load: Load) -> None:
    model = load("clip", files["l"], type="sd15")
    assert model.encode({"l": []}, None, False)["cond"].shape == (1, 2, 32)


def test_precision_decides_what_is_kept_not_what_is_computed_with(files: dict[str, Path], load: Load) -> None:
    half = load("clip", files["l"], type="sd15")
    full = load("clip", files["l"], type="sd15", precision="fp32")
    assert full.nbytes == 2 * half.nbytes
    tokens = half.tokenize(PROMPT)
    close(full.encode(tokens, None, False)["cond"], half.encode(tokens, None, False)["cond"])


def test_umt5_is_not_taken_for_t5(files: dict[str, Path], tmp_path: Path, load: Load, t5_ids: None) -> None:
    from safetensors.torch import load_file

    weights = load_file(files["t5xxl"])
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    path = save(tmp_path / "umt5.safetensors", weights | {bias.format(1): weights[bias.format(0)]})
    with pytest.raises(ModelLoadError, match="a umT5 text encoder"):
        load("clip", path, type="sd3")


def test_float8_t5(files: dict[str, Path], tmp_path: Path, load: Load, t5_ids: None) -> None:
    from safetensors.torch import load_file, save_file

    small = {key: weight.to(torch.float8_e4m3fn) for key, weight in load_file(files["t5xxl"]).items()}
    save_file(small, tmp_path / "fp8.safetensors")
    model = load("clip", tmp_path / "fp8.safetensors", type="sd3")
    assert model.properties()["dtype"] == "float8_e4m3fn"
    wide = load("clip", save(tmp_path / "w.safetensors", {k: w.half() for k, w in small.items()}), type="sd3")
    tokens = model.tokenize("a cat")
    assert torch.equal(model.encode(tokens, None, False)["cond"], wide.encode(tokens, None, False)["cond"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_the_mapped_file(files: dict[str, Path], load: Load) -> None:
    """Processes that load one file share its pages only if no weight was copied out of it."""
    model = load("clip", files["g"], files["l"], type="sdxl")
    model.encode(model.tokenize("a cat"), None, False)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith((str(files["g"]), str(files["l"]))):
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            ranges.append((begin, end))
    addresses = [p.data_ptr() for e in model._encoders.values() for p in e._model.parameters()]
    assert len(addresses) == 2 * 3 + 34 * 16 + 2
    assert all(any(begin <= address < end for begin, end in ranges) for address in addresses)


def test_no_tokenizer_says_what_to_give(files: dict[str, Path], load: Load) -> None:
    with pytest.raises(ModelLoadError, match=r"no T5 tokenizer found.*COMFYUI_PATH") as error:
        load("clip", files["l"], files["t5xxl"], type="flux")
    assert "pip install" not in error.value.hint


def test_importing_the_backend_imports_no_torch() -> None:
    code = "import sys, luna_daemon.backends.diffusers.backend; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
