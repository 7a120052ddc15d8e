"""Assigns weights to modules, chooses a model's device and dtype, and recognises out-of-memory errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...core import ConfigError, ModelLoadError, OutOfMemory
from .conversions import Tensors
from .layouts import Part

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def assign_weights(part: Part, model: nn.Module, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> None:
    """Give a module made on the meta device its weights; weights not converted stay views of the mapped file.

    Args:
        part: origin of the weights, for error messages.
        tensors: the weights by the module's keys; further tensors are ignored.

    Raises:
        ModelLoadError: weights are missing or have other shapes.
    """
    wanted = model.state_dict()
    source = part.weights.source
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise ModelLoadError(f"{source} lacks {len(missing)} of {len(wanted)} weights, such as {missing[0]}")
    for key, weight in wanted.items():
        if weight.shape != tensors[key].shape:
            raise ModelLoadError(f"{source}: {key} has shape {list(tensors[key].shape)}, not {list(weight.shape)}")
    model.requires_grad_(False).eval()
    # A weight under two names stays one tensor.
    moved = {id(tensors[key]): tensors[key].to(device, dtype) for key in wanted}
    model.load_state_dict({key: moved[id(tensors[key])] for key in wanted}, assign=True)
    model.to(device)


def usable_devices() -> list[str]:
    """List every GPU, then the CPU."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]


def pick_device(asked: str) -> torch.device:
    """Resolve a device setting; ``auto`` is the first GPU, or the CPU without a GPU.

    Raises:
        ConfigError: the device does not exist.
    """
    usable = usable_devices()
    name = {"auto": usable[0], "cuda": "cuda:0"}.get(asked, asked)
    if name not in usable:
        raise ConfigError(f"device is {asked!r}, must be auto or one of {', '.join(usable)}")
    return torch.device(name)


def pick_dtype(asked: str, automatic: torch.dtype) -> torch.dtype:
    """Resolve a precision setting; ``auto`` means ``automatic``.

    Raises:
        ConfigError: the setting is not a precision.
    """
    if asked == "auto":
        return automatic
    if asked not in _DTYPES:
        raise ConfigError(f"precision is {asked!r}, must be auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[asked]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the device or the CPU's allocator had no room."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors into typed ones.

    Args:
        doing: description of the work in the ``with`` block, for the message.

    Raises:
        OutOfMemory: the work found no room.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"no memory for {doing}", "Free memory, or use another device") from error
