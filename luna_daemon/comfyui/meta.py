"""State dicts of model files without their weights, made from the safetensors header.

ComfyUI detects a family by names, shapes and dtypes alone, so a shell is built from tensors on torch's ``meta``
device. Only tensors whose values matter outside of the computation are read: scalars, tokenizers kept as tensors,
latent statistics.
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
"""A tensor with at most so many elements is read: constructors look into such (SVD's mix factor, TAESD's scale)."""
_KEPT = ("spiece_model", "tekken_model", "per_channel_statistics", "vae_scale", "vae_shift")
"""Parts of names whose tensors are read whatever their size: tokenizers, and statistics that nodes compute with."""


def is_kept(name: str, count: int) -> bool:
    """Whether a tensor of ``count`` elements is read into a shell with its values."""
    return count <= _FEW or any(part in name for part in _KEPT)


def read_tensor(path: Path | str, ref: TensorRef) -> torch.Tensor:
    """Read one tensor of a file into memory of its own, on the CPU.

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
    """Make a file's state dict of meta tensors, the kept ones real on the CPU; and read its metadata.

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
"""What ComfyUI's loader adds to the two files of a TAESD, by their name: scale and shift of the latents."""


def joined(parts: list[dict[str, torch.Tensor]], paths: list[Path]) -> dict[str, torch.Tensor]:
    """One state dict of a VAE's files: two are the halves of a TAESD and get the names that ComfyUI gives them."""
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
