"""Where a CLIP or VAE of a workflow came from: the stock loader that is followed back to, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import host, models

__all__ = ["Origin", "find_origin"]

_PASSING = {"LoraLoader": "clip", "LunaLoadLoRA": "clip", "CLIPSetLastLayer": "clip"}
"""Stock nodes that a CLIP may have passed through: what they changed is on the object, and is taken along."""
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
    """The files behind an object; ``family`` is the loader's ``type`` of text encoders of their own."""

    files: tuple[str, ...]
    checkpoint: bool = False
    family: str = "stable_diffusion"


def find_origin(prompt: Any, node: str, widget: str) -> Origin | None:
    """Follow an input of a node back to a stock loader.

    Args:
        prompt: ComfyUI's ``DynamicPrompt``.
        node: the id of the node that has the input ``widget``.

    Returns:
        None if another node made it, or if its file is not to be told from the workflow.
    """
    for _ in range(_MOST_STEPS):
        link = prompt.get_node(node)["inputs"].get(widget)
        if not isinstance(link, (list, tuple)) or len(link) != 2:
            return None
        node = link[0]
        found = prompt.get_node(node)
        kind, inputs = found["class_type"], found["inputs"]
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
        KeyError: another node computes it.
    """
    if not isinstance(inputs.get(widget), str):
        raise KeyError(widget)
    return str(inputs[widget])
