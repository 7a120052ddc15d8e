# SPDX-License-Identifier: GPL-3.0-or-later
"""Train the demo autoencoder from scratch on the photographs that scikit-image and scikit-learn ship.

    python demo/model/train.py --minutes 50 --out demo/model/luna_demo_vae.safetensors

The network is diffusers' ``AutoencoderTiny`` with 16 latent channels; the exported file uses the TAESD key
layout. A dozen pictures are few, so most of the work is in the augmentation: crops at several scales, flips,
recolouring and synthetic pictures, so that the model learns every colour and not only those of the pictures.

The exported file and a checkpoint (``<out>.ckpt``) are written every few minutes. ``--minutes`` is the total
training time, so a run stopped half way goes on where it was with ``--resume``.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from evaluate import MODEL_FILE, held_out, load_model, new_model, psnr, reconstruct, save_model
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

PYRAMID = (1.0, 0.71, 0.5, 0.35)  # scales at which every training picture is offered
EXPORT_EVERY_S = 180

METADATA = {
    "format": "pt",
    "name": "luna-demo-vae",
    "description": "Small demo autoencoder, TAESD architecture with 16 latent channels",
    "license": "GPL-3.0-or-later",
    "training_images": (
        "scikit-image: astronaut (NASA), chelsea (Stefan van der Walt), rocket (SpaceX), "
        "immunohistochemistry (CMMI), retina (Mikael Haggstrom), hubble_deep_field (NASA), "
        "camera (Lav Varshney), brick and gravel (CC0Textures), grass (linolafett), coins (Brooklyn Museum), "
        "clock (Stefan van der Walt); scikit-learn: flower.jpg (vultilion, CC BY 2.0)"
    ),
}


def training_images() -> list[tuple[Tensor, float]]:
    """Return the training pictures as (uint8 [3, H, W], how often it is drawn)."""
    colour = [
        (skimage_data.astronaut(), 4),
        (skimage_data.chelsea(), 3),
        (skimage_data.rocket(), 2),
        (skimage_data.immunohistochemistry(), 2),
        (skimage_data.retina(), 1),
        (skimage_data.hubble_deep_field(), 1),
        (load_sample_image("flower.jpg"), 3),
    ]
    grey = [
        (skimage_data.camera(), 2),
        (skimage_data.brick(), 1),
        (skimage_data.grass(), 1),
        (skimage_data.gravel(), 1),
        (skimage_data.coins(), 1),
        (skimage_data.clock(), 0.5),
    ]
    pictures = colour + [(np.stack([picture] * 3, axis=-1), weight) for picture, weight in grey]
    return [(torch.from_numpy(picture.copy()).permute(2, 0, 1), weight) for picture, weight in pictures]


class CropSource:
    """Draws augmented square crops from the training pictures and from made-up ones."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Load the pictures and shrink each to the scales of ``PYRAMID``."""
        self.rng = rng
        self.levels: list[Tensor] = []
        weights: list[float] = []
        for picture, weight in training_images():
            for scale in PYRAMID:
                size = [round(side * scale) for side in picture.shape[1:]]
                level = F.interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True)[0]
                self.levels.append(level.round().clamp(0, 255).to(torch.uint8))
                weights.append(weight)
        self.weights = np.array(weights) / sum(weights)

    def _photo_crop(self, size: int) -> Tensor:
        """Return one randomly flipped and turned crop, uint8 [3, size, size]."""
        while True:
            level = self.levels[self.rng.choice(len(self.levels), p=self.weights)]
            height, width = level.shape[1:]
            if min(height, width) >= size:
                break
        top, left = self.rng.integers(height - size + 1), self.rng.integers(width - size + 1)
        crop = level[:, top : top + size, left : left + size]
        if self.rng.random() < 0.5:
            crop = crop.flip(2)
        return crop.rot90(int(self.rng.integers(4)), (1, 2))

    def _detailed_crop(self, size: int) -> Tensor:
        """Return a crop, two times in three the more detailed of two, as plain areas are learnt quickly."""
        crop = self._photo_crop(size)
        if self.rng.random() < 1 / 3:
            return crop
        return max(crop, self._photo_crop(size), key=lambda c: c.float().diff(dim=2).abs().mean().item())

    def _colour_field(self, size: int) -> Tensor:
        """Return random colours on a coarse grid, spread smoothly or in blocks, float [3, size, size]."""
        cells = int(self.rng.choice([1, 2, 3, 4, 6, 8]))
        field = torch.rand(1, 3, cells, cells)
        mode = {"mode": "nearest"} if self.rng.random() < 0.3 else {"mode": "bilinear", "align_corners": True}
        return F.interpolate(field, size=(size, size), **mode)[0]

    def _made_up(self, size: int) -> Tensor:
        """Return two colour fields that meet along random outlines, float [3, size, size]; some are noisy."""
        heights = torch.randn(1, 1, *self.rng.integers(2, 9, size=2))
        outline = F.interpolate(heights, size=(size, size), mode="bicubic")
        mask = (outline[0] * float(self.rng.choice([5, 40]))).sigmoid()
        picture = torch.lerp(self._colour_field(size), self._colour_field(size), mask)
        if self.rng.random() < 0.3:
            picture = picture + torch.randn(3, size, size) * float(self.rng.uniform(0, 0.04))
        return picture.clamp(0, 1)

    def batch(self, count: int, size: int, made_up_share: float = 0.1) -> Tensor:
        """Return a training batch, float [count, 3, size, size] in [0, 1]."""
        photos = torch.stack([self._detailed_crop(size) for _ in range(count)]).float().div(255)
        crops = recolour(photos)
        for index in range(count):
            if self.rng.random() < made_up_share:
                crops[index] = self._made_up(size)
        return crops


def recolour(crops: Tensor) -> Tensor:
    """Change the colours of about two thirds of the crops; [B, 3, H, W] in [0, 1] in and out.

    Hue turns about the grey axis, saturation, channel order, contrast, brightness, per-channel gain and gamma
    are all drawn per crop. Some crops become two-tone, which is what gives the grey pictures colour.
    """
    count = len(crops)

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(count, channels, 1, 1).uniform_(low, high)

    angle, saturation = draw(-math.pi, math.pi)[..., 0], draw(0.0, 2.0)[..., 0]
    grey = torch.full((3, 3), 1 / 3)
    turn = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    hue = angle.cos() * torch.eye(3) + (1 - angle.cos()) * grey + angle.sin() * turn
    matrix = (1 - saturation) * grey + saturation * hue
    matrix = torch.stack([row[torch.randperm(3)] for row in matrix])
    changed = torch.einsum("bij,bjhw->bihw", matrix, crops)

    brightness = crops.mean(1, keepdim=True)
    two_tone = torch.lerp(torch.rand(count, 3, 1, 1), torch.rand(count, 3, 1, 1), brightness)
    changed = torch.where(draw(0, 1) < 0.2, two_tone, changed)

    middle = changed.mean((2, 3), keepdim=True)
    changed = (changed - middle) * draw(0.5, 1.5) + middle * draw(0.7, 1.3, 3) + draw(-0.15, 0.15)
    changed = changed.clamp(1e-4, 1) ** draw(-0.5, 0.5).exp()
    return torch.where(draw(0, 1) < 0.65, changed, crops)


def initialise(model: AutoencoderTiny) -> None:
    """Start with He-initialised convolutions and residual blocks that pass their input through.

    The latents start three times larger than that gives, which leaves them with a standard deviation of about
    0.6 after training; the decoder's first convolution takes the factor back.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if name.endswith("conv.4"):
            nn.init.zeros_(module.weight)
    with torch.no_grad():
        model.encoder.layers[-1].weight.mul_(3)
        model.decoder.layers[0].weight.div_(3)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return [N, R, C] matrices with all singular values pulled towards 1 (Newton-Schulz iteration).

    The iteration runs on the small [R, R] products, which commute, and is applied to the matrices once.
    """
    scaled = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    identity = torch.eye(scaled.shape[1])
    gram, total = scaled @ scaled.mT, identity
    for _ in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram, total = factor @ factor @ gram, factor @ total
    return total @ scaled


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for convolution weights that all have the same shape."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        """Take over ``parameters``, each an [R, C, h, w] weight of one common shape."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all weights; the size of an update is matched to what Adam makes at the same rate."""
        for group in self.param_groups:
            updates = []
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(average, group["momentum"]).flatten(1))
            stacked = orthogonalise(torch.stack(updates))
            stacked *= -group["lr"] * 0.2 * math.sqrt(max(stacked.shape[1:]))
            for parameter, update in zip(group["params"], stacked, strict=True):
                parameter.add_(update.view_as(parameter))


def learning_rate_factor(progress: float, step: int) -> float:
    """Return the share of the full rate: short warm-up, a plateau, then straight down to zero."""
    return min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.5)


def train(arguments: argparse.Namespace) -> None:
    """Train until the time is used up, exporting every few minutes."""
    torch.manual_seed(arguments.seed)
    source = CropSource(np.random.default_rng(arguments.seed))
    model = new_model()
    initialise(model)
    model = model.to(memory_format=torch.channels_last)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    inner = [p for p in model.parameters() if p.shape == (64, 64, 3, 3)]
    inner_ids = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in inner_ids]
    optimizers = [Muon(inner, arguments.lr), torch.optim.Adam(outer, arguments.lr, betas=(0.9, 0.99))]

    checkpoint_path = arguments.out.with_suffix(".ckpt")
    step, trained_s = 0, 0.0
    if arguments.resume:
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        average = checkpoint["average"]
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, trained_s = checkpoint["step"], checkpoint["trained_s"]
        torch.manual_seed(arguments.seed + step)
        source.rng = np.random.default_rng(arguments.seed + step)

    def export() -> None:
        """Write the averaged weights and the checkpoint, and print where the held-out photographs stand."""
        save_model(average, arguments.out, METADATA | {"steps": str(step)})
        checkpoint = {
            "model": model.state_dict(),
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "trained_s": trained_s,
        }
        torch.save(checkpoint, checkpoint_path.with_suffix(".partial"))
        os.replace(checkpoint_path.with_suffix(".partial"), checkpoint_path)
        exported = load_model(arguments.out)
        figures = {name: psnr(photo, reconstruct(exported, photo)[0]) for name, photo in held_out().items()}
        print("exported:", ", ".join(f"{name} {value:.2f} dB" for name, value in figures.items()), flush=True)

    budget_s = arguments.minutes * 60
    last_export, shown, since = trained_s, [], time.monotonic()
    while trained_s < budget_s:
        progress = trained_s / budget_s
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * learning_rate_factor(progress, step)
        # Small crops for variety first; at the end larger ones, of which less lies at a border.
        count, size = (8, 64) if progress < 0.85 else (4, 128)
        target = source.batch(count, size).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            latents = model.encoder(target * 2 - 1)
            decoded = model.decoder(latents)
        difference = decoded.float().add(1).div(2) - target
        # Mostly squared error, which PSNR measures; a little absolute error keeps flat areas true. The last
        # term keeps latents inside the +-3 that the decoder's clamp lets through.
        overshoot = F.relu(latents.float().abs() - 2.5).square().mean()
        squared = difference.square().mean()
        loss = squared + 0.02 * difference.abs().mean() + 0.002 * overshoot
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 10))
        for key, value in model.state_dict().items():
            average[key].lerp_(value, 1 - decay)

        shown.append(squared.item())
        now = time.monotonic()
        trained_s, since = trained_s + now - since, now
        if len(shown) == 200:
            level = -10 * math.log10(sum(shown) / len(shown))
            spread = latents.float().std().item()
            clock = f"{trained_s / 60:.1f} min, step {step}"
            print(f"{clock}: {level:.2f} dB on crops, latent std {spread:.2f}", flush=True)
            shown.clear()
        if trained_s - last_export > EXPORT_EVERY_S:
            export()
            last_export, since = trained_s, time.monotonic()
    export()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="train the demo autoencoder")
    parser.add_argument("--minutes", type=float, default=50, help="training time, earlier runs included")
    parser.add_argument("--out", type=Path, default=MODEL_FILE, help="exported file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="use bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from <out>.ckpt")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments)


if __name__ == "__main__":
    main()
