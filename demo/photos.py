"""Photographs that the demo autoencoder was not trained on, as ComfyUI images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

__all__ = ["photographs", "side_by_side"]


def photographs() -> dict[str, torch.Tensor]:
    """Three pictures by name: ``[1,H,W,3]`` float32 in 0..1, sides a multiple of 8."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    coffee, china = data.coffee(), load_sample_image("china.jpg")
    return {
        "coffee": _image(coffee),
        "china": _image(china),
        "roofs": _image(china[:320, 160:]),
    }


def _image(pixels: np.ndarray) -> torch.Tensor:
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    return torch.from_numpy(pixels[:height, :width].astype(np.float32) / 255)[None]


def side_by_side(before: torch.Tensor, after: torch.Tensor) -> Image.Image:
    """Two images ``[1,H,W,3]`` as one picture, the first on the left."""
    both = torch.cat([before[0], after[0]], dim=1).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(both.numpy())
