"""LunaPipeOut: takes the gateway's pipe apart."""

from __future__ import annotations

from typing import Any

from luna_daemon.core import BadRequest

from .. import host

__all__ = ["LunaPipeOut"]


class LunaPipeOut:
    """The parts of a ``LUNA_PIPE``, in its order."""

    CATEGORY = "Luna"
    DESCRIPTION = "Takes the pipe of Luna Config Gateway apart."
    SEARCH_ALIASES = ["pipe", "unpack pipe", "pipe out", "luna pipe"]
    RETURN_TYPES = (
        "MODEL", "CLIP", "VAE", "CONDITIONING", "CONDITIONING", "LATENT", "INT", "INT", "INT", "INT", "FLOAT", "FLOAT",
        host.ANY, host.ANY,
    )  # fmt: skip
    RETURN_NAMES = (
        "model", "clip", "vae", "positive", "negative", "latent", "width", "height", "seed", "steps", "cfg", "denoise",
        "sampler", "scheduler",
    )  # fmt: skip
    FUNCTION = "unpack"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"luna_pipe": ("LUNA_PIPE", {"tooltip": "The pipe of Luna Config Gateway."})}}

    def unpack(self, luna_pipe: Any) -> tuple[Any, ...]:
        if not isinstance(luna_pipe, (tuple, list)) or len(luna_pipe) != len(self.RETURN_NAMES):
            raise BadRequest("luna_pipe is not a pipe of Luna Config Gateway")
        return tuple(luna_pipe)
