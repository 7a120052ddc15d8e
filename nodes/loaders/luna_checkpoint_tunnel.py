"""LunaCheckpointTunnel: replaces the CLIP and VAE of a stock loader by the daemon's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from luna_daemon.core import LunaError, ModelLoadError, logger

from .. import models
from .contents import differs, find_by_contents
from .origins import Origin, find_origin

_CLIP_STATE = ("layer_idx", "tokenizer_options", "use_clip_schedule", "apply_hooks_to_conds")


class LunaCheckpointTunnel:
    """Node behind a stock loader: passes MODEL, and replaces CLIP and VAE if their files can be determined."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Place this node behind a stock loader: the model passes unchanged, and the Luna Daemon computes CLIP and VAE "
        "from the same files. A CLIP or VAE that matches no file passes unchanged, with a warning."
    )
    SEARCH_ALIASES = ["checkpoint", "tunnel", "daemon clip", "daemon vae", "share models"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = ("The model, unchanged.", "The daemon's text encoders.", "The daemon's VAE.")
    FUNCTION = "tunnel"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Take what a checkpoint loader gives, and the workflow, which names the files."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model, which passes unchanged."}),
                "clip": (
                    "CLIP",
                    {"tooltip": "The CLIP of a stock loader; its LoRAs and clip skip are kept."},
                ),
                "vae": ("VAE", {"tooltip": "The VAE of a stock loader."}),
            },
            "hidden": {"dynprompt": "DYNPROMPT", "unique_id": "UNIQUE_ID"},
        }

    def tunnel(
        self, model: Any, clip: Any, vae: Any, dynprompt: Any = None, unique_id: Any = None
    ) -> tuple[Any, Any, Any]:
        """Replace CLIP and VAE, each if possible.

        Args:
            model, clip, vae: outputs of stock nodes.
            dynprompt: the workflow, as ComfyUI's ``DynamicPrompt``.
            unique_id: this node's id in the workflow.
        """

        def origin(widget: str) -> Origin | None:
            return None if dynprompt is None else find_origin(dynprompt, unique_id, widget)

        clip = _replaced("clip", clip, origin("clip"), ("checkpoints", "text_encoders"), _daemon_clip)
        vae = _replaced("vae", vae, origin("vae"), ("vae", "checkpoints"), _daemon_vae)
        return model, clip, vae


def _replaced(
    what: str, original: Any, origin: Origin | None, folders: tuple[str, ...], make: Callable[[Any, Origin], Any]
) -> Any:
    """Return the daemon's counterpart of an object, or the object itself with a warning."""
    patcher = getattr(original, "patcher", None)
    if patcher is None or hasattr(patcher.model, "luna"):  # nothing inside, or the daemon's already
        return original
    why = _why_not(patcher, origin)
    if not why:
        why = "none of ComfyUI's model files holds its weights"
        for candidate in [origin] if origin else find_by_contents(patcher, folders):
            try:
                return make(original, candidate)
            except LunaError as error:
                why = str(error)
    logger.warning("the tunnel passes %s unchanged: %s", what, why)
    return original


def _why_not(patcher: Any, origin: Origin | None) -> str:
    if patcher.object_patches or patcher.hook_patches or patcher.forced_hooks is not None:
        return "a node has added code or hooks; place the tunnel before that node"
    if origin is not None and differs(patcher, origin.files):
        return f"{', '.join(origin.files)} has changed since it was loaded"
    return ""


def _daemon_vae(original: Any, origin: Origin) -> Any:
    vae = models.vae_of(origin.files, origin.checkpoint)
    _check_alike(original.first_stage_model, vae.first_stage_model, origin)
    return vae


def _daemon_clip(original: Any, origin: Origin) -> Any:
    clip = models.clip_of(origin.files, origin.family, origin.checkpoint)
    _check_alike(original.cond_stage_model, clip.cond_stage_model, origin)
    return take_along(original, clip)


def _check_alike(original: Any, made: Any, origin: Origin) -> None:
    """Compare two networks by name and shapes: each load may create the classes again.

    Raises:
        ModelLoadError: the networks differ.
    """
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (original, made)]
    if type(original).__name__ != type(made).__name__ or shapes[0] != shapes[1]:
        names = f"a {type(made).__name__} that differs from the {type(original).__name__} of the workflow"
        raise ModelLoadError(f"{origin.files[0]} makes {names}")


def take_along(original: Any, clip: Any) -> Any:
    """Copy the patches (LoRA) and the settings (clip skip) of ``original`` to ``clip``, and return ``clip``."""
    for name in _CLIP_STATE:
        if hasattr(original, name):
            setattr(clip, name, getattr(original, name))
    for patches, strength_patch, strength_model in _in_order(original.patcher.patches):
        clip.add_patches(patches, strength_patch, strength_model)
    return clip


def _in_order(patches: dict[str, list[Any]]) -> Iterator[tuple[dict[Any, Any], float, float]]:
    """A patcher's patches as calls of ``add_patches``: in each key's order, patches of equal strength in one call."""
    for place in range(max(map(len, patches.values()), default=0)):
        calls: dict[tuple[float, float], dict[Any, Any]] = {}
        for key, entries in patches.items():
            if place < len(entries):
                strength_patch, value, strength_model, offset, function = entries[place]
                full = (key, offset, function) if function is not None else (key, offset) if offset is not None else key
                calls.setdefault((strength_patch, strength_model), {})[full] = value
        for (strength_patch, strength_model), together in calls.items():
            yield together, strength_patch, strength_model
