"""Tensors to bytes and back, without a copy where that is possible. torch is imported only when a tensor is made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core import BadRequest, LimitExceeded
from .messages import TensorRef

if TYPE_CHECKING:
    import torch

__all__ = ["ITEM_SIZES", "check_ref", "describe", "tensor_bytes", "tensor_from"]

ITEM_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes per element of every dtype that may travel."""


def check_ref(ref: TensorRef, max_bytes: int) -> None:
    """Refuse a descriptor that contradicts itself, before a byte is read or memory allocated.

    Raises:
        BadRequest: unknown dtype, negative size, or a byte count that is not the shape's.
        LimitExceeded: larger than ``max_bytes``.
    """
    if ref.dtype not in ITEM_SIZES:
        raise BadRequest(f"tensor dtype {ref.dtype!r} is unknown", f"Use one of {', '.join(ITEM_SIZES)}")
    if len(ref.shape) > 16 or any(size < 0 for size in ref.shape):
        raise BadRequest(f"tensor shape {list(ref.shape)} is not a shape")
    expected = math.prod(ref.shape) * ITEM_SIZES[ref.dtype]
    if expected > max_bytes:
        raise LimitExceeded(f"tensor of {expected} bytes; the limit is {max_bytes}", "Raise max_tensor_mb")
    if ref.nbytes != expected or ref.offset < 0:
        raise BadRequest(f"tensor of shape {list(ref.shape)} {ref.dtype} has {expected} bytes, not {ref.nbytes}")


def describe(tensor: torch.Tensor) -> TensorRef:
    """The descriptor of a tensor, not yet placed anywhere.

    Raises:
        BadRequest: a dtype that cannot travel.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_SIZES:
        raise BadRequest(f"tensor dtype {dtype!r} cannot be sent", f"Convert to one of {', '.join(ITEM_SIZES)}")
    return TensorRef(dtype, tuple(tensor.shape), tensor.numel() * ITEM_SIZES[dtype], 0)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor: a view where it is contiguous on the CPU, else of a copy."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())


def tensor_from(ref: TensorRef, data: memoryview) -> torch.Tensor:
    """A tensor over ``data``, which holds exactly ``ref.nbytes`` bytes; writable if ``data`` is, and not copied."""
    import torch

    dtype: torch.dtype = getattr(torch, ref.dtype)
    if ref.nbytes == 0:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(ref.shape)
