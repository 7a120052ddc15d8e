"""LoRA files: found by the name in a prompt, read once per machine, applied as ComfyUI does."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any

from luna_daemon.client import get_client
from luna_daemon.core import BadRequest, LunaError, logger

from . import host
from .lora_tags import LoraTag


def find_lora(name: str, files: list[str] | None = None) -> str:
    """Find the file that a tag names, with or without ending and folder, or by a part that only one file's name has.

    Raises:
        BadRequest: no file fits, or several do; the message names close or fitting ones.
    """
    files = host.names("loras") if files is None else files
    if name in files:
        return name
    wanted = _plain(name)
    for reading in (str, _stem, os.path.basename, lambda file: os.path.basename(_stem(file))):
        matches = [file for file in files if reading(_plain(file)) == wanted]
        if matches:
            return _only(name, matches)
    matches = [file for file in files if wanted in _plain(file)]
    if not matches:
        close = difflib.get_close_matches(wanted, [_stem(_plain(file)) for file in files], n=3)
        raise BadRequest(f"there is no LoRA named {name!r}", f"Similar names: {', '.join(close)}" if close else "")
    return _only(name, matches)


def _plain(name: str) -> str:
    return name.replace("\\", "/").lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _only(name: str, matches: list[str]) -> str:
    if len(matches) > 1:
        raise BadRequest(f"{name!r} may mean {', '.join(matches)}", "Write more of the name")
    return matches[0]


def read_lora(path: str) -> dict[str, Any]:
    """Read a LoRA's state dict from the daemon's RAM, or as ComfyUI does if the daemon does not give it.

    The tensors are the caller's own: nobody else sees what is written to them.
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
    """Apply a LoRA as ComfyUI's own loader does; returns ``(model, clip)``, of which either may be ``None``."""
    return host.module("comfy.sd").load_lora_for_models(model, clip, weights, strength_model, strength_clip)


def apply_loras(model: Any, clip: Any, loras: Iterable[LoraTag]) -> tuple[Any, Any]:
    """Apply LoRAs in their order; returns ``(model, clip)``.

    Raises:
        BadRequest: no file, or more than one, has a LoRA's name.
    """
    for lora in loras:
        path = host.path("loras", find_lora(lora.name))
        if lora.model_weight or lora.clip_weight:
            model, clip = apply_lora(model, clip, read_lora(path), lora.model_weight, lora.clip_weight)
    return model, clip
