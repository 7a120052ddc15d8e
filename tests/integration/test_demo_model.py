"""The demo autoencoder does what its card says."""

from __future__ import annotations

import sys

import torch

from luna_daemon.backends.local import LocalVAE
from tests.integration.conftest import DEMO_VAE, ROOT


def test_a_photograph_comes_back():
    """A photograph that it was not trained on survives encode and decode with 25 dB, and without a colour cast."""
    sys.path.insert(0, str(ROOT / "demo"))
    from photos import photographs

    pixels = photographs()["coffee"]
    vae = LocalVAE(DEMO_VAE)
    decoded = vae.decode(vae.encode(pixels))
    psnr = -10 * torch.log10(torch.mean((decoded - pixels) ** 2))
    assert psnr >= 25
    assert ((decoded - pixels).mean(dim=(0, 1, 2)).abs() < 3 / 255).all()
    assert DEMO_VAE.stat().st_size < 6 << 20
