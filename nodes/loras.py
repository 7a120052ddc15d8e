"""LoRA files: found by the name that a user writes, read once per machine, applied as ComfyUI does."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any

from luna_daemon.client import get_client
from luna_daemon.core import BadRequest, LunaError, logger

from . import host
from .lora_tags import LoraTag

__all__ = ["apply_lora", "apply_loras", "find_lora", "read_lora"]


def find_lora(name: str, files: list[str] | None = None) -> str:
    """The file that a tag means: its whole name, without the ending, without the folder, or a part that only one has.

    Raises:
        BadRequest: none or several; names them.
    """
    files = host.names("loras") if files is None else files
    if name in files:
        return name
    wanted = _plain(name)
    for reading in (str, _stem, os.path.basename, lambda file: os.path.basename(_stem(file))):
        found = [file for file in files if reading(_plain(file)) == wanted]
        if found:
            return _only(name, found)
    found = [file for file in files if wanted in _plain(file)]
    if not found:
        close = difflib.get_close_matches(wanted, [_stem(_plain(file)) for file in files], n=3)
        raise BadRequest(f"there is no LoRA named {name!r}", f"Close to it: {', '.join(close)}" if close else "")
    return _only(name, found)


def _plain(name: str) -> str:
    return name.replace("\\", "/").lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _only(name: str, found: list[str]) -> str:
    if len(found) > 1:
        raise BadRequest(f"{name!r} may mean {', '.join(found)}", "Write more of the one that is meant")
    return found[0]


def read_lora(path: str) -> dict[str, Any]:
    """A LoRA's state dict: mapped from what the daemon keeps in RAM for all, else read as ComfyUI reads it.

    Tensors are the caller's own: what is written to one is seen by nobody else.
    """
    try:
        return get_client().load_lora(os.path.abspath(path))
    except LunaError as error:
        logger.info("%s is read from disk: %s", path, error)
    return _from_disk(path)


def _from_disk(path: str) -> dict[str, Any]:
    weights: dict[str, Any] = host.module("comfy.utils").load_torch_file(path, safe_load=True)
    return weights


def apply_lora(model: Any, clip: Any, weights: dict[str, Any], strength_model: float, strength_clip: float) -> Any:
    """``(model, clip)`` with a LoRA, as ComfyUI's own loader applies it; either may be ``None``."""
    return host.module("comfy.sd").load_lora_for_models(model, clip, weights, strength_model, strength_clip)


def apply_loras(model: Any, clip: Any, loras: Iterable[LoraTag]) -> tuple[Any, Any]:
    """``(model, clip)`` with all of them, in their order.

    Raises:
        BadRequest: one is not there.
    """
    for lora in loras:
        path = host.path("loras", find_lora(lora.name))
        if lora.model_weight or lora.clip_weight:
            model, clip = apply_lora(model, clip, read_lora(path), lora.model_weight, lora.clip_weight)
    return model, clip
