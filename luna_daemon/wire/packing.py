"""Conversion of nested data with tensors to plain data and a list of tensors. Other objects are refused: no code runs.

Dicts with text keys, lists, tuples, numbers, text, bytes, booleans and ``None``; a tensor becomes
``{"$tensor": index}`` and a tuple ``{"$tuple": [...]}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core import BadRequest

if TYPE_CHECKING:
    import torch

_TENSOR, _TUPLE = "$tensor", "$tuple"
_PLAIN = (int, float, str, bytes, bool, type(None))


def pack(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Plain data for ``value``; the tensors in it are appended to ``tensors``.

    Raises:
        BadRequest: an object that is neither plain data nor a tensor; the error names its type.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise BadRequest("a dict with keys that are not text cannot be sent")
        return {key: pack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [pack(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [pack(item, tensors) for item in value]}
    if hasattr(value, "untyped_storage"):
        tensors.append(value)
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, (int, float)):  # numpy's numbers and enums
        return float(value) if isinstance(value, float) else int(value)
    raise BadRequest(f"a {type(value).__name__} cannot be sent", "Only plain data and tensors travel")


def unpack(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Restore the value that ``pack`` converted.

    Raises:
        BadRequest: ``value`` refers to a tensor that is not in ``tensors``.
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        index = value[_TENSOR]
        if not isinstance(index, int) or not 0 <= index < len(tensors):
            raise BadRequest(f"packed data refers to tensor {index!r}, but there are {len(tensors)} tensors")
        return tensors[index]
    if value.keys() == {_TUPLE}:
        return tuple(unpack(item, tensors) for item in value[_TUPLE])
    return {key: unpack(item, tensors) for key, item in value.items()}
