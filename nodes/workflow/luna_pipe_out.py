"""LunaPipeOut: splits the gateway's pipe into its parts."""

from __future__ import annotations

from typing import Any

from luna_daemon.core import BadRequest

from .. import host


class LunaPipeOut:
    """Node that splits a ``LUNA_PIPE`` into its parts."""

    CATEGORY = "Luna"
    DESCRIPTION = "Splits the pipe of Luna Config Gateway into its parts."
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
        """Take a pipe."""
        return {"required": {"luna_pipe": ("LUNA_PIPE", {"tooltip": "The pipe of Luna Config Gateway."})}}

    def unpack(self, luna_pipe: Any) -> tuple[Any, ...]:
        """Split the pipe; returns a value for each of ``RETURN_TYPES``.

        Raises:
            BadRequest: the value is not such a pipe.
        """
        if not isinstance(luna_pipe, (tuple, list)) or len(luna_pipe) != len(self.RETURN_NAMES):
            raise BadRequest("luna_pipe is not a pipe of Luna Config Gateway")
        return tuple(luna_pipe)
