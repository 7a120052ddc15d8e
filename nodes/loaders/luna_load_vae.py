"""LunaLoadVAE: the stock VAE loader, with the daemon's VAE."""

from __future__ import annotations

from typing import Any

from .. import models

__all__ = ["LunaLoadVAE"]


class LunaLoadVAE:
    """As VAELoader; the VAE's weights are the daemon's."""

    CATEGORY = "Luna"
    DESCRIPTION = "Loads a VAE that lives in the Luna Daemon, once for every ComfyUI on this machine."
    SEARCH_ALIASES = ["load vae", "vae loader", "daemon vae", "shared vae"]
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("Works in every node that takes a VAE; if the daemon is away, ComfyUI loads the file itself.",)
    FUNCTION = "load_vae"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"vae_name": (models.vae_names(), {"tooltip": "A VAE, as the stock loader lists it."})}}

    def load_vae(self, vae_name: str) -> tuple[Any]:
        return (models.load_vae(vae_name),)
