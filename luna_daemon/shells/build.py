"""Build shells: ComfyUI's own VAE and CLIP objects without weights, whose calls the daemon computes.

ComfyUI's own model detection builds a shell from the headers of its safetensors files, in well under a second::

    vae = make_vae(["/models/vae/sdxl_vae.safetensors"])
    clip = make_clip(["/models/clip/clip_l.safetensors", "/models/clip/clip_g.safetensors"], "sdxl")
    clip, vae = make_from_checkpoint("/models/checkpoints/dream.safetensors")

Works only inside ComfyUI; torch and ComfyUI are imported when a shell is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..client import DaemonClient
from ..comfyui.meta import is_kept, joined, weightless
from ..core import ModelKind, ModelLoadError
from ..files.identity import file_id
from ..wire.messages import ModelRef
from .backing import Backing
from .clip import shell_clip
from .host import comfy
from .vae import shell_vae

Files = Sequence[Path | str]


def make_vae(files: Files, client: DaemonClient | None = None, source: Any = None) -> Any:
    """Make a ``DaemonVAE`` from a VAE's file, or from the two files of a TAESD.

    Args:
        client: connection to the daemon; the default connection if ``None``.
        source: the local model for when the daemon is away, or a callable that loads it; by default ComfyUI loads the
            files.

    Raises:
        ModelNotFound: a file is missing.
        ModelLoadError: a file is broken, or is not a VAE that this ComfyUI knows.
    """
    paths = [Path(file) for file in files]
    weights, metadata = joined([_weightless(path)[0] for path in paths], paths), None
    vae = _build(lambda state: comfy("sd").VAE(sd=state, metadata=metadata), weights, "first_stage_model")
    if vae.first_stage_model is None:
        raise ModelLoadError(f"{_named(paths)}: not a VAE that this ComfyUI knows")
    _fill(vae.first_stage_model, weights)
    ref = ModelRef(ModelKind.VAE.value, files=tuple(file_id(path) for path in paths))
    return shell_vae(vae, _vae_backing(ref, client, source or (lambda: _load_vae(paths))))


def make_clip(
    files: Files,
    type: str = "stable_diffusion",
    client: DaemonClient | None = None,
    source: Any = None,
    embedding_directory: Any = None,
) -> Any:
    """Make a ``DaemonCLIP`` from one to four text encoder files, in the order of ComfyUI's loader nodes.

    Args:
        type: the type in ComfyUI's loader nodes: ``sdxl``, ``flux`` ...; an unknown type means ``stable_diffusion``.
        client, source: see ``make_vae``.
        embedding_directory: where the tokenizer looks for ``embedding:name``.

    Raises:
        ModelNotFound: a file is missing.
        ModelLoadError: a file is broken, or is not a text encoder that this ComfyUI knows.
    """
    paths = [Path(file) for file in files]

    def build(states: dict[str, Any]) -> Any:
        return comfy("sd").load_text_encoder_state_dicts(
            [dict(state) for state in states.values()], embedding_directory=embedding_directory,
            clip_type=_clip_type(type), model_options=_on_meta(),
        )  # fmt: skip

    clip = _build(build, {str(number): _weightless(path)[0] for number, path in enumerate(paths)}, "cond_stage_model")
    ref = ModelRef(ModelKind.CLIP.value, files=tuple(file_id(path) for path in paths), type=type)
    load = source or (lambda: load_local_clip(paths, type, embedding_directory))
    return shell_clip(clip, _clip_backing(ref, client, load))


def make_from_checkpoint(
    path: Path | str,
    client: DaemonClient | None = None,
    embedding_directory: Any = None,
    source: Callable[[], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """Make ``(clip, vae)`` from a checkpoint; ``None`` for a part that the checkpoint does not hold.

    Args:
        source: loads ``(clip, vae)`` into this process, for when the daemon is away; by default ComfyUI's loader.

    Raises:
        ModelNotFound: the file is missing.
        ModelLoadError: the file is broken, or is not a checkpoint that this ComfyUI knows.
    """
    path = Path(path)
    weights, metadata = _weightless(path)

    def build(state: dict[str, Any]) -> Any:
        return comfy("sd").load_state_dict_guess_config(
            dict(state), output_model=False, embedding_directory=embedding_directory, te_model_options=_on_meta(),
            metadata=metadata,
        )  # fmt: skip

    found = _build(build, weights, "")
    if found is None:
        raise ModelLoadError(f"{path}: not a checkpoint that this ComfyUI knows")
    _, clip, vae, *_ = found
    load = source or (lambda: load_local_checkpoint(path, embedding_directory))
    files = (file_id(path),)
    if clip is not None:
        ref = ModelRef(ModelKind.CLIP.value, files=files, checkpoint=True)
        clip = shell_clip(clip, _clip_backing(ref, client, lambda: load()[0]))
    if vae is not None and vae.first_stage_model is not None:
        ref = ModelRef(ModelKind.VAE.value, files=files, checkpoint=True)
        return clip, shell_vae(vae, _vae_backing(ref, client, lambda: load()[1]))
    return clip, None


# --- building ----------------------------------------------------------------------------------------------------


def _on_meta() -> dict[str, Any]:
    import torch

    return {"initial_device": torch.device("meta")}


def _clip_type(name: str) -> Any:
    """Return the ``CLIPType`` that ComfyUI's loader nodes choose for a name."""
    types = comfy("sd").CLIPType
    return getattr(types, name.upper(), types.STABLE_DIFFUSION)


def _weightless(path: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Read a file's state dict without weights, and its metadata; formats other than safetensors are read whole."""
    if path.suffix.lower() in (".safetensors", ".sft"):
        return weightless(path)
    file_id(path)
    try:
        state, metadata = comfy("utils").load_torch_file(str(path), safe_load=True, return_metadata=True)
        emptied = {name: value if is_kept(name, value.numel()) else value.to("meta") for name, value in state.items()}
    except Exception as error:
        # A broken file can make torch raise any exception.
        raise ModelLoadError(f"{path}: {type(error).__name__}: {error}") from error
    return emptied, metadata


def _build(make: Callable[[dict[str, Any]], Any], weights: dict[str, Any], network: str) -> Any:
    """Have ComfyUI build an object on meta tensors.

    Some constructors compute with values, which meta tensors do not have. Such a network is built on the CPU from
    tensors that take no memory, then moved to ``meta``.

    Args:
        network: name of the object's attribute that holds the network; empty if it must be built on ``meta``.

    Raises:
        ModelLoadError: the object cannot be built on ``meta``.
    """
    import torch

    try:
        with torch.device("meta"), warnings.catch_warnings():
            # torch warns of each real tensor that is copied into a meta tensor.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            return make(dict(weights))
    except (RuntimeError, NotImplementedError) as error:
        if not network:
            raise ModelLoadError(f"ComfyUI cannot build the model without weights: {error}") from error
    with torch.device("cpu"):
        made = make({name: _hollow(value) for name, value in weights.items()})
    if getattr(made, network) is not None:
        getattr(made, network).to("meta")
    return made


def _hollow(value: Any) -> Any:
    """Return a CPU tensor of the same shape whose elements all share one memory location."""
    import torch

    if isinstance(value, dict):
        return {name: _hollow(item) for name, item in value.items()}
    return torch.zeros(1, dtype=value.dtype, device="cpu").expand(value.shape) if value.is_meta else value


def _fill(network: Any, weights: dict[str, Any]) -> None:
    """Give buffers that nodes compute with (latent statistics) their real values."""
    for name, module in network.named_modules():
        for key, buffer in module._buffers.items():
            value = weights.get(f"{name}.{key}" if name else key)
            if buffer is not None and value is not None and not value.is_meta and value.shape == buffer.shape:
                module._buffers[key] = value.to(buffer.dtype)


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)


# --- the local models --------------------------------------------------------------------------------------------


def _vae_backing(ref: ModelRef, client: DaemonClient | None, source: Any) -> Backing:
    return Backing(ref, client, source, lambda vae: vae.first_stage_model, "DaemonVAE")


def _clip_backing(ref: ModelRef, client: DaemonClient | None, source: Any) -> Backing:
    return Backing(ref, client, source, lambda clip: clip.cond_stage_model, "DaemonCLIP")


def _load_vae(paths: Sequence[Path]) -> Any:
    parts = [comfy("utils").load_torch_file(str(path)) for path in paths]
    return comfy("sd").VAE(sd=joined(parts, list(paths)))


def load_local_clip(paths: Files, family: str, embedding_directory: Any) -> Any:
    """Load text encoders into this process, as ComfyUI's loader nodes do."""
    return comfy("sd").load_clip(
        [str(path) for path in paths], embedding_directory=embedding_directory, clip_type=_clip_type(family)
    )


def load_local_checkpoint(path: Path | str, embedding_directory: Any) -> tuple[Any, Any]:
    """Load ``(clip, vae)`` of a checkpoint into this process, as ComfyUI's loader node does."""
    found = comfy("sd").load_checkpoint_guess_config(
        str(path), output_model=False, embedding_directory=embedding_directory
    )
    return found[1], found[2]
