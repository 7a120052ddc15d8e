"""VAEs through the diffusers backend: layouts, ComfyUI's conventions, memory running out."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.make_text_encoder import to_ldm
from luna_daemon.backends.diffusers import autoencoders
from luna_daemon.core import BadRequest, ConfigError, ModelLoadError, OutOfMemory, RequestCancelled
from luna_daemon.wire.messages import Tiling

from .conftest import Load, kl_weights, no_step, save, tiny_halves

PIXELS = torch.rand(2, 35, 42, 3, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def kl(tmp_path: Path, load: Load) -> Any:
    return load("vae", save(tmp_path / "vae.safetensors", to_ldm(kl_weights())))


@cache
def reference(channels: int = 4) -> Any:
    """The model the files were made from, with the files' float16 rounding."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )
    model.load_state_dict({key: weight.half().float() for key, weight in kl_weights(channels).items()})
    return model.eval()


def ldm(path: Path) -> Path:
    return save(path / "a.safetensors", to_ldm(kl_weights()))


def checkpoint(path: Path) -> Path:
    return save(path / "b.safetensors", to_ldm(kl_weights()), "first_stage_model.")


def diffusers_file(path: Path) -> Path:
    return save(path / "c.safetensors", kl_weights())


def old_diffusers_file(path: Path) -> Path:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = kl_weights()
    for new, old in names.items():
        weights = {key.replace(f".{new}.", f".{old}."): weight for key, weight in weights.items()}
    return save(path / "d.safetensors", weights)


def folder(path: Path) -> Path:
    save(path / "model" / "diffusion_pytorch_model.safetensors", kl_weights())
    wrong = {key: weight + 1 for key, weight in kl_weights().items()}
    save(path / "model" / "diffusion_pytorch_model.fp16.safetensors", wrong)
    (path / "model" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    return path / "model"


def pipeline(path: Path) -> Path:
    save(path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors", kl_weights())
    return path / "pipe"


@pytest.mark.parametrize("make", [ldm, checkpoint, diffusers_file, old_diffusers_file, folder, pipeline])
def test_every_layout_gives_the_same_vae(make: Callable[[Path], Path], tmp_path: Path, load: Load) -> None:
    vae = load("vae", make(tmp_path))
    model = reference()
    with torch.inference_mode():
        images = (PIXELS[:1, 1:33, 1:41] * 2 - 1).movedim(-1, 1)
        latents = model.encode(images).latent_dist.mode()
        pixels = ((model.decode(LATENTS[:1]).sample + 1) / 2).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(vae.encode(PIXELS[:1], None, no_step)[0], latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(LATENTS[:1], None, no_step)[0], pixels, rtol=1e-5, atol=1e-5)


def test_sixteen_channels_without_quant_convolutions(tmp_path: Path, load: Load) -> None:
    vae = load("vae", save(tmp_path / "flux.safetensors", to_ldm(kl_weights(16))))
    assert vae.properties()["latent_channels"] == 16
    latents = torch.randn(1, 16, 4, 4)
    with torch.inference_mode():
        pixels = ((reference(16).decode(latents).sample + 1) / 2).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(vae.decode(latents, None, no_step)[0], pixels, rtol=1e-5, atol=1e-5)


def test_properties_and_results(kl: Any) -> None:
    assert kl.properties() == {
        "latent_channels": 4,
        "downscale_ratio": 8,
        "upscale_ratio": 8,
        "dtype": "float32",
        "device": "cpu",
        "class": "AutoencoderKL",
    }
    assert kl.nbytes == sum(weight.numel() for weight in kl_weights().values()) * 4
    latents, notes = kl.encode(PIXELS, None, no_step)
    assert (latents.shape, latents.dtype, notes) == ((2, 4, 4, 5), torch.float32, [])
    pixels, notes = kl.decode(LATENTS, None, no_step)
    assert (pixels.shape, pixels.dtype, notes) == ((2, 32, 40, 3), torch.float32, [])
    assert latents.is_contiguous() and pixels.is_contiguous()
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_a_batch_is_its_images_one_by_one(kl: Any) -> None:
    steps: list[tuple[int, int]] = []
    batch, _ = kl.decode(LATENTS, None, lambda d, t: steps.append((d, t)))
    assert torch.equal(batch[1:], kl.decode(LATENTS[1:], None, no_step)[0])
    assert steps == [(0, 2), (1, 2)]


def test_an_alpha_channel_is_dropped(kl: Any) -> None:
    rgba = torch.cat([PIXELS, torch.zeros(2, 35, 42, 1)], dim=-1)
    assert torch.equal(kl.encode(rgba, None, no_step)[0], kl.encode(PIXELS, None, no_step)[0])


def test_inputs_stay_as_they_were(kl: Any) -> None:
    pixels, latents = PIXELS.clone(), LATENTS.clone()
    kl.encode(pixels, None, no_step)
    kl.decode(latents, Tiling(4, 4, 1), no_step)
    assert torch.equal(pixels, PIXELS) and torch.equal(latents, LATENTS)


def test_tiles_that_cover_everything_change_nothing_much(kl: Any) -> None:
    tiled, notes = kl.decode(LATENTS, Tiling(64, 64, 16), no_step)
    torch.testing.assert_close(tiled, kl.decode(LATENTS, None, no_step)[0], rtol=1e-6, atol=1e-6)
    assert notes == []
    small, _ = kl.decode(LATENTS, Tiling(4, 4, 1), no_step)
    assert small.shape == tiled.shape and not torch.allclose(small, tiled, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 4, 5), (1, 16, 4, 4), (1, 4, 4, 4, 4), (0, 4, 4, 4)])
def test_wrong_latents_are_named(kl: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest, match=r"latents have shape \["):
        kl.decode(torch.zeros(shape), None, no_step)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 1), (1, 7, 32, 3), (0, 32, 32, 3)])
def test_wrong_pixels_are_named(kl: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest, match=r"pixels have shape \["):
        kl.encode(torch.zeros(shape), None, no_step)


def test_short_of_memory_it_tiles_and_says_so(kl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = kl._decode
    calls: list[tuple[int, ...]] = []

    def scarce(latents: torch.Tensor) -> Any:
        calls.append(tuple(latents.shape))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return original(latents)

    monkeypatch.setattr(kl, "_decode", scarce)
    pixels, notes = kl.decode(LATENTS, None, no_step)
    assert notes == ["decoded in tiles: not enough memory for one pass"]
    assert len(calls) == 1 + 3 * 2
    monkeypatch.setattr(kl, "_decode", original)
    assert torch.equal(pixels, kl.decode(LATENTS, Tiling(), no_step)[0])


def test_no_memory_even_for_tiles(kl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(kl, "_encode", full)
    with pytest.raises(OutOfMemory, match="512x512"):
        kl.encode(PIXELS, None, no_step)


def test_other_errors_are_not_taken_for_a_lack_of_memory(kl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(kl, "_encode", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        kl.encode(PIXELS, None, no_step)


def test_leaving_passes_through(kl: Any) -> None:
    def leave(done: int, total: int) -> None:
        raise RequestCancelled("gone")

    with pytest.raises(RequestCancelled):
        kl.decode(LATENTS, None, leave)


# --- TAESD -------------------------------------------------------------------------------------------------------


def combined(path: Path, channels: int, scale: tuple[float, float] | None) -> Path:
    encoder, decoder = tiny_halves(channels)
    weights = {f"taesd_encoder.{key}": weight for key, weight in encoder.items()}
    weights |= {f"taesd_decoder.{key}": weight for key, weight in decoder.items()}
    if scale is not None:
        weights |= {"vae_scale": torch.tensor(scale[0]), "vae_shift": torch.tensor(scale[1])}
    return save(path / "combined.safetensors", weights, half=False)


def test_tiny_scale_comes_from_the_file(tmp_path: Path, load: Load) -> None:
    from diffusers import AutoencoderTiny

    scale, shift = 1.5, 0.25
    vae = load("vae", combined(tmp_path, 16, (scale, shift)), type="sd15")
    torch.manual_seed(16)
    model = AutoencoderTiny(latent_channels=16).eval()
    latents = torch.randn(1, 16, 4, 4)
    with torch.inference_mode():
        images = model.decode((latents - shift) * scale).sample
        encoded = model.encode((PIXELS[:1, 1:33, 1:41] * 2 - 1).movedim(-1, 1)).latents / scale + shift
    expected = ((images + 1) / 2).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(vae.decode(latents, None, no_step)[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vae.encode(PIXELS[:1], None, no_step)[0], encoded, rtol=1e-5, atol=1e-6)
    assert vae.properties()["latent_channels"] == 16


@pytest.mark.parametrize(("type", "name"), [("sdxl", "x"), ("", "taesdxl")])
def test_tiny_pair_takes_the_familys_scale(type: str, name: str, tmp_path: Path, load: Load) -> None:
    encoder, decoder = tiny_halves()
    pair = [
        save(tmp_path / f"{name}_decoder.safetensors", decoder, half=False),
        save(tmp_path / f"{name}_encoder.safetensors", encoder, half=False),
    ]
    both = load("vae", *pair, type=type)
    same = load("vae", combined(tmp_path, 4, autoencoders.TINY_SCALES["sdxl"]))
    assert torch.equal(both.decode(LATENTS, None, no_step)[0], same.decode(LATENTS, None, no_step)[0])
    assert torch.equal(both.encode(PIXELS, None, no_step)[0], same.encode(PIXELS, None, no_step)[0])


def test_tiny_folder(tmp_path: Path, load: Load) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(4)
    AutoencoderTiny().save_pretrained(tmp_path / "taesdxl")
    vae = load("vae", tmp_path / "taesdxl")
    same = load("vae", combined(tmp_path, 4, autoencoders.TINY_SCALES["sdxl"]))
    assert torch.equal(vae.decode(LATENTS, None, no_step)[0], same.decode(LATENTS, None, no_step)[0])


def test_tiny_of_an_unknown_family_is_refused(tmp_path: Path, load: Load) -> None:
    encoder, decoder = tiny_halves()
    with pytest.raises(ModelLoadError, match="family is unknown"):
        load("vae", save(tmp_path / "e.safetensors", encoder), save(tmp_path / "d.safetensors", decoder))


def test_half_a_tiny_is_refused(tmp_path: Path, load: Load) -> None:
    with pytest.raises(ModelLoadError, match="a TAESD decoder only"):
        load("vae", save(tmp_path / "taesd_decoder.safetensors", tiny_halves()[1]))


# --- settings ----------------------------------------------------------------------------------------------------


def test_precision(tmp_path: Path, load: Load) -> None:
    vae = load("vae", ldm(tmp_path), precision="bf16")
    assert vae.properties()["dtype"] == "bfloat16"
    assert vae.decode(LATENTS, None, no_step)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("setting", "named"), [({"device": "cuda:99"}, "device is 'cuda:99'"), ({"precision": "fp4"}, "precision is 'fp4'")]
)
def test_bad_settings_are_named(setting: dict[str, str], named: str, tmp_path: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match=named):
        load("vae", ldm(tmp_path), **setting)
