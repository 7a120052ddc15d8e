"""What a model file says about itself without its weights: the safetensors header, and state dicts made from it.

ComfyUI detects a family by names, shapes and dtypes alone, so a shell is built from tensors on torch's ``meta``
device. Only tensors whose values matter outside of the computation are read: scalars, tokenizers kept as tensors,
latent statistics. torch is imported only when a state dict is made.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import ModelLoadError, ModelNotFound

if TYPE_CHECKING:
    import torch

_MOST_HEADER_BYTES = 100_000_000
_FEW = 16
"""A tensor with at most so many elements is read: constructors look into such (SVD's mix factor, TAESD's scale)."""
_KEPT = ("spiece_model", "tekken_model", "per_channel_statistics", "vae_scale", "vae_shift")
"""Parts of names whose tensors are read whatever their size: tokenizers, and statistics that nodes compute with."""

_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "U16": ("uint16", 2), "U32": ("uint32", 4), "U64": ("uint64", 8), "BOOL": ("bool", 1),
}  # fmt: skip
"""The format's names to torch's, and bytes per element."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: what it is, and where its bytes lie (from the start of the file)."""

    dtype: str
    """torch's name without the prefix."""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A safetensors file without its weights."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path | str) -> Header:
    """Read and check a file's header; no weight is touched.

    Raises:
        ModelNotFound: it is not there.
        ModelLoadError: empty, truncated, or another format.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = file.read(8)
            count = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
            if not 2 <= count <= min(_MOST_HEADER_BYTES, size - 8):
                raise ModelLoadError(f"{path} is no safetensors file, or it is truncated ({size} bytes)")
            entries = json.loads(file.read(count))
    except OSError as error:
        raise ModelNotFound(f"model file {str(path)!r}: {error.strerror or error}", "Check the path") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} has a header that cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise ModelLoadError(f"{path} has a header that is no table")
    metadata = entries.pop("__metadata__", None) or {}
    start = 8 + count
    return Header(path, {name: _info(path, name, entry, start, size) for name, entry in entries.items()}, metadata)


def _info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    """One entry of the table, checked against the file's size."""
    try:
        dtype, item = _DTYPES[entry["dtype"]]
        shape = tuple(int(length) for length in entry["shape"])
        first, last = (start + int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{path}: tensor {name!r} is described by {entry!r}") from error
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * item or not start <= first <= last <= size:
        raise ModelLoadError(f"{path}: tensor {name!r} of shape {list(shape)} does not fit the file: it is truncated")
    return TensorInfo(dtype, shape, first, last)


def is_kept(name: str, count: int) -> bool:
    """Whether a tensor's values belong into a shell."""
    return count <= _FEW or any(part in name for part in _KEPT)


def read_tensor(header: Header, name: str) -> torch.Tensor:
    """One tensor, read from the file; the caller's own."""
    import torch

    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(info.start)
        data = bytearray(file.read(info.end - info.start))
    dtype: torch.dtype = getattr(torch, info.dtype)
    if not data:
        return torch.empty(info.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(info.shape)


def weightless(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's state dict of meta tensors, the kept ones real on the CPU; and its metadata.

    Raises:
        ModelNotFound: the file is not there.
        ModelLoadError: it is broken, or of a format whose shapes cannot be told without ComfyUI.
    """
    import torch

    header = read_header(path)
    found: dict[str, torch.Tensor] = {}
    for name, info in header.tensors.items():
        if is_kept(name, info.count):
            found[name] = read_tensor(header, name)
        else:
            found[name] = torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
    return found, header.metadata


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
