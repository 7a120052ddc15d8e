"""VAEs of the comfy backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...comfyui.attributes import attributes_set
from ...wire.messages import Tiling
from ..base import Step
from .library import ComfyLibrary

if TYPE_CHECKING:
    import torch


class ComfyVae:
    """A ``comfy.sd.VAE``; samples of a batch are computed one by one, since the size of a batch changes results."""

    takes_options = True
    """Whether ``raw``, ``options`` and ``attributes`` are understood."""

    def __init__(self, backend: ComfyLibrary, vae: Any) -> None:
        self._backend = backend
        self._vae = vae
        # A decoder that mixes the batch in time (SVD) takes the batch as the frames of one sample.
        names = [name for name, _ in vae.first_stage_model.named_modules()]
        self._mixes_frames = any("time_stack" in name or "time_mix" in name for name in names)
        self.nbytes = int(vae.patcher.model_size())

    def properties(self) -> dict[str, Any]:
        """Describe the model as ``VaeModel`` does; ratios count along one side."""
        vae = self._vae
        return {
            "latent_channels": int(vae.latent_channels),
            "downscale_ratio": vae.spacial_compression_encode(),
            "upscale_ratio": vae.spacial_compression_decode(),
            "dtype": str(vae.vae_dtype).removeprefix("torch."),
            "device": str(vae.device),
            "class": type(vae.first_stage_model).__name__,
        }

    def encode(
        self,
        pixels: torch.Tensor,
        tiling: Tiling | None,
        step: Step,
        raw: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, list[str]]:
        """Encode as ``VAE.encode`` and ``VAE.encode_tiled`` do.

        Args:
            pixels: ``[B,H,W,C]`` or, of a video, ``[B,T,H,W,C]``, in 0..1; with ``raw`` the network's own input.
            raw: run the network alone, without ComfyUI's scaling and cropping.
            attributes: per layer, the attributes that are set on the network during the call.

        Returns:
            Latents, float32 on the CPU; notes for the caller.

        Raises:
            OutOfMemory: the device has no room, even for tiles.
        """
        vae = self._vae
        # Frames of a video arrive as a batch; they are one sample.
        video = vae.latent_dim == 3 and pixels.ndim < 5 and not vae.not_video
        with attributes_set(vae.first_stage_model, attributes or {}):
            if raw:
                return self._raw(vae.first_stage_model.encode, pixels, step)
            if tiling is not None:
                return self._run(lambda part: vae.encode_tiled(part, **tiling.given()), [pixels], step)
            return self._run(vae.encode, [pixels] if video else _singles(pixels), step)

    def decode(
        self,
        latents: torch.Tensor,
        tiling: Tiling | None,
        step: Step,
        raw: bool = False,
        options: dict[str, Any] | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, list[str]]:
        """Decode as ``VAE.decode`` and ``VAE.decode_tiled`` do.

        Args:
            latents: ``[B,C,h,w]`` or, of a video, ``[B,C,t,h,w]``.
            raw: run the network alone, without ComfyUI's scaling.
            options: ComfyUI's ``vae_options``.
            attributes: per layer, the attributes that are set on the network during the call.

        Returns:
            Pixels in 0..1 (unless ``raw``), channels last, float32 on the CPU; notes for the caller.

        Raises:
            OutOfMemory: the device has no room, even for tiles.
        """
        vae = self._vae
        more = {"vae_options": options} if options else {}
        with attributes_set(vae.first_stage_model, attributes or {}):
            if raw:
                return self._raw(vae.first_stage_model.decode, latents, step)
            if tiling is not None:
                return self._run(lambda part: vae.decode_tiled(part, **tiling.given()), [latents], step)
            parts = [latents] if self._mixes_frames else _singles(latents)
            return self._run(lambda part: vae.decode(part, **more), parts, step)

    def _run(self, work: Callable[[Any], Any], parts: list[torch.Tensor], step: Step) -> tuple[torch.Tensor, list[str]]:
        import torch

        notes: list[str] = []
        results: list[torch.Tensor] = []
        with self._backend.progress(step), _note_tiling(notes):
            for number, part in enumerate(parts):
                step(number, len(parts))
                results.append(work(part).to("cpu", torch.float32))
        return _joined(results), notes

    def _raw(self, network: Callable[[Any], Any], tensor: torch.Tensor, step: Step) -> tuple[torch.Tensor, list[str]]:
        vae = self._vae
        self._backend.memory.load_models_gpu([vae.patcher], force_full_load=True)
        return self._run(lambda part: network(part.to(vae.vae_dtype).to(vae.device)), [tensor], step)


@contextmanager
def _note_tiling(notes: list[str]) -> Iterator[None]:
    """Add a note when ComfyUI falls back to tiles for lack of memory, which only ComfyUI's log reports."""

    def watch(record: logging.LogRecord) -> bool:
        if "Ran out of memory when regular VAE" in record.getMessage():
            notes.append("computed in tiles: not enough memory for one pass")
        return True

    logger = logging.getLogger()
    logger.addFilter(watch)
    try:
        yield
    finally:
        logger.removeFilter(watch)


def _singles(batch: torch.Tensor) -> list[torch.Tensor]:
    return [batch[number : number + 1] for number in range(batch.shape[0])]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join samples to one batch and keep their memory layout: encoding pixels of another layout changes results."""
    import torch

    if len(parts) == 1:
        return parts[0]
    strides = parts[0].stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    joined = torch.cat([part.permute(order) for part in parts], dim=order.index(0))
    return joined.permute([order.index(dim) for dim in range(len(order))])
