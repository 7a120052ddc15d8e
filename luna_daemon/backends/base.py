"""What a backend is: the code inside a worker that turns files into models and runs them.

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
    """What every loaded model has."""

    nbytes: int
    """Bytes of weights held in memory."""

    def properties(self) -> dict[str, Any]:
        """The model's attributes as plain data."""
        ...


class VaeModel(Model, Protocol):
    """A loaded VAE. Results are float32 on the CPU, contiguous."""

    def properties(self) -> dict[str, Any]:
        """Attributes: ``latent_channels``, ``downscale_ratio``, ``upscale_ratio``, ``dtype``, ``device``, ``class``."""
        ...

    def encode(self, pixels: torch.Tensor, tiling: Tiling | None, step: Step) -> tuple[torch.Tensor, list[str]]:
        """Encode ``[B,H,W,C]`` float32 in 0..1.

        Returns:
            Latents ``[B,C,h,w]``; notes for the caller.

        Raises:
            BadRequest: pixels or tiles that the model does not take.
            OutOfMemory: no room on the device, even for tiles.
        """
        ...

    def decode(self, latents: torch.Tensor, tiling: Tiling | None, step: Step) -> tuple[torch.Tensor, list[str]]:
        """Decode latents ``[B,C,h,w]`` of any float dtype.

        Returns:
            Pixels ``[B,H,W,C]`` in 0..1; notes for the caller.

        Raises:
            BadRequest: latents or tiles that the model does not take.
            OutOfMemory: no room on the device, even for tiles.
        """
        ...


class TextModel(Model, Protocol):
    """One or more text encoders that make one conditioning. Results are float32 on the CPU, contiguous."""

    def properties(self) -> dict[str, Any]:
        """Attributes: ``encoders``, ``cond_dim``, ``pooled_dim``, ``dtype``, ``device``, ``class``."""
        ...

    def tokenize(self, text: str) -> Tokens:
        """Parse ``(word:1.3)`` weights and split into padded chunks per encoder."""
        ...

    def encode(self, tokens: Tokens, layer: int | None, unprojected: bool) -> dict[str, torch.Tensor]:
        """Encode tokens.

        Args:
            layer: the hidden layer to take, negative from the end; ``None`` is the family's own.
            unprojected: leave out the pooled vector's projection.

        Returns:
            ``{"cond": [1,T,D], "pooled_output": [1,P]}``.

        Raises:
            BadRequest: tokens or a layer that the model does not have.
            OutOfMemory: no room on the device.
        """
        ...


class Backend(Protocol):
    """Loads models. One instance per worker."""

    name: str

    def versions(self) -> dict[str, str]:
        """Versions of everything that decides bits: torch, the library, ComfyUI."""
        ...

    def devices(self) -> list[str]:
        """Devices that the backend can use, best first: ``cuda:0`` ... ``cpu``."""
        ...

    def load(self, spec: LoadSpec) -> Model:
        """Load a model.

        Raises:
            ConfigError: no such device, precision or family.
            ModelLoadError: the files are not a model of this kind, truncated, or of an unknown layout.
            OutOfMemory: no room on the device.
        """
        ...
