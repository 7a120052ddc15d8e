"""Renames a file's keys to those of diffusers and transformers, and derives the modules' configurations from shapes.

Tensors stay views of the mapped file, so that processes which load one file share its pages. Of the libraries' own
converters only ``convert_ldm_vae_checkpoint`` can be used: ``convert_open_clip_checkpoint`` copies the attention's
weights, ``from_single_file`` asks the hub for a configuration, ``from_pretrained`` fills missing weights at random
instead of refusing the file, and diffusers' renaming of old attention blocks is private to its models.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from ...core import ModelLoadError
from .layouts import Part, count_numbers

Tensors = dict[str, torch.Tensor]
"""A part's tensors by the keys of diffusers or transformers."""


def part_tensors(part: Part) -> Tensors:
    """Load a part's tensors under the library's keys, as views of the mapped file.

    Raises:
        ModelLoadError: the file changed since its header was read.
    """
    raw = part.weights.load(part.weights.below(part.prefix))
    return _CONVERTERS[part.layout]({key[len(part.prefix) :]: tensor for key, tensor in raw.items()})


def _shape(part: Part, tensors: Tensors, key: str) -> torch.Size:
    if key not in tensors:
        raise ModelLoadError(f"{part.weights.source} lacks {key}")
    return tensors[key].shape


# --- VAE ---------------------------------------------------------------------------------------------------------


def kl_config(part: Part, tensors: Tensors) -> dict[str, Any]:
    """Make the arguments of diffusers' ``AutoencoderKL``.

    Raises:
        ModelLoadError: the VAE is of another family, or only half a VAE.
    """
    conv = _shape(part, tensors, "decoder.conv_in.weight")
    if len(conv) != 4 or conv[1] > 16 or any(key.endswith(".mix_factor") for key in tensors):
        raise ModelLoadError(
            f"{part.weights.source} is a VAE of another family (input convolution {list(conv)})",
            "This backend knows the VAEs of SD1.5, SDXL, SD3 and Flux, and TAESD",
        )
    levels = count_numbers(tensors, r"encoder\.down_blocks\.(\d+)\.resnets\.")
    if not levels:
        raise ModelLoadError(f"{part.weights.source} is a VAE without its encoder")
    first_layer = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": [_shape(part, tensors, first_layer.format(level))[0] for level in range(levels)],
        "layers_per_block": count_numbers(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": conv[1],
        "norm_num_groups": part.weights.config.get("norm_num_groups", 32),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.group_norm.weight" in tensors,
    }


def _from_ldm(tensors: Tensors) -> Tensors:
    convert: Any = importlib.import_module("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
    blocks = range(count_numbers(tensors, r"decoder\.up\.(\d+)\."))
    renamed: Tensors = convert(tensors, {"down_block_types": blocks, "up_block_types": blocks})
    return renamed


_OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


def _from_diffusers(tensors: Tensors) -> Tensors:
    """Rename the attention's layers of older files, in which they are 1x1 convolutions."""
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        if ".attentions." in key:
            for old, new in _OLD_ATTENTION:
                key = key.replace(f".{old}.", f".{new}.")
            if tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]
        renamed[key] = tensor
    return renamed


def _from_comfy_tiny(tensors: Tensors) -> Tensors:
    """Rename both halves of a TAESD; ``vae_scale`` and ``vae_shift`` keep their names."""
    renamed: Tensors = {key: tensor for key, tensor in tensors.items() if key in ("vae_scale", "vae_shift")}
    for prefix in ("taesd_encoder.", "taesd_decoder."):
        half = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        renamed.update(_from_raw_tiny(half))
    return renamed


def _from_raw_tiny(tensors: Tensors) -> Tensors:
    """Rename one half; the decoder's modules are one number lower in diffusers, which has no module for the clamp."""
    half, shift = ("encoder", 0) if "0.weight" in tensors else ("decoder", 1)
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        if number.isdigit():
            renamed[f"{half}.layers.{int(number) - shift}.{rest}"] = tensor
    return renamed


# --- text encoders -----------------------------------------------------------------------------------------------


def clip_config(part: Part, tensors: Tensors) -> dict[str, Any]:
    """Make the arguments of transformers' ``CLIPTextConfig``, from shapes and the folder's ``config.json``.

    Raises:
        ModelLoadError: weights are missing.
    """
    vocabulary, width = _shape(part, tensors, "embeddings.token_embedding.weight")
    config = part.weights.config
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(part, tensors, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count_numbers(tensors, r"encoder\.layers\.(\d+)\."),
        # Every CLIP text encoder in use has heads of 64.
        "num_attention_heads": config.get("num_attention_heads", max(1, width // 64)),
        "max_position_embeddings": _shape(part, tensors, "embeddings.position_embedding.weight")[0],
        "hidden_act": config.get("hidden_act", "quick_gelu" if part.name == "l" else "gelu"),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-5),
        "projection_dim": width,
    }


def t5_config(part: Part, tensors: Tensors) -> dict[str, Any]:
    """Make the arguments of transformers' ``T5Config`` (version 1.1, gated).

    Raises:
        ModelLoadError: weights are missing, or the encoder is a umT5, whose every layer has a position bias.
    """
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
        raise ModelLoadError(f"{part.weights.source} is a umT5 text encoder, which SD3 and Flux do not use")
    attention = "encoder.block.0.layer.0.SelfAttention."
    vocabulary, width = _shape(part, tensors, "shared.weight")
    buckets, heads = _shape(part, tensors, attention + "relative_attention_bias.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _shape(part, tensors, attention + "q.weight")[0] // heads,
        "d_ff": _shape(part, tensors, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": count_numbers(tensors, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def text_projection(part: Part) -> torch.Tensor:
    """Load CLIP's projection of the pooled vector, ``[P,D]``; open_clip's is transposed and lacks ``.weight``.

    Raises:
        ModelLoadError: the file has no projection.
    """
    key = part.prefix.removesuffix("text_model.") + "text_projection"
    for name in (key + ".weight", key):
        if name in part.weights:
            tensor = part.weights.load([name])[name]
            return tensor if name != key else tensor.t()
    raise ModelLoadError(f"{part.weights.source} lacks {key}.weight")


def _from_hf(tensors: Tensors) -> Tensors:
    """Enter T5's embedding under both of its names, of which a file may have one."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    shared = next((tensors[name] for name in names if name in tensors), None)
    return tensors if shared is None else tensors | dict.fromkeys(names, shared)


_OPEN_CLIP_TO_HF = (
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


def _from_open_clip(tensors: Tensors) -> Tensors:
    """Rename open_clip's keys, and split its one matrix for query, key and value."""
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        for pattern, new in _OPEN_CLIP_TO_HF:
            key = re.sub(pattern, new, key)
        head, fused, kind = key.partition(".attn.in_proj_")
        if fused:
            for name, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{head}.self_attn.{name}_proj.{kind}"] = third
        else:
            renamed[key] = tensor
    return renamed


_CONVERTERS: dict[str, Callable[[Tensors], Tensors]] = {
    "ldm": _from_ldm,
    "diffusers": _from_diffusers,
    "comfy": _from_comfy_tiny,
    "raw": _from_raw_tiny,
    "hf": _from_hf,
    "open_clip": _from_open_clip,
}
