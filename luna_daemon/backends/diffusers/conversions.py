"""Files' key names renamed to the library's, and the library's configuration from the shapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ...core import ModelLoadError
from .layouts import Part

Tensors = dict[str, torch.Tensor]


def part_tensors(part: Part) -> Tensors:
    """The part's tensors, renamed to the library's keys; still views of the mapped file."""
    raw = part.weights.load(part.weights.below(part.prefix))
    tensors = {key[len(part.prefix) :]: tensor for key, tensor in raw.items()}
    return _CONVERTERS[part.layout](tensors)


# --- VAE ---------------------------------------------------------------------------------------------------------


def kl_config(part: Part) -> dict[str, Any]:
    """Arguments of diffusers' ``AutoencoderKL`` from the shapes.

    Raises:
        ModelLoadError: a VAE of another family.
    """
    conv = part.shape("decoder.conv_in.weight")
    if len(conv) != 4 or conv[1] > 16 or part.has("decoder.mid.block_1.mix_factor"):
        raise ModelLoadError(
            f"{part.weights.source} is a VAE of another family (input convolution {list(conv)})",
            "This backend knows the VAEs of SD1.5, SDXL, SD3 and Flux, and TAESD",
        )
    ldm = part.layout == "ldm"
    block = "encoder.down.{}.block.{}" if ldm else "encoder.down_blocks.{}.resnets.{}"
    pattern = r"encoder\.down\.(\d+)\.block\." if ldm else r"encoder\.down_blocks\.(\d+)\.resnets\."
    levels = part.count(pattern)
    if not levels:
        raise ModelLoadError(f"{part.weights.source} is a VAE without its encoder")
    per_level = part.count(pattern.replace(r"(\d+)", "0") + r"(\d+)\.")
    widths = [part.shape(block.format(level, 0) + ".conv1.weight")[0] for level in range(levels)]
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": per_level,
        "latent_channels": conv[1],
        "norm_num_groups": part.weights.config.get("norm_num_groups", 32),
        "use_quant_conv": part.has("quant_conv.weight"),
        "use_post_quant_conv": part.has("post_quant_conv.weight"),
        "mid_block_add_attention": part.has("decoder.mid.attn_1.q.weight" if ldm else _DIFFUSERS_ATTENTION),
    }


_DIFFUSERS_ATTENTION = "decoder.mid_block.attentions.0.group_norm.weight"

_LDM_TO_DIFFUSERS = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
)


def _from_ldm(tensors: Tensors) -> Tensors:
    """LDM counts the decoder's levels from the outside, diffusers from the inside."""
    levels = [int(m.group(1)) for key in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", key))]
    top = max(levels, default=0)
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        for pattern, new in _LDM_TO_DIFFUSERS:
            key = re.sub(pattern, new, key)
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{top - int(m.group(1))}", key)
        renamed[key] = tensor
    return _from_diffusers(renamed)


_OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


def _from_diffusers(tensors: Tensors) -> Tensors:
    """Older files name the attention's layers otherwise, and have 1x1 convolutions for them."""
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
    """Both halves in one file; ``vae_scale`` and ``vae_shift`` keep their names."""
    halves: Tensors = {k: v for k, v in tensors.items() if k in ("vae_scale", "vae_shift")}
    for half in ("encoder", "decoder"):
        prefix = f"taesd_{half}."
        bare = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        halves.update(_from_raw_tiny(bare))
    return halves


def _from_raw_tiny(tensors: Tensors) -> Tensors:
    """One half: diffusers' decoder has no module for the clamp, so its numbers are one lower."""
    half, shift = ("encoder", 0) if "0.weight" in tensors else ("decoder", 1)
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        if number.isdigit():
            renamed[f"{half}.layers.{int(number) - shift}.{rest}"] = tensor
    return renamed


# --- text encoders -----------------------------------------------------------------------------------------------


def clip_config(part: Part) -> dict[str, Any]:
    """Arguments of transformers' ``CLIPTextConfig`` from the shapes; a folder's ``config.json`` comes first."""
    if part.layout == "open_clip":
        embedding, position, depth = (
            "token_embedding.weight",
            "positional_embedding",
            r"transformer\.resblocks\.(\d+)\.",
        )
        inner = "transformer.resblocks.0.mlp.c_fc.weight"
    else:
        embedding, position = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
        depth, inner = r"encoder\.layers\.(\d+)\.", "encoder.layers.0.mlp.fc1.weight"
    vocabulary, width = part.shape(embedding)
    given = part.weights.config
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": part.shape(inner)[0],
        "num_hidden_layers": part.count(depth),
        # Every CLIP text encoder in use has heads of 64.
        "num_attention_heads": given.get("num_attention_heads", max(1, width // 64)),
        "max_position_embeddings": part.shape(position)[0],
        "hidden_act": given.get("hidden_act", "quick_gelu" if part.name == "l" else "gelu"),
        "layer_norm_eps": given.get("layer_norm_eps", 1e-5),
        "projection_dim": width,
    }


def t5_config(part: Part) -> dict[str, Any]:
    """Arguments of transformers' ``T5Config`` (version 1.1, gated) from the shapes.

    Raises:
        ModelLoadError: umT5, whose every layer has a position bias.
    """
    if part.has("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"):
        raise ModelLoadError(f"{part.weights.source} is a umT5 text encoder, which SD3 and Flux do not use")
    shared = "shared.weight" if part.has("shared.weight") else "encoder.embed_tokens.weight"
    vocabulary, width = part.shape(shared)
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = part.shape(attention + "relative_attention_bias.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": part.shape(attention + "q.weight")[0] // heads,
        "d_ff": part.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": part.count(r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def text_projection(part: Part) -> torch.Tensor:
    """CLIP's projection of the pooled vector, ``[P,D]``; open_clip keeps it transposed and without ``.weight``.

    Raises:
        ModelLoadError: the file has none.
    """
    key = part.prefix.removesuffix("text_model.") + "text_projection"
    for name in (key + ".weight", key):
        if name in part.weights:
            tensor = part.weights.load([name])[name]
            return tensor if name != key else tensor.t()
    raise ModelLoadError(f"{part.weights.source} lacks {key}.weight")


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
    """open_clip keeps query, key and value in one matrix."""
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
    "hf": dict,
    "open_clip": _from_open_clip,
}
