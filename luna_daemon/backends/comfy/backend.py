"""Files to models as ComfyUI's loader nodes load them.

The worker runs under ComfyUI's interpreter. Every family that this ComfyUI detects is served; there is no list of
families here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...comfyui.meta import joined
from ...core import ModelKind, ModelLoadError, OutOfMemory
from ...wire.messages import LoadSpec
from .library import ComfyLibrary
from .text import ComfyText
from .vae import ComfyVae


class ComfyBackend(ComfyLibrary):
    """ComfyUI in this process, as a backend."""

    name = "comfy"

    def load(self, spec: LoadSpec) -> ComfyVae | ComfyText:
        """Load a VAE or text encoders.

        Raises:
            ModelLoadError: not a model that this ComfyUI knows, or truncated.
            OutOfMemory: no room on the device.
        """
        try:
            return self._load_vae(spec) if spec.kind == ModelKind.VAE else self._load_text(spec)
        except self.memory.OOM_EXCEPTION as error:
            raise OutOfMemory(f"no room for {spec.key}") from error
        except Exception as error:
            # ComfyUI raises whatever its detection stumbles over; the caller needs to know the file.
            raise ModelLoadError(f"{', '.join(spec.files)}: {type(error).__name__}: {error}") from error

    def _load_vae(self, spec: LoadSpec) -> ComfyVae:
        if spec.checkpoint:
            vae = self._load_checkpoint(spec)[2]
        else:
            files = [Path(file) for file in spec.files]
            weights = joined([self.utils.load_torch_file(str(file)) for file in files], files)
            vae = self.sd.VAE(sd=weights, device=_device(spec.device), dtype=_dtype(spec.precision))
        if vae is None or vae.first_stage_model is None:
            raise ModelLoadError("no VAE was found in it")
        return ComfyVae(self, vae)

    def _load_text(self, spec: LoadSpec) -> ComfyText:
        if spec.checkpoint:
            clip = self._load_checkpoint(spec)[1]
        else:
            family = getattr(self.sd.CLIPType, spec.type.upper(), self.sd.CLIPType.STABLE_DIFFUSION)
            clip = self.sd.load_clip(list(spec.files), clip_type=family, model_options=_text_options(spec))
        if clip is None:
            raise ModelLoadError("no text encoder was found in it")
        return ComfyText(self, clip)

    def _load_checkpoint(self, spec: LoadSpec) -> Any:
        """ComfyUI's tuple of model, text encoders and VAE, with the wanted one only."""
        return self.sd.load_checkpoint_guess_config(
            spec.files[0],
            output_vae=spec.kind == ModelKind.VAE,
            output_clip=spec.kind == ModelKind.CLIP,
            output_model=False,
            te_model_options=_text_options(spec),
        )


def _text_options(spec: LoadSpec) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if (device := _device(spec.device)) is not None:
        options.update(load_device=device, offload_device=device)
    if (dtype := _dtype(spec.precision)) is not None:
        options["dtype"] = dtype
    return options


def _device(name: str) -> Any:
    """``None`` lets ComfyUI choose, as with ``_dtype``."""
    import torch

    return None if name == "auto" else torch.device(name)


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
