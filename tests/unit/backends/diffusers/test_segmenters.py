"""Tokenizers: which one is taken, and what is said without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from luna_daemon.backends.diffusers import segmenters
from luna_daemon.backends.diffusers.segmenters import find_segmenter
from luna_daemon.core import ModelLoadError


def test_package_tokenizer_normalises_and_knows_the_special_tokens() -> None:
    pytest.importorskip("instant_clip_tokenizer")
    find = find_segmenter("clip", None, {})
    assert find("e\u0301") == find("\u00e9") == [4166]
    assert find("cat<|endoftext|>dog") == [2368, 49407, 1929]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Every folder that a tokenizer is made from."""
    calls: list[tuple[str, Path]] = []

    def made(family: str, folder: Path) -> None:
        calls.append((family, folder))

    monkeypatch.setattr(segmenters, "_from_folder", made)
    return calls


def vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("encoder", "tokenizer"), [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")])
def test_the_models_own_tokenizer_comes_first(
    encoder: str, tokenizer: str, taken: list[tuple[str, Path]], tmp_path: Path
) -> None:
    comfyui = vocabulary(tmp_path / "comfy" / "sd1_tokenizer")
    beside = vocabulary(tmp_path / "pipe" / tokenizer)
    find_segmenter("clip", tmp_path / "pipe" / encoder, {"COMFYUI_PATH": str(tmp_path)})
    find_segmenter("clip", None, {"COMFYUI_PATH": str(tmp_path)})
    assert taken == [("clip", beside), ("clip", comfyui)]


def test_no_tokenizer_lists_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no T5 tokenizer found; tried .*pipe.*t5_tokenizer"):
        find_segmenter("t5", tmp_path / "pipe" / "text_encoder", {"COMFYUI_PATH": str(tmp_path)})


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    folder = vocabulary(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("no JSON")
    with pytest.raises(ModelLoadError, match="tokenizer is not a CLIP tokenizer"):
        find_segmenter("clip", tmp_path / "text_encoder", {})
