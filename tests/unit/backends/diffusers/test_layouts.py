"""What a file holds: told by keys and shapes, never by the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luna_daemon.backends.diffusers.layouts import describe, find_parts
from luna_daemon.backends.diffusers.weightfiles import open_weights

from .conftest import clip_model, save


def parts(path: Path, *keys: str, shape: tuple[int, ...] = (1,)) -> list[tuple[str, str, str]]:
    weights = open_weights(save(path / "x.safetensors", {key: torch.zeros(shape) for key in keys}))
    return [(part.name, part.layout, part.prefix) for part in find_parts(weights)]


def test_names_of_files_do_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "sdxl_vae.safetensors", clip_model("g").state_dict())
    assert [(part.name, part.prefix) for part in find_parts(open_weights(path))] == [("g", "text_model.")]


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("decoder.mid.block_1.norm1.weight", ("kl", "ldm", "")),
        ("first_stage_model.decoder.mid.block_1.norm1.weight", ("kl", "ldm", "first_stage_model.")),
        ("vae.decoder.mid_block.resnets.0.norm1.weight", ("kl", "diffusers", "vae.")),
        ("taesd_decoder.1.weight", ("tiny", "comfy", "")),
        ("decoder.layers.0.weight", ("tiny", "diffusers", "")),
        ("cond_stage_model.model.token_embedding.weight", ("l", "open_clip", "cond_stage_model.model.")),
        ("text_model.embeddings.token_embedding.weight", ("l", "hf", "text_model.")),
    ],
)
def test_one_key_tells_part_layout_and_prefix(key: str, part: tuple[str, str, str], tmp_path: Path) -> None:
    assert parts(tmp_path, key) == [part]


@pytest.mark.parametrize(("depth", "name"), [(12, "l"), (22, "l"), (23, "h"), (24, "h"), (31, "g"), (32, "g")])
@pytest.mark.parametrize(
    ("layout", "embedding", "layer"),
    [
        ("hf", "embeddings.token_embedding.weight", "encoder.layers.{}.x"),
        ("open_clip", "token_embedding.weight", "transformer.resblocks.{}.x"),
    ],
)
def test_clips_are_told_by_depth(
    layout: str, embedding: str, layer: str, depth: int, name: str, tmp_path: Path
) -> None:
    assert parts(tmp_path, embedding, *(layer.format(i) for i in range(depth))) == [(name, layout, "")]


@pytest.mark.parametrize(
    ("key", "shape", "name"),
    [
        ("1.weight", (64, 4, 3, 3), "tiny_decoder"),
        ("0.weight", (64, 3, 3, 3), "tiny_encoder"),
        ("0.weight", (64, 4, 3, 3), None),
        ("1.weight", (64, 4), None),
    ],
)
def test_halves_of_taesd_are_told_by_their_first_layer(
    key: str, shape: tuple[int, ...], name: str | None, tmp_path: Path
) -> None:
    assert parts(tmp_path, key, shape=shape) == ([] if name is None else [(name, "raw", "")])


def test_a_checkpoint_is_described_by_all_its_parts(tmp_path: Path) -> None:
    keys = ("first_stage_model.decoder.mid.block_1.norm1.weight", "text_model.embeddings.token_embedding.weight")
    path = save(tmp_path / "x.safetensors", {key: torch.zeros(1) for key in keys})
    assert describe(open_weights(path)) == "a VAE and a CLIP-L text encoder"
