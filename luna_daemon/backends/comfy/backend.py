"""Loads models as ComfyUI's loader nodes do, for every family that this ComfyUI detects.

The worker runs under ComfyUI's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...comfyui.meta import joined
from ...core import LunaError, ModelKind, ModelLoadError, OutOfMemory
from ...wire.messages import LoadSpec
from .library import ComfyLibrary
from .text import ComfyText
from .vae import ComfyVae


class ComfyBackend(ComfyLibrary):
    """The backend that runs ComfyUI in this process."""

    name = "comfy"

    def load(self, spec: LoadSpec) -> ComfyVae | ComfyText:
        """Load a VAE or text encoders.

        Raises:
            ModelLoadError: the files are truncated, or not a model that this ComfyUI knows.
            OutOfMemory: the device has no room.
        """
        try:
            return self._load_vae(spec) if spec.kind == ModelKind.VAE else self._load_text(spec)
        except self.memory.OOM_EXCEPTION as error:
            raise OutOfMemory(f"no room for {spec.key}") from error
        except LunaError as error:
            raise ModelLoadError(f"{', '.join(spec.files)}: {error.message}", error.hint) from error
        except Exception as error:  # ComfyUI's detection raises errors of all kinds, without the file's name
            raise ModelLoadError(f"{', '.join(spec.files)}: {type(error).__name__}: {error}") from error

    def _load_vae(self, spec: LoadSpec) -> ComfyVae:
        if spec.checkpoint:
            vae = self._load_checkpoint(spec)[2]
        else:
            files = [Path(file) for file in spec.files]
            weights = joined([self.utils.load_torch_file(str(file)) for file in files], files)
            vae = self.sd.VAE(sd=weights, device=_device(spec.device), dtype=_dtype(spec.precision))
        if vae is None or vae.first_stage_model is None:
            raise ModelLoadError("ComfyUI finds no VAE in the file")
        return ComfyVae(self, vae)

    def _load_text(self, spec: LoadSpec) -> ComfyText:
        if spec.checkpoint:
            clip = self._load_checkpoint(spec)[1]
        else:
            family = getattr(self.sd.CLIPType, spec.type.upper(), self.sd.CLIPType.STABLE_DIFFUSION)
            clip = self.sd.load_clip(list(spec.files), clip_type=family, model_options=_text_options(spec))
        if clip is None:
            raise ModelLoadError("ComfyUI finds no text encoder in the file")
        return ComfyText(self, clip)

    def _load_checkpoint(self, spec: LoadSpec) -> Any:
        """Load a checkpoint to ComfyUI's tuple (model, text encoders, VAE), without the parts not asked for."""
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
    """Make ComfyUI's argument of a device setting; ``None``, as of ``_dtype``, lets ComfyUI choose."""
    import torch

    return None if name == "auto" else torch.device(name)


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
