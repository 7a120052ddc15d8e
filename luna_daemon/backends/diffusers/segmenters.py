"""Finds a tokenizer on this machine; nothing is ever downloaded."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ...core import ModelLoadError

Ids = Callable[[str], list[int]]
"""Maps a piece of text to its token ids, without start and end tokens."""

_COMFY_FOLDERS = {"clip": "comfy/sd1_tokenizer", "t5": "comfy/text_encoders/t5_tokenizer"}
_SPECIAL = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def find_segmenter(family: str, model_folder: Path | None, environ: Mapping[str, str] = os.environ) -> Ids:
    """Find a tokenizer: beside the model, in a ComfyUI, or (CLIP only) the ``instant-clip-tokenizer`` package.

    Args:
        family: ``clip`` or ``t5``.
        model_folder: the text encoder's folder of the diffusers layout; ``None`` for a single file.
        environ: the environment, for ``COMFYUI_PATH``.

    Raises:
        ModelLoadError: the tokenizer is missing or broken; the message lists the folders tried.
    """
    folders: list[Path] = []
    if model_folder is not None:
        # text_encoder_2 belongs to tokenizer_2.
        folders += [model_folder.parent / model_folder.name.replace("text_encoder", "tokenizer"), model_folder]
    if root := environ.get("COMFYUI_PATH", ""):
        folders.append(Path(root) / _COMFY_FOLDERS[family])
    for folder in folders:
        if any((folder / name).is_file() for name in _VOCABULARY_FILES):
            return _from_folder(family, folder)
    packaged = _from_package() if family == "clip" else None
    if packaged is not None:
        return packaged
    tried = ", ".join(map(str, folders)) or "no folder: the model is a single file, and COMFYUI_PATH is not set"
    package = " or `pip install instant-clip-tokenizer`" if family == "clip" else ""
    raise ModelLoadError(
        f"no {family.upper()} tokenizer found; tried {tried}",
        f"Set COMFYUI_PATH to a ComfyUI folder{package}, or give a folder of the diffusers layout with its tokenizer",
    )


def _from_folder(family: str, folder: Path) -> Ids:
    import transformers

    # transformers 5 offers the T5 name at run time only.
    kind: Any = getattr(transformers, "CLIPTokenizer" if family == "clip" else "T5TokenizerFast")
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers passes on the errors of its parsers
        raise ModelLoadError(f"{folder} is not a {family.upper()} tokenizer: {error}") from error
    # As in ComfyUI, the frame is cut off: CLIP has a start and an end token, T5 only an end.
    first = len(tokenizer("")["input_ids"]) - 1

    def ids(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text)["input_ids"]
        return tokens[first:-1]

    return ids


def _from_package() -> Ids | None:
    try:
        tokenizer: Any = import_module("instant_clip_tokenizer").Tokenizer()
    except ImportError:
        return None

    def ids(text: str) -> list[int]:
        # Unlike transformers' tokenizer, the package neither normalises text nor knows special tokens.
        tokens: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, _SPECIAL))})", unicodedata.normalize("NFC", text)):
            tokens += [_SPECIAL[piece]] if piece in _SPECIAL else tokenizer.encode(piece)
        return tokens

    return ids
