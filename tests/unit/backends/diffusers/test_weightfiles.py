"""A model in one file, in shards, or in a pipeline's folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luna_daemon.backends.diffusers.weightfiles import component_folders, open_weights
from luna_daemon.core import ModelLoadError

from .conftest import save


def test_shards_are_one_model_and_variants_are_not(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / f"model-0000{number}-of-00002.safetensors", {f"key{number}": torch.full((2,), float(number))})
    save(tmp_path / "model.fp16-00001-of-00001.safetensors", {"twin": torch.zeros(2)})
    weights = open_weights(tmp_path)
    assert set(weights.entries) == {"key1", "key2"} and weights.shape("key1") == (2,)
    loaded = weights.load(["key2", "key1"])
    assert {key: float(tensor[0]) for key, tensor in loaded.items()} == {"key1": 1.0, "key2": 2.0}


def test_a_file_that_changed_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    weights = open_weights(path)
    path.write_bytes(b"other")
    with pytest.raises(ModelLoadError, match=r"x\.safetensors cannot be read"):
        weights.load(["a"])


def test_a_config_that_is_not_json_is_named(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json is not JSON"):
        open_weights(tmp_path)


def test_components_of_a_pipeline(tmp_path: Path) -> None:
    assert component_folders(tmp_path, "text_encoder") == [tmp_path]
    for name in ("text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
    assert component_folders(tmp_path, "text_encoder") == [tmp_path / "text_encoder", tmp_path / "text_encoder_2"]
