"""LunaLoadVAE: the stock VAE loader, with weights that live in the daemon."""

from __future__ import annotations

from typing import Any

from .. import models


class LunaLoadVAE:
    """VAELoader whose VAE is computed by the daemon."""

    CATEGORY = "Luna"
    DESCRIPTION = "Loads a VAE that lives in the Luna Daemon, once for every ComfyUI on this machine."
    SEARCH_ALIASES = ["load vae", "vae loader", "daemon vae", "shared vae"]
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("Works in every node that takes a VAE. ComfyUI loads the file while the daemon is away.",)
    FUNCTION = "load_vae"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """List the VAEs of the stock loader."""
        return {"required": {"vae_name": (models.vae_names(), {"tooltip": "A VAE; the same list as in Load VAE."})}}

    def load_vae(self, vae_name: str) -> tuple[Any]:
        """Load a VAE by name."""
        return (models.load_vae(vae_name),)
