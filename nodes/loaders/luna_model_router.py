"""LunaModelRouter: diffusion model, text encoders and VAE in one node, with the inputs of the predecessor's node."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from luna_daemon.core import ModelLoadError

from .. import host, models
from ..not_served import NotServed
from .diffusion import PRECISIONS, SOURCES, load_diffusion, model_folder, model_names
from .encoders import MODEL_TYPES, NONE, clip_names, clip_path, clip_slots, family

_CLIP_TIPS = (
    "First text encoder: CLIP-L, or Qwen3 for Z-IMAGE. None in all slots uses the checkpoint's own.",
    "Second text encoder: CLIP-G for SDXL and SD3.",
    "Third text encoder: T5-XXL for Flux and SD3.",
    "Kept for saved workflows; no vision encoder is loaded.",
)
_MODE_TIP = (
    "auto: the daemon, and local models while the daemon is away. force_daemon: the daemon, or an error. "
    "force_local: local models only."
)
_LLM = "language models are not served; use a node pack that runs them"
_VISION = "vision encoders are not served; use ComfyUI's node Load CLIP Vision"


def _choice(values: Iterable[str], default: str, tooltip: str) -> tuple[list[str], dict[str, Any]]:
    return list(values), {"default": default, "tooltip": tooltip}


class LunaModelRouter:
    """Node that loads the diffusion model into this ComfyUI and takes CLIP and VAE from the daemon."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Loads a diffusion model in this ComfyUI and takes the text encoders and the VAE from the Luna Daemon, which "
        "holds them once for every ComfyUI on this machine."
    )
    SEARCH_ALIASES = ["load checkpoint", "model loader", "checkpoint loader", "unet loader", "daemon", "luna router"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "LLM", "CLIP_VISION", "STRING", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "llm", "clip_vision", "model_name", "status")
    OUTPUT_TOOLTIPS = (
        "The diffusion model, loaded in this ComfyUI.", "The text encoders.", "The VAE.", "Empty.", "Empty.",
        "The model's name, for the gateway.", "What was loaded, and where CLIP and VAE are computed.",
    )  # fmt: skip
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """List models, encoders and VAEs in the order of saved workflows."""
        clips = clip_names()
        slots = {f"clip_{n}": (clips, {"default": NONE, "tooltip": tip}) for n, tip in enumerate(_CLIP_TIPS, 1)}
        required = {
            "model_source": _choice(SOURCES, "checkpoints", "The folder of the model."),
            "model_name": _choice([NONE, *model_names()], NONE, "The diffusion model's file."),
            "model_type": _choice(MODEL_TYPES, "SDXL", "The model family; decides which text encoders are needed."),
            "dynamic_precision": _choice(PRECISIONS, NONE, "Precision of the diffusion model; None is the file's own."),
            **slots,
            "vae_name": _choice([NONE, *models.vae_names()], NONE, "The VAE; None uses the checkpoint's own."),
            "daemon_mode": _choice(models.MODES, models.AUTO, _MODE_TIP),
        }
        unused = {"default": "", "tooltip": "Kept for saved workflows; not used."}
        return {
            "required": required,
            "optional": {"local_weights_dir": ("STRING", unused)},
            "hidden": {"dynprompt": "DYNPROMPT", "unique_id": "UNIQUE_ID"},
        }

    def load(
        self, model_source: str, model_name: str, model_type: str, dynamic_precision: str, clip_1: str, clip_2: str,
        clip_3: str, clip_4: str, vae_name: str, daemon_mode: str, local_weights_dir: str = "", dynprompt: Any = None,
        unique_id: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Load everything that is chosen; returns a value for each of ``RETURN_TYPES``."""
        checkpoint = _checkpoint(model_source, model_name)
        slots = clip_slots(model_type, (clip_1, clip_2, clip_3, clip_4), bool(checkpoint))
        paths = [clip_path(name) for name in slots]
        running = models.check_mode(daemon_mode)
        clip, vae = _clip_and_vae(checkpoint, paths, family(model_type), vae_name, daemon_mode)
        model: Any = NotServed("model", "no model_name is chosen")
        if model_name != NONE:
            model = load_diffusion(model_source, model_name, dynamic_precision)
        parts = [
            f"MODEL: {model_name}" + ("" if dynamic_precision == NONE else f" as {dynamic_precision}"),
            f"CLIP: {', '.join(slots) or 'from the checkpoint'}",
            f"VAE: {_vae_words(vae_name, vae)}",
        ]
        where = {models.FORCE_LOCAL: "local"}.get(
            daemon_mode, "daemon" if running else "daemon away, local models step in"
        )
        stem = "" if model_name == NONE else os.path.splitext(os.path.basename(model_name.replace("\\", "/")))[0]
        status = f"[{model_type}] {where} | " + " | ".join(parts)
        return model, clip, vae, NotServed("llm", _LLM), NotServed("clip_vision", _VISION), stem, status


def _checkpoint(source: str, name: str) -> str:
    """Path of a whole checkpoint, which may carry CLIP and VAE; empty if the model is not a checkpoint."""
    folder = model_folder(source, name)
    return host.path(folder, name) if folder == "checkpoints" and name != NONE else ""


def _clip_and_vae(checkpoint: str, clips: list[str], kind: str, vae_name: str, mode: str) -> tuple[Any, Any]:
    """Load each from separate files if chosen, else from the checkpoint.

    Raises:
        ModelLoadError: the checkpoint does not carry the text encoders.
    """
    clip = models.load_clip(clips, kind, mode) if clips else None
    vae: Any = models.load_vae(vae_name, mode) if vae_name != NONE else None
    if checkpoint and (clip is None or vae is None):
        carried_clip, carried_vae = models.load_from_checkpoint(checkpoint, mode)
        clip, vae = clip or carried_clip, vae or carried_vae
    if clip is None:
        raise ModelLoadError(f"{checkpoint} carries no text encoders", "Choose them in clip_1 to clip_3")
    return clip, vae or NotServed("vae", "vae_name is None and no checkpoint carries a VAE")


def _vae_words(name: str, vae: Any) -> str:
    if name != NONE:
        return name
    return "none" if isinstance(vae, NotServed) else "from the checkpoint"
