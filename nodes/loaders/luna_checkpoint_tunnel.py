"""LunaCheckpointTunnel: puts the daemon under the CLIP and VAE of a stock loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from luna_daemon.core import LunaError, ModelLoadError, logger

from .. import models
from .contents import differs, find_by_contents
from .origins import Origin, find_origin

__all__ = ["LunaCheckpointTunnel", "take_along"]

_CLIP_STATE = ("layer_idx", "tokenizer_options", "use_clip_schedule", "apply_hooks_to_conds")


class LunaCheckpointTunnel:
    """Behind a stock loader: MODEL passes, CLIP and VAE become the daemon's if their files can be told."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Put it behind a stock loader: the model passes, and the CLIP and the VAE are computed by the Luna Daemon from "
        "the same files. What cannot be matched to a file passes unchanged, with a warning."
    )
    SEARCH_ALIASES = ["checkpoint", "tunnel", "daemon clip", "daemon vae", "share models"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = ("The model, unchanged.", "The daemon's text encoders.", "The daemon's VAE.")
    FUNCTION = "tunnel"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Passes unchanged."}),
                "clip": ("CLIP", {"tooltip": "From a stock loader; LoRAs and clip skip set before are kept."}),
                "vae": ("VAE", {"tooltip": "From a stock loader."}),
            },
            "hidden": {"dynprompt": "DYNPROMPT", "unique_id": "UNIQUE_ID"},
        }

    def tunnel(
        self, model: Any, clip: Any, vae: Any, dynprompt: Any = None, unique_id: Any = None
    ) -> tuple[Any, Any, Any]:
        def origin(widget: str) -> Origin | None:
            return None if dynprompt is None else find_origin(dynprompt, unique_id, widget)

        clip = _replaced("clip", clip, origin("clip"), ("checkpoints", "text_encoders"), _daemon_clip)
        vae = _replaced("vae", vae, origin("vae"), ("vae", "checkpoints"), _daemon_vae)
        return model, clip, vae


def _replaced(
    what: str, original: Any, origin: Origin | None, folders: tuple[str, ...], make: Callable[[Any, Origin], Any]
) -> Any:
    """The daemon's, or the original with a warning."""
    patcher = getattr(original, "patcher", None)
    if patcher is None or hasattr(patcher.model, "luna"):  # nothing inside, or the daemon's already
        return original
    why = _why_not(patcher, origin)
    if not why:
        why = "none of ComfyUI's model files holds its weights"
        for found in [origin] if origin else find_by_contents(patcher, folders):
            try:
                return make(original, found)
            except LunaError as error:
                why = str(error)
    logger.warning("the tunnel passes %s unchanged: %s", what, why)
    return original


def _why_not(patcher: Any, origin: Origin | None) -> str:
    if patcher.object_patches or patcher.hook_patches or patcher.forced_hooks is not None:
        return "a node has put code or hooks into it; put the tunnel before that node"
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


def _check_alike(given: Any, made: Any, origin: Origin) -> None:
    """Classes may be made anew by each load, so what they are made of is compared.

    Raises:
        ModelLoadError: another network than was given.
    """
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (given, made)]
    if type(given).__name__ != type(made).__name__ or shapes[0] != shapes[1]:
        raise ModelLoadError(f"{origin.files[0]} makes a {type(made).__name__} that is not like what was given")


def take_along(original: Any, clip: Any) -> Any:
    """``clip`` with the patches (LoRA) and the settings (clip skip) of another."""
    for name in _CLIP_STATE:
        if hasattr(original, name):
            setattr(clip, name, getattr(original, name))
    for patches, strength_patch, strength_model in _in_order(original.patcher.patches):
        clip.add_patches(patches, strength_patch, strength_model)
    return clip


def _in_order(patches: dict[str, list[Any]]) -> Iterator[tuple[dict[Any, Any], float, float]]:
    """A patcher's patches as calls of ``add_patches``: for each key in its order, of one strength in one call."""
    for place in range(max(map(len, patches.values()), default=0)):
        calls: dict[tuple[float, float], dict[Any, Any]] = {}
        for key, entries in patches.items():
            if place < len(entries):
                strength_patch, value, strength_model, offset, function = entries[place]
                full = (key, offset, function) if function is not None else (key, offset) if offset is not None else key
                calls.setdefault((strength_patch, strength_model), {})[full] = value
        for (strength_patch, strength_model), together in calls.items():
            yield together, strength_patch, strength_model
