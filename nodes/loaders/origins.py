"""Origin of a workflow's CLIP or VAE: the stock loader that made the object, and that loader's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import host, models

_PASSING = {"LoraLoader": "clip", "LunaLoadLoRA": "clip", "CLIPSetLastLayer": "clip"}
"""Nodes that a CLIP may have passed through: their changes are on the object, and are copied from there."""
_CHECKPOINTS = {"CheckpointLoaderSimple", "CheckpointLoader", "unCLIPCheckpointLoader"}
_CLIP_WIDGETS = {
    "CLIPLoader": ("clip_name",),
    "DualCLIPLoader": ("clip_name1", "clip_name2"),
    "TripleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3"),
    "QuadrupleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3", "clip_name4"),
}
_MOST_STEPS = 100


@dataclass(frozen=True)
class Origin:
    """Files behind an object; ``family`` is the ``type`` of a loader of separate text encoders."""

    files: tuple[str, ...]
    checkpoint: bool = False
    family: str = "stable_diffusion"


def find_origin(prompt: Any, node: str, widget: str) -> Origin | None:
    """Follow a node's input back to a stock loader.

    Args:
        prompt: ComfyUI's ``DynamicPrompt``.
        node: the id of the node that has the input.
        widget: the input's name.

    Returns:
        ``None`` if another kind of node made the object, or if the workflow does not name the file.
    """
    for _ in range(_MOST_STEPS):
        link = prompt.get_node(node)["inputs"].get(widget)
        if not isinstance(link, (list, tuple)) or len(link) != 2:
            return None
        node = link[0]
        maker = prompt.get_node(node)
        kind, inputs = maker["class_type"], maker["inputs"]
        if kind not in _PASSING:
            return _of_loader(kind, inputs)
        widget = _PASSING[kind]
    return None


def _of_loader(kind: str, inputs: dict[str, Any]) -> Origin | None:
    try:
        if kind in _CHECKPOINTS:
            return Origin((host.path("checkpoints", _text(inputs, "ckpt_name")),), checkpoint=True)
        if kind == "VAELoader":
            files = tuple(models.vae_files(_text(inputs, "vae_name")))
            return Origin(files) if files else None
        if kind in _CLIP_WIDGETS:
            paths = tuple(host.path("text_encoders", _text(inputs, widget)) for widget in _CLIP_WIDGETS[kind])
            return Origin(paths, family=str(inputs.get("type", "stable_diffusion")))
    except (KeyError, FileNotFoundError):
        return None
    return None


def _text(inputs: dict[str, Any], widget: str) -> str:
    """A widget's value.

    Raises:
        KeyError: another node computes the value.
    """
    if not isinstance(inputs.get(widget), str):
        raise KeyError(widget)
    return str(inputs[widget])
