"""Text encoders of each model type of the router, and the files behind their names."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from luna_daemon.core import BadRequest

from .. import host

NONE = "None"
_SLOTS = {
    "SD1.5": {"clip_1": "CLIP-L"},
    "SDXL": {"clip_1": "CLIP-L", "clip_2": "CLIP-G"},
    "SDXL + Vision": {"clip_1": "CLIP-L", "clip_2": "CLIP-G"},
    "Flux": {"clip_1": "CLIP-L", "clip_3": "T5-XXL"},
    "Flux + Vision": {"clip_1": "CLIP-L", "clip_3": "T5-XXL"},
    "SD3": {"clip_1": "CLIP-L", "clip_2": "CLIP-G", "clip_3": "T5-XXL"},
    "Z-IMAGE": {"clip_1": "Qwen3"},
}
_FAMILIES = {
    "SD1.5": "stable_diffusion", "SDXL": "sdxl", "SDXL + Vision": "sdxl", "Flux": "flux", "Flux + Vision": "flux",
    "SD3": "sd3", "Z-IMAGE": "lumina2",
}  # fmt: skip
_ANY_OF_THEM = ("SD3",)
"""Model types for which ComfyUI encodes with any subset of the encoders."""
MODEL_TYPES = tuple(_SLOTS)
_FURTHER = ("clip_gguf", "clip_vision", "LLM")
"""Folders whose files are listed as ``folder/name``."""
_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def family(model_type: str) -> str:
    """Translate a model type into the ``type`` of ComfyUI's text encoder loaders."""
    return _FAMILIES[model_type]


def clip_slots(model_type: str, chosen: Sequence[str], from_checkpoint: bool = False) -> list[str]:
    """Select the chosen names in the loader's order; none if the checkpoint's own encoders are to be used.

    Args:
        model_type: one of ``MODEL_TYPES``.
        chosen: the values of ``clip_1`` to ``clip_4``.
        from_checkpoint: whether a checkpoint is loaded, which may carry encoders.

    Raises:
        BadRequest: the type is unknown, or encoders are missing; the message names them.
    """
    if model_type not in _SLOTS:
        raise BadRequest(f"model_type={model_type!r} is unknown", f"Choose one of {', '.join(MODEL_TYPES)}")
    filled = {f"clip_{number}": name for number, name in enumerate(chosen, 1) if name and name != NONE}
    wanted = _SLOTS[model_type]
    if from_checkpoint and not filled.keys() & wanted.keys():
        return []
    missing = [f"{slot} ({what})" for slot, what in wanted.items() if slot not in filled]
    if missing and (model_type not in _ANY_OF_THEM or len(missing) == len(wanted)):
        joint = " or " if model_type in _ANY_OF_THEM else " and "
        hint = "To use the checkpoint's own, set all of them to None" if from_checkpoint else "Choose their files"
        raise BadRequest(f"{model_type} needs {joint.join(missing)}", hint)
    return [filled[slot] for slot in wanted if slot in filled]


def clip_names() -> list[str]:
    """List everything that the router offers as a text encoder."""
    return [NONE, *host.names("text_encoders"), *(name for folder in _FURTHER for name in _further(folder))]


def _further(folder: str) -> list[str]:
    """List the files of a folder below ComfyUI's models as ``folder/name``."""
    paths = host.names(folder) or _walk(_below_models(folder))
    return [f"{folder}/{name}".replace("\\", "/") for name in paths]


def _walk(top: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(folder, file), top)
        for folder, _, files in os.walk(top)
        for file in files
        if file.lower().endswith(_ENDINGS)
    )


def _below_models(*parts: str) -> str:
    root = getattr(sys.modules.get("folder_paths"), "models_dir", "")
    return os.path.join(root, *parts) if root else ""


def clip_path(name: str) -> str:
    """Find the file of a name of ``clip_names``.

    Raises:
        BadRequest: the file is GGUF, which the daemon does not serve.
        FileNotFoundError: there is no such file.
    """
    if name.lower().endswith(".gguf"):
        raise BadRequest(
            f"text encoder {name!r} is GGUF, which is not served",
            "Choose a safetensors file, or use the CLIP of ComfyUI-GGUF's own loader",
        )
    folder, _, rest = name.partition("/")
    if folder in _FURTHER and name not in host.names("text_encoders"):
        return host.path(folder, rest) if rest in host.names(folder) else _existing(_below_models(folder, rest))
    return host.path("text_encoders", name)


def _existing(path: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"text encoder {path!r} does not exist")
    return path
