"""Detects which VAEs and text encoders a file holds, by keys and shapes.

Names of files and metadata are never trusted: ComfyUI users rename files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .weightfiles import WeightFiles


@dataclass(frozen=True)
class Part:
    """One model inside a file."""

    name: str
    """``kl``, ``tiny``, ``tiny_encoder``, ``tiny_decoder``; ``l``, ``g``, ``h``, ``t5xxl``."""
    layout: str
    """Naming scheme of the keys: ``ldm``, ``diffusers``, ``comfy``, ``raw``, ``hf``, ``open_clip``."""
    prefix: str
    """Text that precedes the layout's keys in the file."""
    weights: WeightFiles

    def keys(self) -> list[str]:
        """List the part's keys without the prefix."""
        return [key[len(self.prefix) :] for key in self.weights.below(self.prefix)]


def count_numbers(keys: Iterable[str], pattern: str) -> int:
    """Count the distinct numbers that the group of ``pattern`` matches in keys."""
    return len({match.group(1) for key in keys if (match := re.match(pattern, key))})


_TEXT_PREFIXES = (
    "", "text_model.", "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.text_model.", "text_encoders.clip_l.transformer.text_model.",
    "text_encoders.clip_g.transformer.text_model.",
)  # fmt: skip
_OPEN_CLIP_PREFIXES = (
    "", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "cond_stage_model.model.",
)  # fmt: skip
_T5_PREFIXES = ("", "text_encoders.t5xxl.transformer.")
_VAE_PREFIXES = ("", "first_stage_model.", "vae.")

# Name of the part, layout, a key that only this layout has, prefixes that may precede the key.
_PROBES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("kl", "ldm", "decoder.mid.block_1.norm1.weight", _VAE_PREFIXES),
    ("kl", "diffusers", "decoder.mid_block.resnets.0.norm1.weight", _VAE_PREFIXES),
    ("tiny", "comfy", "taesd_decoder.1.weight", _VAE_PREFIXES),
    ("tiny", "diffusers", "decoder.layers.0.weight", _VAE_PREFIXES),
    ("clip", "hf", "embeddings.token_embedding.weight", _TEXT_PREFIXES),
    ("clip", "open_clip", "token_embedding.weight", _OPEN_CLIP_PREFIXES),
    ("t5xxl", "hf", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", _T5_PREFIXES),
)


def find_parts(weights: WeightFiles) -> list[Part]:
    """Find every VAE and text encoder inside a file; a whole checkpoint has several."""
    parts = [
        Part(name, layout, prefix, weights)
        for name, layout, probe, prefixes in _PROBES
        for prefix in prefixes
        if prefix + probe in weights
    ]
    # A half of TAESD is a bare list of convolutions; the decoder's first module, a clamp, has no weights.
    if "1.weight" in weights and "0.weight" not in weights and len(weights.shape("1.weight")) == 4:
        parts.append(Part("tiny_decoder", "raw", "", weights))
    if "0.weight" in weights and weights.shape("0.weight")[1:] == (3, 3, 3):
        parts.append(Part("tiny_encoder", "raw", "", weights))
    return [_named(part) if part.name == "clip" else part for part in parts]


def _named(part: Part) -> Part:
    """Tell CLIP-L, H and G apart by depth, as ComfyUI does."""
    pattern = r"transformer\.resblocks\.(\d+)\." if part.layout == "open_clip" else r"encoder\.layers\.(\d+)\."
    depth = count_numbers(part.keys(), pattern)
    name = "g" if depth > 30 else "h" if depth > 22 else "l"
    return replace(part, name=name)


def describe(weights: WeightFiles) -> str:
    """Describe what a file holds, for an error message: ``a VAE and a CLIP-L text encoder``."""
    titles = {
        "kl": "a VAE", "tiny": "a TAESD VAE", "tiny_encoder": "a TAESD encoder", "tiny_decoder": "a TAESD decoder",
        "l": "a CLIP-L text encoder", "h": "a CLIP-H text encoder", "g": "a CLIP-G text encoder",
        "t5xxl": "a T5 text encoder",
    }  # fmt: skip
    if parts := find_parts(weights):
        return " and ".join(titles[part.name] for part in parts)
    if any("lora_" in key or ".lora" in key for key in weights.entries):
        return "a LoRA"
    if weights.below("model.diffusion_model."):
        return "a diffusion model without text encoder or VAE"
    heads = Counter(key.split(".")[0] for key in weights.entries).most_common(5)
    return f"{len(weights.entries)} tensors of an unknown layout ({', '.join(name for name, _ in heads)})"
