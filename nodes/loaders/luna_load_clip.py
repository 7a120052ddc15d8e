"""LunaLoadCLIP: the stock loaders of one to four text encoders, with weights that live in the daemon."""

from __future__ import annotations

from typing import Any

from .. import host, models

_NONE = "none"


class LunaLoadCLIP:
    """CLIPLoader, DualCLIPLoader, TripleCLIPLoader and QuadrupleCLIPLoader in one, computed by the daemon."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Loads one to four text encoders that live in the Luna Daemon, once for every ComfyUI on this machine.\n\n"
        "stable_diffusion: clip-l\nsdxl: clip-l, clip-g\nsd3: clip-l, clip-g, t5xxl, or any of them\n"
        "flux: clip-l, t5xxl\nhidream: clip-l, clip-g, t5xxl, llama"
    )
    SEARCH_ALIASES = [
        "load clip", "clip loader", "dual clip loader", "triple clip loader", "text encoder", "daemon clip",
    ]  # fmt: skip
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("Works in every node that takes a CLIP. ComfyUI loads the files while the daemon is away.",)
    FUNCTION = "load_clip"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """List text encoder files, and the types of all stock loaders."""
        files = host.names("text_encoders")
        more = {"default": _NONE, "tooltip": "Another text encoder, or none."}
        return {
            "required": {
                "clip_name1": (files, {"tooltip": "The first text encoder."}),
                "clip_name2": ([_NONE, *files], more),
                "clip_name3": ([_NONE, *files], more),
                "clip_name4": ([_NONE, *files], more),
                "type": (models.clip_types(), {"tooltip": "The model family, as in the stock loaders."}),
            }
        }

    def load_clip(
        self, clip_name1: str, type: str, clip_name2: str = _NONE, clip_name3: str = _NONE, clip_name4: str = _NONE
    ) -> tuple[Any]:
        """Load the chosen files as one CLIP."""
        chosen = [name for name in (clip_name1, clip_name2, clip_name3, clip_name4) if name.lower() != _NONE]
        return (models.load_clip([host.path("text_encoders", name) for name in chosen], type),)
