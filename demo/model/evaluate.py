# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the demo autoencoder on photographs it was not trained on.

    python demo/model/evaluate.py --png before_after.png

Loads the exported file (TAESD key layout, float16), encodes and decodes every held-out photograph at full
resolution and prints one PSNR figure per photograph. The PNG shows, per photograph, the original on the left
and the reconstruction on the right.

This module also owns what the trainer and the evaluation share: the file layout and the held-out set.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image

LATENT_CHANNELS = 16
DOWNSCALE = 8
MODEL_FILE = Path(__file__).with_name("luna_demo_vae.safetensors")

# In the TAESD layout the decoder's list of layers begins with the latent clamp, which has no weights.
# diffusers keeps the clamp outside the list, so its decoder numbers are one lower. The encoder's agree.
_FIRST_LAYER = {"encoder": 0, "decoder": 1}


def new_model() -> AutoencoderTiny:
    """Return an untrained autoencoder: images [B, 3, H, W] in [-1, 1] <-> latents [B, 16, H/8, W/8]."""
    return AutoencoderTiny(latent_channels=LATENT_CHANNELS)


def to_taesd(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of an ``AutoencoderTiny`` to the TAESD layout and add the two latent scalars."""
    renamed = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for key, value in state.items():
        half, number, rest = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", key).groups()
        renamed[f"taesd_{half}.{int(number) + _FIRST_LAYER[half]}.{rest}"] = value
    return renamed


def from_taesd(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo :func:`to_taesd`. Refuses a file whose latents are rescaled, which this model's never are."""
    state = dict(state)
    if state.pop("vae_scale").item() != 1.0 or state.pop("vae_shift").item() != 0.0:
        raise ValueError("expected vae_scale 1 and vae_shift 0")
    renamed = {}
    for key, value in state.items():
        half, number, rest = re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", key).groups()
        renamed[f"{half}.layers.{int(number) - _FIRST_LAYER[half]}.{rest}"] = value
    return renamed


def save_model(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write an ``AutoencoderTiny`` state dict as a float16 TAESD file, replacing ``path`` in one step."""
    half = {key: value.detach().to(torch.float16).contiguous() for key, value in to_taesd(state).items()}
    temporary = path.with_suffix(".partial")
    save_file(half, temporary, metadata=metadata)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def load_model(path: Path) -> AutoencoderTiny:
    """Load an exported file. Every key and shape has to match; weights are widened to float32."""
    state = {key: value.float() for key, value in load_file(path).items()}
    model = new_model()
    model.load_state_dict(from_taesd(state), strict=True)
    return model.eval()


def held_out() -> dict[str, np.ndarray]:
    """Return the photographs that training never sees: name -> uint8 [H, W, 3], H and W multiples of 8."""
    photos = {
        "coffee (scikit-image)": skimage_data.coffee(),
        "china (scikit-learn)": load_sample_image("china.jpg"),
    }
    return {
        name: photo[: photo.shape[0] // DOWNSCALE * DOWNSCALE, : photo.shape[1] // DOWNSCALE * DOWNSCALE]
        for name, photo in photos.items()
    }


@torch.inference_mode()
def reconstruct(model: AutoencoderTiny, photo: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Encode and decode one uint8 [H, W, 3] photograph.

    Returns the uint8 [H, W, 3] reconstruction and the float latents [16, H/8, W/8].
    """
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    latents = model.encode(image).latents
    decoded = model.decode(latents).sample.clamp(-1, 1)
    pixels = decoded[0].permute(1, 2, 0).add(1).mul(127.5).round().to(torch.uint8).numpy()
    return pixels, latents[0]


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB, over all pixels and channels."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main() -> None:
    """Print the figures for an exported file and write the before/after picture."""
    parser = argparse.ArgumentParser(description="PSNR of the demo autoencoder on held-out photographs")
    parser.add_argument("--model", type=Path, default=MODEL_FILE, help="exported file to measure")
    parser.add_argument("--png", type=Path, help="write originals (left) and reconstructions (right) here")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = load_model(arguments.model)
    rows = []
    for name, photo in held_out().items():
        decoded, latents = reconstruct(model, photo)
        cast = (decoded.astype(np.float64) - photo).mean(axis=(0, 1))
        print(
            f"{name}: {psnr(photo, decoded):.2f} dB at {photo.shape[1]}x{photo.shape[0]}; "
            f"mean colour error R {cast[0]:+.1f} G {cast[1]:+.1f} B {cast[2]:+.1f} of 255; "
            f"latents mean {latents.mean():+.2f}, std {latents.std():.2f}, "
            f"range {latents.min():+.2f} to {latents.max():+.2f}"
        )
        rows.append(np.concatenate([photo, decoded], axis=1))
    if arguments.png:
        width = max(row.shape[1] for row in rows)
        padded = [np.pad(row, ((0, 8), (0, width - row.shape[1]), (0, 0))) for row in rows]
        Image.fromarray(np.concatenate(padded)).save(arguments.png)


if __name__ == "__main__":
    main()
