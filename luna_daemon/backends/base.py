"""Interface of the backends: the code inside a worker that loads models from files and runs them.

A backend is imported only in a worker process; torch is imported only there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..wire.messages import LoadSpec, Tiling, Tokens

if TYPE_CHECKING:
    import torch

Step = Callable[[int, int], None]
"""``step(done, total)``: called before each tile; raises ``RequestCancelled`` when the caller has left."""


class Model(Protocol):
    """A loaded model of any kind."""

    nbytes: int
    """Bytes of weights held in memory."""

    def properties(self) -> dict[str, Any]:
        """Describe the model as plain data."""
        ...


class VaeModel(Model, Protocol):
    """A loaded VAE. Results are float32 on the CPU, contiguous."""

    def properties(self) -> dict[str, Any]:
        """Give ``latent_channels``, ``downscale_ratio``, ``upscale_ratio``, ``dtype``, ``device`` and ``class``."""
        ...

    def encode(self, pixels: torch.Tensor, tiling: Tiling | None, step: Step) -> tuple[torch.Tensor, list[str]]:
        """Encode ``[B,H,W,C]`` float32 in 0..1.

        Returns:
            Latents ``[B,C,h,w]``; notes for the caller.

        Raises:
            BadRequest: the model does not accept these pixels or tiles.
            OutOfMemory: the device has no room, even for tiles.
        """
        ...

    def decode(self, latents: torch.Tensor, tiling: Tiling | None, step: Step) -> tuple[torch.Tensor, list[str]]:
        """Decode latents ``[B,C,h,w]`` of any float dtype.

        Returns:
            Pixels ``[B,H,W,C]`` in 0..1; notes for the caller.

        Raises:
            BadRequest: the model does not accept these latents or tiles.
            OutOfMemory: the device has no room, even for tiles.
        """
        ...


class TextModel(Model, Protocol):
    """One or more text encoders that make one conditioning. Results are float32 on the CPU, contiguous."""

    def properties(self) -> dict[str, Any]:
        """Give ``encoders``, ``cond_dim``, ``pooled_dim``, ``dtype``, ``device`` and ``class``."""
        ...

    def tokenize(self, text: str) -> Tokens:
        """Parse ``(word:1.3)`` weights and split into padded chunks per encoder."""
        ...

    def encode(self, tokens: Tokens, layer: int | None, unprojected: bool) -> dict[str, torch.Tensor]:
        """Encode tokens.

        Args:
            layer: the hidden layer whose output is used, negative from the end; ``None`` is the family's default.
            unprojected: leave out the pooled vector's projection.

        Returns:
            ``{"cond": [1,T,D], "pooled_output": [1,P]}``.

        Raises:
            BadRequest: the model does not have these tokens or this layer.
            OutOfMemory: the device has no room.
        """
        ...


class Backend(Protocol):
    """Loads models. One instance per worker."""

    name: str

    def versions(self) -> dict[str, str]:
        """Give the version of each library that the results depend on, bit for bit: torch, ComfyUI or diffusers."""
        ...

    def devices(self) -> list[str]:
        """List the devices that the backend can use, best first: ``cuda:0`` ... ``cpu``."""
        ...

    def load(self, spec: LoadSpec) -> Model:
        """Load a model.

        Raises:
            ConfigError: the device, precision or family does not exist.
            ModelLoadError: the files are not a model of this kind, truncated, or of an unknown layout.
            OutOfMemory: the device has no room.
        """
        ...
