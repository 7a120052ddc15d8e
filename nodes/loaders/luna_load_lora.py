"""LunaLoadLoRA: the stock LoRA loader, whose files are read once per machine."""

from __future__ import annotations

from typing import Any

from .. import host, loras

__all__ = ["LunaLoadLoRA"]

_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


class LunaLoadLoRA:
    """As LoraLoader; the file's contents are kept in the daemon's RAM for all instances."""

    CATEGORY = "Luna"
    DESCRIPTION = "Applies a LoRA to a diffusion model and to text encoders. The file is kept in the Luna Daemon's RAM."
    SEARCH_ALIASES = ["lora", "load lora", "apply lora", "lora loader", "daemon lora"]
    RETURN_TYPES = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS = ("The modified diffusion model.", "The modified text encoders.")
    FUNCTION = "load_lora"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model the LoRA is applied to."}),
                "clip": ("CLIP", {"tooltip": "The text encoders the LoRA is applied to, the daemon's or local ones."}),
                "lora_name": (host.names("loras"), {"tooltip": "The LoRA's file."}),
                "strength_model": (
                    "FLOAT",
                    {**_STRENGTH, "tooltip": "Of the change; may be negative."},
                ),
                "strength_clip": (
                    "FLOAT",
                    {**_STRENGTH, "tooltip": "Of the change; may be negative."},
                ),
            }
        }

    def load_lora(
        self, model: Any, clip: Any, lora_name: str, strength_model: float, strength_clip: float
    ) -> tuple[Any, Any]:
        if not strength_model and not strength_clip:
            return model, clip
        path = host.path("loras", lora_name)
        # Not kept here: the daemon keeps it, and sees when the file changes.
        changed: tuple[Any, Any] = loras.apply_lora(model, clip, loras.read_lora(path), strength_model, strength_clip)
        return changed
