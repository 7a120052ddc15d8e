"""Diffusion models for the router, from checkpoints, separate files or GGUF; always loaded into this ComfyUI."""

from __future__ import annotations

from typing import Any

from luna_daemon.core import BadRequest, ModelLoadError
from luna_daemon.inference_wrapper import wrap_model_for_inference

from .. import host

SOURCES = ("checkpoints", "diffusion_models", "unet")
PRECISIONS = ("None", "bf16", "fp16", "fp8_e4m3fn", "nf4", "int8", "gguf_Q8_0", "gguf_Q4_K_M")
"""Every value that a saved workflow may hold; values that need a converted file are refused when the node runs."""
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp8_e4m3fn": "float8_e4m3fn"}
_GGUF_FOLDER, _GGUF_LOADER = "unet_gguf", "UnetLoaderGGUF"


def model_names() -> list[str]:
    """List the files of all sources, each name once."""
    return list(dict.fromkeys(name for folder in (*SOURCES, _GGUF_FOLDER) for name in host.names(folder)))


def model_folder(source: str, name: str) -> str:
    """Find the folder that holds the model: the source if possible, else another."""
    return next((folder for folder in (source, *SOURCES, _GGUF_FOLDER) if name in host.names(folder)), source)


def load_diffusion(source: str, name: str, precision: str = "None") -> Any:
    """Load a MODEL whose forward passes keep no autograd graph.

    Args:
        source: one of ``SOURCES``.
        name: one of ``model_names()``.
        precision: one of ``PRECISIONS``.

    Raises:
        FileNotFoundError: there is no such file.
        BadRequest: the precision needs a converted file, or a GGUF file needs ComfyUI-GGUF.
        ModelLoadError: the checkpoint holds no diffusion model.
    """
    folder = model_folder(source, name)
    path = host.path(folder, name)
    if name.lower().endswith(".gguf"):
        return wrap_model_for_inference(_load_gguf(name, precision))
    options, sd = _options(precision), host.module("comfy.sd")
    if folder == "checkpoints":
        model = sd.load_checkpoint_guess_config(
            path, output_vae=False, output_clip=False, embedding_directory=host.embeddings(), model_options=options
        )[0]
    else:
        model = sd.load_diffusion_model(path, model_options=options)
    if model is None:
        raise ModelLoadError(f"{path} holds no diffusion model that this ComfyUI knows")
    return wrap_model_for_inference(model)


def _options(precision: str) -> dict[str, Any]:
    if precision == "None":
        return {}
    if precision not in _DTYPES:
        raise BadRequest(
            f"dynamic_precision={precision!r} needs a converted file, and this pack does not convert files",
            f"Choose None, {', '.join(_DTYPES)}, or a GGUF file as model_name",
        )
    return {"dtype": getattr(host.module("torch"), _DTYPES[precision])}


def _load_gguf(name: str, precision: str) -> Any:
    if precision != "None" and not precision.startswith("gguf_"):
        raise BadRequest(
            f"dynamic_precision={precision!r} does not apply to the GGUF file {name}",
            "Choose None",
        )
    loader = host.node_class(_GGUF_LOADER)
    if loader is None:
        raise BadRequest(f"{name} is GGUF, and the node pack ComfyUI-GGUF is missing", "Install ComfyUI-GGUF")
    return loader().load_unet(name)[0]
