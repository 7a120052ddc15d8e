"""VAEs behind ComfyUI's conventions: channel-last pixels in 0..1, latents without a scaling factor, no sampling."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...core import BadRequest, ModelLoadError, OutOfMemory
from ...wire.messages import Tiling
from ..base import Step
from .conversions import Tensors, kl_config, part_tensors
from .layouts import Part
from .loading import assign_weights, is_out_of_memory
from .tiling import DECODE_TILES, ENCODE_TILES, TileShape, run_tiled

Run = Callable[[torch.Tensor], torch.Tensor]

TINY_SCALES = {"sd15": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}
"""TAESD works on the diffusion model's latents: per family the (scale, shift) that turns a VAE's latents into them."""


class Autoencoder:
    """A loaded VAE.

    Args:
        model: the module, for its size, dtype and device.
        encode: maps ``[1,3,H,W]`` in -1..1 to latents, both in the model's dtype.
        decode: maps latents to ``[1,3,H,W]`` in -1..1.
        channels: number of channels of the latents.
        ratio: pixels per latent, along one side.
    """

    def __init__(self, model: nn.Module, encode: Run, decode: Run, channels: int, ratio: int) -> None:
        self._model = model
        self._encode = encode
        self._decode = decode
        self._channels = channels
        self._ratio = ratio
        weight = next(model.parameters())
        self._dtype, self._device = weight.dtype, weight.device
        self.nbytes = sum(parameter.nbytes for parameter in model.parameters())

    def properties(self) -> dict[str, Any]:
        """Describe the model as ``VaeModel`` does."""
        return {
            "latent_channels": self._channels,
            "downscale_ratio": self._ratio,
            "upscale_ratio": self._ratio,
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": str(self._device),
            "class": type(self._model).__name__,
        }

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor, tiling: Tiling | None, step: Step) -> tuple[torch.Tensor, list[str]]:
        """Encode as ``VaeModel`` does; pixels are cropped around the centre to whole latents, and to RGB."""
        images = self._crop(pixels).movedim(-1, 1)

        def run(image: torch.Tensor) -> torch.Tensor:
            return self._encode(self._placed(image * 2.0 - 1.0)).float()

        latents, notes = self._in_one_or_tiles(images, run, tiling, ENCODE_TILES, step)
        return latents.contiguous(), notes

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, tiling: Tiling | None, step: Step) -> tuple[torch.Tensor, list[str]]:
        """Decode as ``VaeModel`` does, to RGB."""
        if latents.ndim != 4 or latents.shape[1] != self._channels or 0 in latents.shape:
            raise BadRequest(f"latents have shape {list(latents.shape)}, must be [B,{self._channels},h,w]")

        def run(latent: torch.Tensor) -> torch.Tensor:
            return self._decode(self._placed(latent)).float()

        images, notes = self._in_one_or_tiles(latents, run, tiling, DECODE_TILES, step)
        return images.add_(1.0).div_(2.0).clamp_(0.0, 1.0).movedim(1, -1).contiguous(), notes

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        # Converted before it is moved, as in ComfyUI: half the bytes cross the bus.
        return tensor.to(self._dtype).to(self._device)

    def _crop(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.ndim != 4 or pixels.shape[-1] < 3 or pixels.shape[0] == 0:
            raise BadRequest(f"pixels have shape {list(pixels.shape)}, must be [B,H,W,3]")
        for axis in (1, 2):
            size = pixels.shape[axis]
            whole = size // self._ratio * self._ratio
            if whole == 0:
                raise BadRequest(f"pixels have shape {list(pixels.shape)}, must be at least {self._ratio} a side")
            pixels = pixels.narrow(axis, (size - whole) // 2, whole)
        return pixels[..., :3]

    def _in_one_or_tiles(
        self, source: torch.Tensor, run: Run, tiling: Tiling | None, tiles: TileShape, step: Step
    ) -> tuple[torch.Tensor, list[str]]:
        """Run each image in one pass, or in tiles if the caller asks for tiles or memory is short."""
        verb = "decoded" if tiles is DECODE_TILES else "encoded"
        notes: list[str] = []
        if tiling is None:
            whole = self._attempt(lambda: _one_by_one(source, run, step))
            if whole is not None:
                return whole, notes
            notes.append(f"{verb} in tiles: not enough memory for one pass")
            tiling = Tiling()
        passes = tiles.merged(tiling)
        # ComfyUI sums the passes in another order for decoding than for encoding.
        shapes = [passes.tall(), passes.wide(), passes] if verb == "decoded" else [passes, passes.wide(), passes.tall()]
        scale = float(self._ratio) if verb == "decoded" else 1.0 / self._ratio
        result = self._attempt(lambda: run_tiled(source, run, shapes, scale, step))
        if result is None:
            raise OutOfMemory(
                f"{self._device} has no memory for tiles of {passes.x}x{passes.y}", "Use smaller tiles or free memory"
            )
        return result, notes

    def _attempt(self, work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Run ``work``; return ``None`` if memory ran out."""
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block: the traceback holds the failed pass's tensors.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _one_by_one(source: torch.Tensor, run: Run, step: Step) -> torch.Tensor:
    """Run one image at a time: the size of a batch changes results, and free memory must not."""
    results = []
    for i in range(source.shape[0]):
        step(i, source.shape[0])
        results.append(run(source[i : i + 1]).cpu())
    return torch.cat(results)


def load_kl(part: Part, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """Build a KL autoencoder (SD1.5, SDXL, SD3, Flux).

    Args:
        part: a part named ``kl``.
        dtype: dtype of weights and activations.

    Raises:
        ModelLoadError: the VAE is of another family, or weights are missing.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    tensors = part_tensors(part)
    with torch.device("meta"):
        model: Any = AutoencoderKL(**kl_config(part, tensors))
    assign_weights(part, model, tensors, dtype, device)

    return Autoencoder(
        model,
        lambda images: model.encode(images).latent_dist.mode(),
        lambda latents: model.decode(latents, return_dict=False)[0],
        model.config.latent_channels,
        2 ** (len(model.config.block_out_channels) - 1),
    )


def load_tiny(parts: list[Part], family: str, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """Build TAESD from one file with both halves, or from one file each.

    Args:
        parts: ``tiny``, or ``tiny_encoder`` and ``tiny_decoder``.
        family: a key of ``TINY_SCALES``; only used where the file has no ``vae_scale``.
        dtype: dtype of weights and activations.

    Raises:
        ModelLoadError: weights are missing, or the family is needed and unknown.
    """
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    tensors: Tensors = {}
    for part in parts:
        tensors.update(part_tensors(part))
    scale, shift = (value.to(device, dtype) for value in _tiny_scale(parts[0], tensors, family))
    channels = tensors["decoder.layers.0.weight"].shape[1]
    with torch.device("meta"):
        model: Any = AutoencoderTiny(latent_channels=channels)
    assign_weights(parts[0], model, tensors, dtype, device)

    return Autoencoder(
        model,
        lambda images: model.encode(images, return_dict=False)[0] / scale + shift,
        lambda latents: model.decode((latents - shift) * scale, return_dict=False)[0],
        channels,
        8,
    )


def _tiny_scale(part: Part, tensors: Tensors, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    if part.layout == "comfy":
        return tensors.get("vae_scale", torch.tensor(1.0)), tensors.get("vae_shift", torch.tensor(0.0))
    if family not in TINY_SCALES:
        raise ModelLoadError(
            f"{part.weights.source} is a TAESD without vae_scale, and its family is unknown",
            f"Give the model's type: {', '.join(TINY_SCALES)}",
        )
    scale, shift = TINY_SCALES[family]
    return torch.tensor(scale), torch.tensor(shift)
