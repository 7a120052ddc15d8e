"""Renaming: every layout of a part gives the same tensors, and none is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.make_text_encoder import to_ldm
from luna_daemon.backends.diffusers.conversions import _CONVERTERS, part_tensors
from luna_daemon.backends.diffusers.layouts import find_parts
from luna_daemon.backends.diffusers.weightfiles import open_weights

from .conftest import kl_weights, save, t5_model, tiny_halves


def open_clip() -> dict[str, torch.Tensor]:
    layer = "transformer.resblocks.0."
    return {
        "token_embedding.weight": torch.rand(8, 4),
        "positional_embedding": torch.rand(5, 4),
        f"{layer}attn.in_proj_weight": torch.rand(12, 4),
        f"{layer}attn.in_proj_bias": torch.rand(12),
        f"{layer}ln_1.weight": torch.rand(4),
    }


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("ldm", to_ldm(kl_weights())),
        ("diffusers", kl_weights()),
        ("raw", tiny_halves()[1]),
        ("comfy", {f"taesd_encoder.{key}": weight for key, weight in tiny_halves()[0].items()}),
        ("hf", dict(t5_model().state_dict())),
        ("open_clip", open_clip()),
    ],
)
def test_no_layout_copies_a_tensor(layout: str, weights: dict[str, torch.Tensor]) -> None:
    """Processes that load one file share its pages only as long as tensors are views of the mapped file."""
    owned = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    renamed = _CONVERTERS[layout](dict(weights))
    assert renamed and {weight.untyped_storage().data_ptr() for weight in renamed.values()} <= owned


def test_ldm_names_become_diffusers_names(tmp_path: Path) -> None:
    """LDM counts the decoder's levels from the outside, diffusers from the inside; attention is a convolution there."""
    (part,) = find_parts(open_weights(save(tmp_path / "x.safetensors", to_ldm(kl_weights()), "vae.", half=False)))
    renamed = part_tensors(part)
    assert renamed.keys() == kl_weights().keys()
    assert all(torch.equal(renamed[key], weight) for key, weight in kl_weights().items())


def test_open_clip_splits_the_attentions_matrix() -> None:
    weights = open_clip()
    renamed = _CONVERTERS["open_clip"](weights)
    fused = weights["transformer.resblocks.0.attn.in_proj_weight"]
    parts = [renamed[f"encoder.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), fused)
    assert "encoder.layers.0.layer_norm1.weight" in renamed and "embeddings.position_embedding.weight" in renamed
