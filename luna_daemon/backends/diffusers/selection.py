"""Loads the model of a ``LoadSpec``: finds the parts in its files, checks that no part is missing, and builds it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ...core import ConfigError, ModelLoadError
from ...wire.messages import LoadSpec
from .autoencoders import Autoencoder, load_kl, load_tiny
from .conditioning import FAMILIES, TextEncoders
from .layouts import Part, describe, find_parts
from .loading import pick_device, pick_dtype
from .segmenters import find_segmenter
from .textencoders import load_text_encoder
from .weightfiles import component_folders, open_weights

_VAE_PARTS = {"kl", "tiny", "tiny_encoder", "tiny_decoder"}
_ALIASES = {"sd1": "sd15", "sd1.5": "sd15", "stable_diffusion": "sd15", "sd35": "sd3", "sd3.5": "sd3"}
# TAESD's published names, longest first. ComfyUI, too, uses the name where a file has no scale.
_TINY_NAMES = {"taesdxl": "sdxl", "taesd3": "sd3", "taef1": "flux", "taesd": "sd15"}


def load_vae(spec: LoadSpec) -> Autoencoder:
    """Load a VAE from a file or folder, or a TAESD from one file or two.

    Raises:
        ConfigError: the device or precision does not exist.
        ModelLoadError: the files hold no VAE, half a VAE, or a VAE of an unknown family.
    """
    parts = _parts(spec, "vae", "a VAE", _VAE_PARTS)
    device = pick_device(spec.device)
    bfloat = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    dtype = pick_dtype(spec.precision, torch.bfloat16 if bfloat else torch.float32)
    by_name = {part.name: part for part in parts}
    if "kl" in by_name:
        return load_kl(by_name["kl"], dtype, device)
    halves = [by_name["tiny"]] if "tiny" in by_name else [by_name[n] for n in sorted(by_name)]
    if len(halves) == 1 and "tiny" not in by_name:
        raise ModelLoadError(
            f"{spec.files[0]} is {describe(halves[0].weights)} only", "Give the encoder's and the decoder's file"
        )
    return load_tiny(halves, _tiny_family(spec), dtype, device)


def _tiny_family(spec: LoadSpec) -> str:
    if spec.type:
        return _ALIASES.get(spec.type, spec.type)
    for path in map(Path, spec.files):
        for name, family in _TINY_NAMES.items():
            if name in f"{path.parent.name}/{path.name}".lower():
                return family
    return ""


def load_text(spec: LoadSpec) -> TextEncoders:
    """Load a family's text encoders from files, a checkpoint or folders.

    Raises:
        ConfigError: the device, precision or family does not exist.
        ModelLoadError: an encoder is missing, unknown or there twice, or its tokenizer is missing.
    """
    family = _ALIASES.get(spec.type, spec.type)
    if family not in FAMILIES:
        raise ConfigError(f"type is {spec.type!r}, must be one of {', '.join(FAMILIES)}")
    parts: dict[str, Part] = {}
    for part in _parts(spec, "text_encoder", "a text encoder", {"l", "g", "h", "t5xxl"}):
        if part.name in parts:
            raise ModelLoadError(f"{part.weights.source} is a second {part.name} encoder")
        parts[part.name] = part
    _check_enough(family, parts)
    device = pick_device(spec.device)
    dtype = None if spec.precision == "auto" else pick_dtype(spec.precision, torch.float16)
    segmenter = cache(find_segmenter)
    encoders = {}
    for name, use in FAMILIES[family].uses.items():
        if name in parts:
            source = parts[name].weights.source
            ids = segmenter("t5" if name == "t5xxl" else "clip", source if source.is_dir() else None)
            encoders[name] = load_text_encoder(parts[name], dtype, device, ids, use.min_length)
    return TextEncoders(family, encoders)


def _check_enough(family: str, parts: dict[str, Part]) -> None:
    known, required = FAMILIES[family].uses, FAMILIES[family].required
    extra = sorted(parts.keys() - known.keys())
    if extra:
        source = parts[extra[0]].weights.source
        raise ModelLoadError(f"{source} is {describe(parts[extra[0]].weights)}, which {family} does not use")
    if not any(names <= parts.keys() for names in required):
        needs = " and ".join(f"the {name} encoder" for name in sorted(required[0]))
        raise ModelLoadError(f"{family} needs {needs}; the files have {', '.join(sorted(parts))} only")


def _parts(spec: LoadSpec, component: str, title: str, names: set[str]) -> list[Part]:
    """Find the parts whose name is in ``names``; a file without such a part is an error."""
    parts: list[Part] = []
    for place in [place for file in spec.files for place in component_folders(Path(file), component)]:
        weights = open_weights(place)
        wanted = [part for part in find_parts(weights) if part.name in names]
        if not wanted:
            raise ModelLoadError(f"{weights.source} is {describe(weights)}, not {title}")
        parts += wanted
    return parts
