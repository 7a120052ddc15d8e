"""A call and a loaded model to a result: the only place where ops meet backends."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..backends.base import Step
from ..core import BadRequest
from ..wire import messages as m
from ..wire.codec import describe, tensor_bytes, tensor_from

if TYPE_CHECKING:
    import torch

__all__ = ["Result", "free_memory", "run"]

Input = tuple[m.TensorRef, memoryview]


@dataclass
class Result:
    """Plain data, tensors as bytes, and notes for the caller."""

    value: Any = None
    tensors: list[tuple[m.TensorRef, memoryview]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(call: m.Call, model: Any, inputs: list[Input], step: Step) -> Result:
    """Compute.

    Raises:
        BadRequest: the inputs do not fit the op, or the model is of another kind.
        RequestCancelled: from ``step``.
    """
    if isinstance(call, m.Echo):
        return _echo(call, model, step)
    if isinstance(call, m.ModelLoad):
        return Result(model.properties())
    if isinstance(call, (m.VaeEncode, m.VaeDecode)):
        return _vae(call, model, inputs, step)
    if isinstance(call, m.ClipTokenize):
        return Result({"tokens": model.tokenize(call.text)})
    if isinstance(call, m.ClipEncode):
        return _clip(call, model)
    raise BadRequest(f"workers do not serve {type(call).__name__}")


def free_memory() -> None:
    """Give unloaded weights back to the system and to the device's other users."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _echo(call: m.Echo, model: Any, step: Step) -> Result:
    data = model.echo(call.nbytes, call.seconds, step)
    return Result(None, [(m.TensorRef("float32", (call.nbytes // 4,), call.nbytes, 0), data)] if call.nbytes else [])


def _vae(call: m.VaeEncode | m.VaeDecode, model: Any, inputs: list[Input], step: Step) -> Result:
    (tensor,) = _tensors(inputs, 1)
    import torch

    if not tensor.is_floating_point():
        raise BadRequest(f"a VAE takes float tensors, not {inputs[0][0].dtype}", "Convert to float32")
    work = model.encode if isinstance(call, m.VaeEncode) else model.decode
    with torch.inference_mode():
        out, notes = work(tensor, call.tiling, step)
    return Result(None, [_out(out)], notes)


def _clip(call: m.ClipEncode, model: Any) -> Result:
    import torch

    if (call.text is None) == (call.tokens is None):
        raise BadRequest("give either text or tokens")
    tokens = call.tokens if call.tokens is not None else model.tokenize(call.text)
    with torch.inference_mode():
        found = model.encode(tokens, call.layer, call.unprojected)
    return Result({"names": list(found)}, [_out(tensor) for tensor in found.values()])


def _tensors(inputs: list[Input], count: int) -> list[torch.Tensor]:
    if len(inputs) != count:
        raise BadRequest(f"{count} tensor(s) are needed, {len(inputs)} came")
    return [tensor_from(ref, data) for ref, data in inputs]


def _out(tensor: torch.Tensor) -> tuple[m.TensorRef, memoryview]:
    return describe(tensor), tensor_bytes(tensor)
