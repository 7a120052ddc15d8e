"""Conversion of tensors to bytes and back, without a copy where possible. torch is imported only when needed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..core import BadRequest, LimitExceeded
from .messages import TensorRef

if TYPE_CHECKING:
    import torch

ITEM_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes per element of every dtype that may travel."""
_MOST_ELEMENTS = 1 << 40
"""Limit for empty tensors: a shape like [0, 2**63] has 0 bytes, but strides that overflow."""


def check_ref(ref: TensorRef, max_bytes: int) -> None:
    """Refuse a descriptor that contradicts itself or is too large, before memory is allocated.

    Raises:
        BadRequest: unknown dtype, bad shape or order, or a byte count that does not match the shape.
        LimitExceeded: the tensor is larger than ``max_bytes``.
    """
    if ref.dtype not in ITEM_SIZES:
        raise BadRequest(f"tensor dtype {ref.dtype!r} is unknown", f"Use one of {', '.join(ITEM_SIZES)}")
    if len(ref.shape) > 16 or any(size < 0 for size in ref.shape):
        raise BadRequest(f"tensor shape {list(ref.shape)} is not a shape")
    expected = math.prod(ref.shape) * ITEM_SIZES[ref.dtype]
    if expected > max_bytes:
        raise LimitExceeded(f"tensor of {expected} bytes; the limit is {max_bytes}", "Raise max_tensor_mb")
    if not expected and math.prod(size or 1 for size in ref.shape) > _MOST_ELEMENTS:
        raise BadRequest(f"tensor shape {list(ref.shape)} is empty, but its dimensions are too large")
    if ref.order and sorted(ref.order) != list(range(len(ref.shape))):
        raise BadRequest(f"tensor order {list(ref.order)} is not an order of {len(ref.shape)} dimensions")
    if ref.nbytes != expected or ref.offset < 0:
        raise BadRequest(f"tensor of shape {list(ref.shape)} {ref.dtype} has {expected} bytes, not {ref.nbytes}")


def describe(tensor: torch.Tensor) -> TensorRef:
    """The descriptor of a tensor, without a place (offset 0, slot 0).

    Raises:
        BadRequest: the dtype cannot be sent.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_SIZES:
        raise BadRequest(f"tensor dtype {dtype!r} cannot be sent", f"Convert to one of {', '.join(ITEM_SIZES)}")
    return TensorRef(dtype, tuple(tensor.shape), tensor.numel() * ITEM_SIZES[dtype], 0, order=_order(tensor))


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest in memory; empty for C order."""
    if tensor.is_contiguous():
        return ()
    # An expanded dimension (stride 0) has no place in memory: as the slowest, it becomes whole copies.
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -(strides[dim] or 1 << 62)))
    return () if order == tuple(range(tensor.dim())) else order


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in memory order: a view of a dense CPU tensor, a copy of any other tensor."""
    import torch

    order = _order(tensor)
    flat = (tensor.permute(order) if order else tensor).detach().to("cpu").contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def tensor_from(ref: TensorRef, data: memoryview) -> torch.Tensor:
    """A tensor over ``data``, which holds exactly ``ref.nbytes`` bytes; not copied, and writable if ``data`` is."""
    import torch

    dtype: torch.dtype = getattr(torch, ref.dtype)
    if ref.nbytes == 0:
        return torch.empty(ref.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
    if not ref.order:
        return flat.reshape(ref.shape)
    stored = flat.reshape([ref.shape[dim] for dim in ref.order])
    return stored.permute([ref.order.index(dim) for dim in range(len(ref.order))])
