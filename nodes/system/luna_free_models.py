"""LunaFreeModels: has the daemon give the memory of its models back."""

from __future__ import annotations

from typing import Any

from luna_daemon.client import get_client
from luna_daemon.core import LunaError, logger

from .. import host

__all__ = ["LunaFreeModels"]


class LunaFreeModels:
    """Passes anything through; when it comes by, the daemon unloads. Models are loaded again when they are needed."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Passes its input on and has the Luna Daemon give the memory of all its models back, those of other ComfyUIs "
        "included. They are loaded again at their next use."
    )
    SEARCH_ALIASES = ["free memory", "unload models", "clear vram", "purge vram", "daemon"]
    RETURN_TYPES = (host.ANY,)
    RETURN_NAMES = ("value",)
    FUNCTION = "free"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {"value": (host.ANY, {"tooltip": "Anything; the models are freed once it is there."})},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # equals nothing: runs in every prompt

    def free(self, value: Any = None) -> tuple[Any]:
        try:
            get_client().unload()
        except LunaError as error:
            logger.warning("nothing was freed: %s", error)
        return (value,)
