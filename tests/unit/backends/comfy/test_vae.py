"""A VAE of ComfyUI's behind a stand-in: how a batch is cut and joined, and what is noted."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from luna_daemon.backends.comfy.vae import ComfyVae  # noqa: E402
from luna_daemon.wire.messages import Tiling  # noqa: E402


class Vae:
    """Records what reaches ComfyUI; pixels lie channels first in memory, as ComfyUI's do."""

    latent_dim = 2
    not_video = False

    def __init__(self) -> None:
        self.first_stage_model = torch.nn.Module()
        self.patcher = SimpleNamespace(model_size=lambda: 7)
        self.shapes: list[tuple[int, ...]] = []

    def decode(self, latents, vae_options=None):
        self.shapes.append(tuple(latents.shape))
        self.options = vae_options
        return latents.contiguous().movedim(1, -1)

    def decode_tiled(self, latents, **tiling):
        self.shapes.append(tuple(latents.shape))
        self.tiling = tiling
        return latents.movedim(1, -1)


@pytest.fixture
def vae():
    return Vae()


@pytest.fixture
def model(vae):
    return ComfyVae(SimpleNamespace(progress=lambda step: nullcontext()), vae)


def test_a_batch_is_decoded_one_by_one_and_keeps_comfyuis_layout(vae, model):
    latents = torch.rand(3, 4, 5, 6)
    steps = []
    pixels, notes = model.decode(latents, None, lambda done, total: steps.append((done, total)), options={"a": 1})
    assert vae.shapes == [(1, 4, 5, 6)] * 3 and steps == [(0, 3), (1, 3), (2, 3)] and vae.options == {"a": 1}
    assert torch.equal(pixels, latents.movedim(1, -1)) and notes == []
    assert pixels.stride() == latents.movedim(1, -1).stride() and model.nbytes == 7


def test_tiles_take_the_whole_batch(vae, model):
    model.decode(torch.rand(3, 4, 5, 6), Tiling(tile_x=8), lambda done, total: None)
    assert vae.shapes == [(3, 4, 5, 6)] and vae.tiling == {"tile_x": 8}


def test_comfyuis_own_fall_back_to_tiles_is_noted(vae, model, monkeypatch):
    plain = vae.decode

    def scarce(latents, **options):
        logging.getLogger().warning("Warning: Ran out of memory when regular VAE decoding, retrying with tiled.")
        return plain(latents)

    monkeypatch.setattr(vae, "decode", scarce)
    filters = list(logging.getLogger().filters)
    assert model.decode(torch.rand(1, 4, 5, 6), None, lambda done, total: None)[1] == [
        "computed in tiles: not enough memory for one pass"
    ]
    assert logging.getLogger().filters == filters
