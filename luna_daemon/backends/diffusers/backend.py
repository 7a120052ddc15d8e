"""Backend on diffusers' and transformers' modules, with ComfyUI's conventions and results.

It loads TAESD, and the VAEs and text encoders of SD1.5, SDXL, SD3 and Flux.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

from ...core import ModelKind, ModelLoadError
from ...wire.messages import LoadSpec
from ..base import TextModel, VaeModel

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")


class DiffusersBackend:
    """Loads models with diffusers and transformers; nothing is ever downloaded."""

    name = "diffusers"

    def versions(self) -> dict[str, str]:
        """Give the versions of the libraries that results depend on; without those that are not installed."""
        return {name: metadata.version(name) for name in _LIBRARIES if find_spec(name) is not None}

    def devices(self) -> list[str]:
        """List the devices of this machine, best first: ``cuda:0`` ... ``cpu``.

        Raises:
            ModelLoadError: a library is not installed.
        """
        _require_libraries()
        from .loading import usable_devices

        return usable_devices()

    def load(self, spec: LoadSpec) -> VaeModel | TextModel:
        """Load a VAE or a family's text encoders.

        Raises:
            ConfigError: the device, precision or family does not exist.
            ModelLoadError: the files are not a model of this kind, truncated, or of an unknown layout; or a library is
                not installed.
            OutOfMemory: the device has no room.
        """
        _require_libraries()
        from .loading import memory_errors
        from .selection import load_text, load_vae

        if not spec.files:
            raise ModelLoadError(f"{spec.key} has no files")
        with memory_errors(f"loading {spec.key} on {spec.device}"):
            if spec.kind == ModelKind.VAE:
                return load_vae(spec)
            if spec.kind == ModelKind.CLIP:
                return load_text(spec)
        raise ModelLoadError(f"{spec.key} is of kind {spec.kind!r}, which the diffusers backend does not load")


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ModelLoadError(
            f"the diffusers backend needs {', '.join(missing)}", "Install with: pip install luna-daemon[standalone]"
        )
