"""Make model files of the real size with seeded random weights, for demos and benchmarks without a download.

Random weights make noise instead of pictures, but cost the same time and memory as trained ones. The layouts are
those of ComfyUI's single files.

    python demo/make_text_encoder.py FOLDER [--clip-g] [--vae] [--seed N]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

__all__ = ["make_clip_g", "make_clip_l", "make_sdxl_vae", "make_tiny_clip", "to_ldm"]

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}

_TO_LDM = (
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
)


def make_clip_l(path: Path, seed: int = 0) -> Path:
    """Write a CLIP-L text encoder (float16, 246 MB) unless ``path`` exists."""
    return path if path.exists() else _save_clip(path, seed, _CLIP_L, "quick_gelu", projected=False)


def make_clip_g(path: Path, seed: int = 0) -> Path:
    """Write a CLIP-G text encoder (float16, 1.4 GB) unless ``path`` exists."""
    return path if path.exists() else _save_clip(path, seed, _CLIP_G, "gelu", projected=True)


def make_tiny_clip(path: Path, seed: int = 3) -> Path:
    """Write a text encoder of CLIP-L's layout with two narrow layers: real enough to be loaded and run in no time."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"embeddings.token_embedding.weight": (49408, 64), "embeddings.position_embedding.weight": (77, 64)}
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (64, 64) for name in ("q", "k", "v", "out")}
        shapes |= {f"{layer}.self_attn.{name}_proj.bias": (64,) for name in ("q", "k", "v", "out")}
        shapes |= {f"{layer}.mlp.fc1.weight": (128, 64), f"{layer}.mlp.fc1.bias": (128,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (64, 128), f"{layer}.mlp.fc2.bias": (64,)}
        shapes |= {f"{layer}.layer_norm{n}.{name}": (64,) for n in (1, 2) for name in ("weight", "bias")}
    shapes |= {f"final_layer_norm.{name}": (64,) for name in ("weight", "bias")}
    weights = {f"text_model.{key}": torch.randn(shape, generator=chance) / 8 for key, shape in shapes.items()}
    return _save(path, weights)


def make_sdxl_vae(path: Path, seed: int = 0) -> Path:
    """Write a VAE of SDXL's size in the LDM layout (float16, 167 MB) unless ``path`` exists."""
    if path.exists():
        return path
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(seed)
    model: nn.Module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    return _save(path, to_ldm(model.state_dict()))


def to_ldm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a diffusers ``AutoencoderKL`` of four levels to the layout of ComfyUI's VAE files."""
    return {_ldm_key(key): _as_convolution(key, weight) for key, weight in weights.items()}


def _save_clip(path: Path, seed: int, size: dict[str, int], activation: str, projected: bool) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        **size,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "projection_dim": size["hidden_size"],
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    config = CLIPTextConfig(**options)
    model: nn.Module = CLIPTextModelWithProjection(config)
    weights = {key: weight for key, weight in model.state_dict().items() if "position_ids" not in key}
    if not projected:
        del weights["text_projection.weight"]
    return _save(path, weights)


def _ldm_key(key: str) -> str:
    """LDM's key for a diffusers key; LDM numbers the decoder's levels in the opposite order."""
    key = re.sub(r"\.up_blocks\.(\d)", lambda m: f".up_blocks.{3 - int(m.group(1))}", key)
    for pattern, new in _TO_LDM:
        key = re.sub(pattern, new, key)
    return key


def _as_convolution(key: str, weight: torch.Tensor) -> torch.Tensor:
    """LDM's attention has 1x1 convolutions where diffusers has linear layers."""
    return weight[:, :, None, None] if ".attentions." in key and weight.ndim == 2 else weight


def _save(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may make the same file: each writes its own, the rename is atomic.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file({key: weight.half().contiguous() for key, weight in weights.items()}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def main(arguments: list[str] | None = None) -> int:
    """Make the files that the command line asks for and print their paths."""
    parser = argparse.ArgumentParser(description="Make model files with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clip-g", action="store_true", help="also CLIP-G, 1.4 GB")
    parser.add_argument("--vae", action="store_true", help="also a VAE of SDXL's size, 167 MB")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    made = [make_clip_l(chosen.folder / "clip_l.safetensors", chosen.seed)]
    if chosen.clip_g:
        made.append(make_clip_g(chosen.folder / "clip_g.safetensors", chosen.seed))
    if chosen.vae:
        made.append(make_sdxl_vae(chosen.folder / "sdxl_vae.safetensors", chosen.seed))
    sys.stdout.write("".join(f"{path}\n" for path in made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
