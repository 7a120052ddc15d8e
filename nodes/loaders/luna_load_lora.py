"""LunaLoadLoRA: the stock LoRA loader, with files that are read once per machine."""

from __future__ import annotations

from typing import Any

from .. import host, loras

_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
_STRENGTH_TIP = "Strength of the change to the {}; may be negative."


class LunaLoadLoRA:
    """LoraLoader whose files are kept in the daemon's RAM for all instances."""

    CATEGORY = "Luna"
    DESCRIPTION = "Applies a LoRA to a diffusion model and to text encoders; the Luna Daemon keeps the file in RAM."
    SEARCH_ALIASES = ["lora", "load lora", "apply lora", "lora loader", "daemon lora"]
    RETURN_TYPES = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS = ("The modified diffusion model.", "The modified text encoders.")
    FUNCTION = "load_lora"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """List the LoRA files."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model that the LoRA changes."}),
                "clip": ("CLIP", {"tooltip": "The text encoders that the LoRA changes, the daemon's or local ones."}),
                "lora_name": (host.names("loras"), {"tooltip": "The LoRA's file."}),
                "strength_model": ("FLOAT", {**_STRENGTH, "tooltip": _STRENGTH_TIP.format("diffusion model")}),
                "strength_clip": ("FLOAT", {**_STRENGTH, "tooltip": _STRENGTH_TIP.format("text encoders")}),
            }
        }

    def load_lora(
        self, model: Any, clip: Any, lora_name: str, strength_model: float, strength_clip: float
    ) -> tuple[Any, Any]:
        """Apply a LoRA to clones of both."""
        if not strength_model and not strength_clip:
            return model, clip
        path = host.path("loras", lora_name)
        # The weights are not kept on the node: the daemon keeps them, and notices when the file changes.
        changed: tuple[Any, Any] = loras.apply_lora(model, clip, loras.read_lora(path), strength_model, strength_clip)
        return changed
