"""State dicts of model files without weights, made from the safetensors header.

ComfyUI detects a model's family by names, shapes and dtypes alone, so a shell is built from tensors on torch's ``meta``
device. Only tensors are read whose values this process needs: scalars, tokenizers stored as tensors, latent statistics.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import ModelLoadError
from ..files.safetensors import open_header
from ..wire.messages import TensorRef

if TYPE_CHECKING:
    import torch

_FEW = 16
"""Most elements of a tensor that is read for its size: constructors use SVD's mix factor and TAESD's scale."""
_KEPT = ("spiece_model", "tekken_model", "per_channel_statistics", "vae_scale", "vae_shift")
"""Parts of the names of tensors that are read at any size: tokenizers, and statistics that nodes compute with."""


def is_kept(name: str, count: int) -> bool:
    """Whether the values of a tensor of ``count`` elements are read into a shell."""
    return count <= _FEW or any(part in name for part in _KEPT)


def read_tensor(path: Path | str, ref: TensorRef) -> torch.Tensor:
    """Read one tensor of a safetensors file into new memory, on the CPU.

    Raises:
        ModelLoadError: torch has no such dtype.
    """
    import torch

    dtype = _dtype(path, ref)
    with Path(path).open("rb") as file:
        file.seek(ref.offset)
        data = bytearray(file.read(ref.nbytes))
    if not data:
        return torch.empty(ref.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(ref.shape)


def _dtype(path: Path | str, ref: TensorRef) -> torch.dtype:
    import torch

    dtype = getattr(torch, ref.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelLoadError(f"{path} has tensors of dtype {ref.dtype}, which torch {torch.__version__} does not have")
    return dtype


def weightless(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a file's state dict and metadata; tensors are on ``meta``, those of ``is_kept`` on the CPU with values.

    Raises:
        ModelNotFound: the file is not there.
        ModelLoadError: the file is not a valid safetensors file, or has a dtype that torch does not have.
    """
    import torch

    header = open_header(path)
    state: dict[str, torch.Tensor] = {}
    for name, ref in header.tensors.items():
        if is_kept(name, math.prod(ref.shape)):
            state[name] = read_tensor(path, ref)
        else:
            state[name] = torch.empty(ref.shape, dtype=_dtype(path, ref), device="meta")
    return state, header.metadata


_LATENT_SCALES = {
    "taesd": (0.18215, 0.0), "taesdxl": (0.13025, 0.0), "taesd3": (1.5305, 0.0609), "taef1": (0.3611, 0.1159),
}  # fmt: skip
"""Latent scale and shift that ComfyUI's loader adds to the two files of a TAESD, by the start of the file name."""


def joined(parts: list[dict[str, torch.Tensor]], paths: list[Path]) -> dict[str, torch.Tensor]:
    """Join the state dicts of a VAE's files; two files are a TAESD's halves and get ComfyUI's prefixes."""
    import torch

    if len(parts) == 1:
        return parts[0]
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        # The decoder's list of layers begins with a clamp, so its first weight has number 1.
        half = "taesd_decoder." if "1.weight" in part and "0.weight" not in part else "taesd_encoder."
        whole.update({half + name: value for name, value in part.items()})
    scales = _LATENT_SCALES.get(paths[0].name.partition("_")[0])
    if scales is not None:
        with torch.device("cpu"):
            whole["vae_scale"], whole["vae_shift"] = torch.tensor(scales[0]), torch.tensor(scales[1])
    return whole
