"""Which text encoders a model type of the router takes, and where their files are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from luna_daemon.core import BadRequest

from .. import host

__all__ = ["MODEL_TYPES", "NONE", "clip_names", "clip_path", "clip_slots", "family"]

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
"""ComfyUI encodes for these with whichever of the encoders are there."""
MODEL_TYPES = tuple(_SLOTS)
_FURTHER = ("clip_gguf", "clip_vision", "LLM")
"""Folders whose files are listed as ``folder/name``."""
_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def family(model_type: str) -> str:
    """ComfyUI's ``type`` of its text encoder loaders."""
    return _FAMILIES[model_type]


def clip_slots(model_type: str, chosen: Sequence[str], from_checkpoint: bool = False) -> list[str]:
    """The chosen names in the order that the loader wants; empty if the checkpoint's own are to be used.

    Args:
        chosen: the values of ``clip_1`` to ``clip_4``.
        from_checkpoint: whether there is a checkpoint that may carry them.

    Raises:
        BadRequest: unknown type, or encoders are missing: names them.
    """
    if model_type not in _SLOTS:
        raise BadRequest(f"model_type={model_type!r} is unknown", f"Choose one of {', '.join(MODEL_TYPES)}")
    given = {f"clip_{number}": name for number, name in enumerate(chosen, 1) if name and name != NONE}
    wanted = _SLOTS[model_type]
    if from_checkpoint and not given.keys() & wanted.keys():
        return []
    missing = [f"{slot} ({what})" for slot, what in wanted.items() if slot not in given]
    if missing and (model_type not in _ANY_OF_THEM or len(missing) == len(wanted)):
        joint = " or " if model_type in _ANY_OF_THEM else " and "
        hint = "With all of them None the checkpoint's own are used" if from_checkpoint else "Choose their files"
        raise BadRequest(f"{model_type} needs {joint.join(missing)}", hint)
    return [given[slot] for slot in wanted if slot in given]


def clip_names() -> list[str]:
    """Everything the router lists for text encoders."""
    return [NONE, *host.names("text_encoders"), *(name for folder in _FURTHER for name in _further(folder))]


def _further(folder: str) -> list[str]:
    """``folder/name`` for the files of a folder below ComfyUI's models."""
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
    """The file of a name of ``clip_names``.

    Raises:
        BadRequest: a kind of file that the daemon does not serve.
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
