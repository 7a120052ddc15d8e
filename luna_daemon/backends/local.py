"""The diffusers backend's models in this process: the fallback of a proxy outside ComfyUI, and a benchmark's reference.

Making a model imports torch and the diffusers backend.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import ModelKind
from ..wire.messages import LoadSpec, Tiling

if TYPE_CHECKING:
    import torch

    from .base import VaeModel


def _load(kind: ModelKind, files: Sequence[Path | str], type: str, device: str, precision: str) -> Any:
    from . import make_backend

    spec = LoadSpec("local", kind.value, type, tuple(str(file) for file in files), device, precision)
    return make_backend("diffusers").load(spec)


def _ignore(done: int, total: int) -> None:
    """Show no progress."""


class LocalVAE:
    """A VAE in this process, with ``DaemonVAE``'s methods.

    Args:
        files: the VAE's file, or the two files of a TAESD that is split into encoder and decoder.
        device, precision: as in the settings.

    Raises:
        ConfigError, ModelLoadError, OutOfMemory: see ``Backend.load``.
    """

    def __init__(self, *files: Path | str, device: str = "auto", precision: str = "auto") -> None:
        self.model: VaeModel = _load(ModelKind.VAE, files, "", device, precision)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode ``[B,H,W,C]`` in 0..1 to latents ``[B,C,h,w]``; raises as ``VaeModel.encode``."""
        return self.model.encode(pixels, None, _ignore)[0]

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Decode latents ``[B,C,h,w]`` to pixels ``[B,H,W,C]`` in 0..1; raises as ``VaeModel.decode``."""
        return self.model.decode(samples, None, _ignore)[0]

    def encode_tiled(self, pixels: torch.Tensor, **tiling: int) -> torch.Tensor:
        """Encode in tiles of ``tile_x``, ``tile_y`` and ``overlap`` pixels."""
        return self.model.encode(pixels, Tiling(**tiling), _ignore)[0]

    def decode_tiled(self, samples: torch.Tensor, **tiling: int) -> torch.Tensor:
        """Decode in tiles of ``tile_x``, ``tile_y`` and ``overlap`` latent units."""
        return self.model.decode(samples, Tiling(**tiling), _ignore)[0]


class LocalCLIP:
    """Text encoders in this process, with ``DaemonCLIP``'s methods.

    Args:
        files: the encoders' files.
        type: family (``sd15``, ``sdxl``, ``sd3``, ``flux``).
        device, precision: as in the settings.

    Raises:
        ConfigError, ModelLoadError, OutOfMemory: see ``Backend.load``.
    """

    def __init__(self, *files: Path | str, type: str = "sdxl", device: str = "auto", precision: str = "auto") -> None:
        self.model = _load(ModelKind.CLIP, files, type, device, precision)
        self.layer_idx: int | None = None

    def clone(self) -> LocalCLIP:
        """Make a copy that shares the weights and has its own ``layer_idx``."""
        return copy.copy(self)

    def clip_layer(self, layer_idx: int) -> None:
        """Use a hidden layer's output from now on: -1 is the last layer, -2 the penultimate."""
        self.layer_idx = layer_idx

    def tokenize(self, text: str) -> dict[str, Any]:
        """Split a prompt into weighted chunks per encoder."""
        return dict(self.model.tokenize(text))

    def encode_from_tokens(
        self, tokens: dict[str, Any], return_pooled: bool | str = False, return_dict: bool = False
    ) -> Any:
        """Encode to ``cond`` ``[1,T,D]``, and ``pooled`` ``[1,P]`` if asked; see ``TextModel.encode``."""
        import torch

        with torch.inference_mode():
            encoded = self.model.encode(tokens, self.layer_idx, return_pooled == "unprojected")
        if return_dict:
            return encoded
        return (encoded["cond"], encoded["pooled_output"]) if return_pooled else encoded["cond"]

    def encode(self, text: str) -> Any:
        """Encode a prompt to ``cond`` ``[1,T,D]``."""
        return self.encode_from_tokens(self.tokenize(text))
