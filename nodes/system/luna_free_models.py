"""LunaFreeModels: frees the memory of the daemon's models."""

from __future__ import annotations

from typing import Any

from luna_daemon.client import get_client
from luna_daemon.core import LunaError, logger

from .. import host


class LunaFreeModels:
    """Node that passes a value on and has the daemon unload all models; the next use loads a model again."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Passes its input on and has the Luna Daemon unload all models, those that other ComfyUIs use included. "
        "A model is loaded again at its next use."
    )
    SEARCH_ALIASES = ["free memory", "unload models", "clear vram", "purge vram", "daemon"]
    RETURN_TYPES = (host.ANY,)
    RETURN_NAMES = ("value",)
    FUNCTION = "free"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Take any value, which decides when the models are unloaded."""
        return {
            "required": {},
            "optional": {"value": (host.ANY, {"tooltip": "Any value; models are unloaded after its computation."})},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        """Make ComfyUI run the node each time, also with unchanged inputs."""
        return float("nan")  # equals nothing

    def free(self, value: Any = None) -> tuple[Any]:
        """Unload the daemon's models and pass the value on; without a daemon only a warning is logged."""
        try:
            get_client().unload()
        except LunaError as error:
            logger.warning("the daemon's models were not unloaded: %s", error)
        return (value,)
