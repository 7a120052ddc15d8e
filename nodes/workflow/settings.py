"""Widgets of the gateway, in the order of saved workflows, which store values by position."""

from __future__ import annotations

import sys
from typing import Any

MOST_SEED = 0xFFFFFFFFFFFFFFFF


def _part(default: float, step: float, tooltip: str, most: float = 1.0) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": 0.0, "max": most, "step": step, "tooltip": tooltip}


def _whole(default: int, least: int, most: int, tooltip: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": least, "max": most, "tooltip": tooltip, **options}


def _prompt(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": "", "multiline": True, "dynamicPrompts": True, "tooltip": tooltip}


def _samplers(name: str) -> list[str]:
    sampler = getattr(sys.modules.get("comfy.samplers"), "KSampler", None)
    return list(getattr(sampler, name, ()))


def required() -> dict[str, Any]:
    """Required inputs."""
    return {
        "model": ("MODEL", {"tooltip": "The diffusion model."}),
        "clip": ("CLIP", {"tooltip": "The text encoders, the daemon's or local ones."}),
        "vae": ("VAE", {"tooltip": "The VAE, whose compression decides the latent's size."}),
        "width": _whole(1024, 16, 16384, "Width of the picture in pixels.", step=8),
        "height": _whole(1024, 16, 16384, "Height of the picture in pixels.", step=8),
        "batch_size": _whole(1, 1, 4096, "Number of pictures that are made at once."),
        "seed": _whole(0, 0, MOST_SEED, "The random seed of the noise.", control_after_generate=True),
        "steps": _whole(25, 1, 10000, "Number of sampling steps."),
        "cfg": _part(7.0, 0.1, "How closely the picture follows the prompt.", 100.0),
        "denoise": _part(1.0, 0.01, "How much is denoised; less than 1 keeps the structure of the input image."),
        "clip_skip": _whole(0, -24, 0, "Last layer of the text encoders; 0 is the model's own, -2 the last but one."),
        "clip_skip_timing": (
            ["before_lora", "after_lora"],
            {"default": "after_lora", "tooltip": "Kept for saved workflows; both values give the same result."},
        ),
        "sampler": (_samplers("SAMPLERS"), {"default": "dpmpp_2m", "tooltip": "The sampling algorithm."}),
        "scheduler": (_samplers("SCHEDULERS"), {"default": "karras", "tooltip": "How noise falls from step to step."}),
    }


def optional() -> dict[str, Any]:
    """Optional inputs: prompts, and settings with a good default."""
    return {
        "model_name": ("STRING", {"default": "", "tooltip": "The model's name, for the metadata."}),
        "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs from a stacker node, applied before those of the prompts."}),
        "vision_embed": ("LUNA_VISION_EMBED", {"tooltip": "Kept for saved workflows; must not be connected."}),
        "vision_strength": _part(1.0, 0.05, "Kept for saved workflows; not used.", 2.0),
        "fb_cache_enabled": (
            "BOOLEAN",
            {"default": False, "tooltip": "First Block Cache: steps with little change skip most of the model."},
        ),
        "fb_cache_start": _part(0.0, 0.05, "Fraction of the schedule before which every step is computed."),
        "fb_cache_end": _part(1.0, 0.05, "Fraction of the schedule after which every step is computed."),
        "fb_cache_threshold": _part(0.1, 0.01, "Change below which a step is reused; 0 reuses no step."),
        "fb_cache_max_consecutive_hits": _whole(-1, -1, 100, "Most steps reused in a row; -1 is no limit, 0 is off."),
        "positive_prompt": _prompt("What the picture shows. <lora:name:weight> applies a LoRA."),
        "negative_prompt": _prompt("What the picture does not show. <lora:name:weight> works here too."),
    }
