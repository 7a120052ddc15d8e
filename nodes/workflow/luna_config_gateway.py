"""LunaConfigGateway: makes everything that a sampler needs from models, prompts and settings, and a record."""

from __future__ import annotations

import os
from typing import Any

from luna_daemon.core import BadRequest
from luna_daemon.wavespeed_utils import apply_fb_cache_to_model

from .. import host
from ..lora_tags import LoraTag, combined, parse_lora_tags
from ..loras import apply_loras
from . import settings

_WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


class LunaConfigGateway:
    """Node for a workflow's settings: LoRAs, clip skip, prompts, latent, First Block Cache, metadata."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Applies LoRAs (<lora:name:weight> in the prompts, and a LoRA stack), clip skip and First Block Cache, encodes "
        "the prompts and makes the latent. The outputs are one pipe with all of it, and each part alone."
    )
    SEARCH_ALIASES = ["config", "settings", "prompt", "lora tags", "clip text encode", "pipe", "luna gateway"]
    RETURN_TYPES = (
        "LUNA_PIPE", "MODEL", "CLIP", "VAE", "CONDITIONING", "CONDITIONING", "LATENT", "INT", "INT", "FLOAT", host.ANY,
        host.ANY, "FLOAT", "METADATA",
    )  # fmt: skip
    RETURN_NAMES = (
        "luna_pipe", "model", "clip", "vae", "positive", "negative", "latent", "seed", "steps", "cfg", "sampler",
        "scheduler", "denoise", "metadata",
    )  # fmt: skip
    FUNCTION = "process"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """List the widgets in the order of saved workflows."""
        return {"required": settings.required(), "optional": settings.optional()}

    def process(
        self, model: Any, clip: Any, vae: Any, width: int, height: int, batch_size: int, seed: int, steps: int,
        cfg: float, denoise: float, clip_skip: int, sampler: str, scheduler: str, clip_skip_timing: str = "after_lora",
        model_name: str = "", positive_prompt: str = "", negative_prompt: str = "", lora_stack: Any = None,
        vision_embed: Any = None, vision_strength: float = 1.0, fb_cache_enabled: bool = False,
        fb_cache_start: float = 0.0, fb_cache_end: float = 1.0, fb_cache_threshold: float = 0.1,
        fb_cache_max_consecutive_hits: int = -1,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Prepare a sampler's inputs; returns a value for each of ``RETURN_TYPES``.

        Raises:
            BadRequest: ``clip`` is empty, ``vision_embed`` is connected, or a LoRA tag is wrong.
        """
        _check(clip, vision_embed)
        prompts = [parse_lora_tags(text or "") for text in (positive_prompt, negative_prompt)]
        loras = combined(lora_stack, [tag for _, tags in prompts for tag in tags])
        model, clip = apply_loras(model, clip_skipped(clip, clip_skip), loras)
        if fb_cache_enabled:
            model = apply_fb_cache_to_model(
                model, residual_diff_threshold=fb_cache_threshold, start=fb_cache_start, end=fb_cache_end,
                max_consecutive_cache_hits=fb_cache_max_consecutive_hits,
            )  # fmt: skip
        positive, negative = (encoded(clip, text) for text, _ in prompts)
        latent = empty_latent(model, vae, width, height, batch_size)
        metadata = {
            **_named(model_name), **_texts(positive_prompt, prompts[0][0], "positive"),
            **_texts(negative_prompt, prompts[1][0], "negative"), "width": width, "height": height, "seed": seed,
            "steps": steps, "cfg": cfg, "denoise": denoise, "sampler": sampler, "sampler_name": sampler,
            "scheduler": scheduler, "clip_skip": clip_skip, "batch_size": batch_size, **_listed(loras),
            "fb_cache_enabled": fb_cache_enabled, "fb_cache_threshold": fb_cache_threshold,
        }  # fmt: skip
        pipe = (
            model, clip, vae, positive, negative, latent, width, height, seed, steps, cfg, denoise, sampler, scheduler,
        )  # fmt: skip
        return (pipe, *pipe[:6], seed, steps, cfg, sampler, scheduler, denoise, metadata)


def _check(clip: Any, vision_embed: Any) -> None:
    if clip is None:
        raise BadRequest("clip is empty: the checkpoint carries no text encoders", "Load them with Luna Load CLIP")
    if vision_embed is not None:
        raise BadRequest("vision_embed is not served by this node", "Disconnect it")


def clip_skipped(clip: Any, layer: int) -> Any:
    """Set the last layer as the stock CLIPSetLastLayer does; 0 keeps the model's own."""
    if not layer:
        return clip
    clip = clip.clone()
    clip.clip_layer(layer)
    return clip


def encoded(clip: Any, text: str) -> Any:
    """Encode a text as the stock CLIPTextEncode does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def empty_latent(model: Any, vae: Any, width: int, height: int, batch_size: int) -> dict[str, Any]:
    """Make a latent of zeros ``[B,C,h,w]``, or ``[B,C,1,h,w]`` for a video model.

    ``C`` is the model's number of channels; ``h`` and ``w`` are the size divided by the VAE's compression.
    """
    kind = model.get_model_object("latent_format")
    ratio = vae.spacial_compression_encode()
    frames = [1] if kind.latent_dimensions == 3 else []
    shape = [batch_size, kind.latent_channels, *frames, int(height // ratio), int(width // ratio)]
    device = host.module("comfy.model_management").intermediate_device()
    return {"samples": host.module("torch").zeros(shape, device=device)}


def _named(model_name: str) -> dict[str, str]:
    stem, ending = os.path.splitext(model_name)
    name = stem if ending.lower() in _WEIGHTS else model_name
    return {"model": name, "model_name": name}


def _texts(written: str, clean: str, which: str) -> dict[str, str]:
    return {which: written or "", f"{which}_clean": clean}


def _listed(loras: list[LoraTag]) -> dict[str, Any]:
    listed = ", ".join(f"{lora.name}:{lora.model_weight:g}:{lora.clip_weight:g}" for lora in loras)
    return {"loras": listed, "lora_count": len(loras)}
