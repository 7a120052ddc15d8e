"""What is not a model of the wanted kind: every error names the file and what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.make_text_encoder import to_ldm
from luna_daemon.core import ConfigError, ModelLoadError

from .conftest import Load, clip_model, kl_weights, save


def fails(load: Load, kind: str, path: Path, named: str, type: str = "sdxl") -> None:
    with pytest.raises(ModelLoadError, match=named) as error:
        load(kind, path, type=type)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["vae", "clip"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b"abc", "a text file"),
        (b"<!DOCTYPE html><html>", "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a text file"),
        (b"\x80\x02}q\x00.", "a PyTorch pickle"),
        (b"PK\x03\x04" + bytes(30), "a PyTorch pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(30), "a GGUF file"),
        (b"\xff" * 40, "not a valid safetensors file: its header would have .* of another format"),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00{}", "the file has 10: it is cut short"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "its header is not a JSON object"),
        (b'\x08\x00\x00\x00\x00\x00\x00\x00{"a": 1}', "tensor 'a' is described by 1"),
    ],
)
def test_not_a_model(kind: str, content: bytes, named: str, tmp_path: Path, load: Load) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    fails(load, kind, path, named)


def test_missing(tmp_path: Path, load: Load) -> None:
    fails(load, "vae", tmp_path / "nothing.safetensors", "No such file")


def test_truncated(tmp_path: Path, load: Load) -> None:
    path = save(tmp_path / "vae.safetensors", to_ldm(kl_weights()))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    fails(load, "vae", path, f"truncated: {len(whole) - 1} bytes of {len(whole)}")
    path.write_bytes(whole[:100])
    fails(load, "vae", path, "cut short")


def test_folders_without_weights(tmp_path: Path, load: Load) -> None:
    fails(load, "vae", tmp_path, "no .safetensors file; found nothing")
    (tmp_path / "readme.md").write_text("hello")
    fails(load, "clip", tmp_path, "found readme.md")


def test_a_text_encoder_is_not_a_vae(tmp_path: Path, load: Load) -> None:
    path = save(tmp_path / "vae.safetensors", clip_model("l").state_dict())
    fails(load, "vae", path, "a CLIP-L text encoder, not a VAE")


def test_a_vae_is_not_a_text_encoder(tmp_path: Path, load: Load) -> None:
    path = save(tmp_path / "clip_l.safetensors", to_ldm(kl_weights()))
    fails(load, "clip", path, "is a VAE, not a text encoder")


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lora_te_text_model.lora_up.weight", "a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a diffusion model without"),
        ("strange.weight", r"1 tensors of an unknown layout \(strange\)"),
    ],
)
def test_other_files(key: str, named: str, tmp_path: Path, load: Load) -> None:
    fails(load, "vae", save(tmp_path / "x.safetensors", {key: torch.zeros(2)}), named)


def test_a_vae_that_lacks_weights(tmp_path: Path, load: Load) -> None:
    weights = to_ldm(kl_weights())
    del weights["decoder.conv_out.bias"]
    fails(load, "vae", save(tmp_path / "x.safetensors", weights), "lacks 1 of .* decoder.conv_out.bias")


@pytest.mark.parametrize(
    ("key", "weight"),
    [
        ("decoder.conv_in.weight", torch.zeros(8, 16, 3, 3, 3)),
        ("decoder.conv_in.weight", torch.zeros(8, 32, 3, 3)),
        ("decoder.mid.block_1.mix_factor", torch.zeros(1)),
    ],
)
def test_a_vae_of_another_family(key: str, weight: torch.Tensor, tmp_path: Path, load: Load) -> None:
    path = save(tmp_path / "x.safetensors", to_ldm(kl_weights()) | {key: weight})
    fails(load, "vae", path, "a VAE of another family")


def test_half_a_vae(tmp_path: Path, load: Load) -> None:
    weights = {key: weight for key, weight in to_ldm(kl_weights()).items() if not key.startswith("encoder")}
    fails(load, "vae", save(tmp_path / "x.safetensors", weights), "a VAE without its encoder")


@pytest.mark.parametrize(
    ("names", "family", "named"),
    [
        ("l", "sdxl", "sdxl needs the g encoder and the l encoder; the files have l only"),
        ("g", "sd15", "a CLIP-G text encoder, which sd15 does not use"),
        ("l", "flux", "flux needs the l encoder and the t5xxl encoder"),
        ("ll", "sdxl", "a second l encoder"),
    ],
)
def test_wrong_encoders(names: str, family: str, named: str, tmp_path: Path, load: Load) -> None:
    files = [save(tmp_path / f"{i}.safetensors", clip_model(name).state_dict()) for i, name in enumerate(names)]
    with pytest.raises(ModelLoadError, match=named):
        load("clip", *files, type=family)


def test_clip_g_without_its_projection(tmp_path: Path, load: Load) -> None:
    weights = clip_model("g").state_dict()
    del weights["text_projection.weight"]
    fails(load, "clip", save(tmp_path / "g.safetensors", weights), "lacks text_projection.weight")


def test_unknown_family_and_kind(tmp_path: Path, load: Load) -> None:
    path = save(tmp_path / "l.safetensors", clip_model("l").state_dict())
    with pytest.raises(ConfigError, match="type is 'hunyuan', must be one of sd15, sdxl, sd3, flux"):
        load("clip", path, type="hunyuan")
    with pytest.raises(ModelLoadError, match="kind 'echo'"):
        load("echo", path)
