"""A call and a loaded model to a result: the only place where ops meet backends."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..backends.base import Step
from ..core import BadRequest
from ..wire import messages as m
from ..wire.codec import describe, tensor_bytes, tensor_from
from ..wire.packing import pack, unpack
from ..wire.rng import Drawn, drawing

if TYPE_CHECKING:
    import torch

Input = tuple[m.TensorRef, memoryview]


@dataclass
class Result:
    """Plain data, tensors as bytes, and notes for the caller."""

    value: Any = None
    tensors: list[tuple[m.TensorRef, memoryview]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(
    call: m.Call,
    model: Any,
    inputs: list[Input],
    step: Step,
    patches: Sequence[m.Patch] = (),
    borrow: Callable[[m.LoadSpec], Any] = lambda spec: None,
) -> Result:
    """Compute.

    Args:
        call: what to do.
        model: loaded by a backend.
        inputs: the call's tensors, then those of ``patches``.
        step: told of progress; raises to cancel.
        patches: the patch sets that the call names.
        borrow: loads another model, whose weights a patch set names.

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
        return _clip(call, model, inputs, patches, borrow)
    raise BadRequest(f"workers do not serve {type(call).__name__}")


def free_memory() -> None:
    """Give unloaded weights back to the system and to the device's other users."""
    gc.collect()
    release_device_cache()


def release_device_cache() -> None:
    """What torch keeps for its next call on a GPU goes to the instances that share it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _echo(call: m.Echo, model: Any, step: Step) -> Result:
    data = model.echo(call.nbytes, call.seconds, step)
    return Result(None, [(m.TensorRef("float32", (call.nbytes // 4,), call.nbytes, 0), data)] if call.nbytes else [])


def _vae(call: m.VaeEncode | m.VaeDecode, model: Any, inputs: list[Input], step: Step) -> Result:
    tensor, *states = _tensors(inputs, 1 + len(call.generators))
    import torch

    if not tensor.is_floating_point():
        raise BadRequest(f"a VAE takes float tensors, not {inputs[0][0].dtype}", "Convert to float32")
    more: dict[str, Any] = {"raw": True} if call.raw else {}
    if isinstance(call, m.VaeDecode) and call.options:
        more["options"] = call.options
    if call.attributes:
        more["attributes"] = unpack(call.attributes, [])
    if more and not hasattr(model, "_backend"):
        raise BadRequest(f"{' and '.join(more)} need the comfy backend", "Leave them out, or set comfyui_path")
    work = model.encode if isinstance(call, m.VaeEncode) else model.decode
    with torch.inference_mode(), drawing(call.generators, states) as drawn:
        out, notes = work(tensor, call.tiling, step, **more)
    return _told(drawn, call.generators, Result(None, [_out(out)], notes))


def _told(drawn: Drawn, given: Sequence[str], result: Result) -> Result:
    """Say which random generators the call drew from, with the new states of those that came with it."""
    if drawn.names:
        result.value = {**(result.value or {}), "drew": drawn.names}
        result.tensors += [_out(state) for name, state in zip(drawn.names, drawn.states) if name in given]
    return result


def _clip(
    call: m.ClipEncode,
    model: Any,
    inputs: list[Input],
    patches: Sequence[m.Patch],
    borrow: Callable[[m.LoadSpec], Any],
) -> Result:
    import torch

    if sum(given is not None for given in (call.text, call.tokens, call.packed)) != 1:
        raise BadRequest("give one of text, tokens and packed")
    if call.packed is not None:
        return _clip_packed(call, model, inputs, patches, borrow)
    tokens = call.tokens if call.tokens is not None else model.tokenize(call.text)
    with torch.inference_mode():
        found = model.encode(tokens, call.layer, call.unprojected)
    return Result({"names": list(found)}, [_out(tensor) for tensor in found.values()])


def _clip_packed(
    call: m.ClipEncode,
    model: Any,
    inputs: list[Input],
    patches: Sequence[m.Patch],
    borrow: Callable[[m.LoadSpec], Any],
) -> Result:
    """ComfyUI's own tokens, with embeddings, patches and hooks."""
    import torch

    if not hasattr(model, "encode_packed"):
        raise BadRequest("packed tokens need the comfy backend", "Give text or tokens, or set comfyui_path")
    tensors = _tensors(inputs, len(inputs))
    # Those of patches follow the call's own, whose last are the generators'.
    own = min((patch.start for patch in patches), default=len(tensors))
    states = tensors[max(0, own - len(call.generators)) : own]
    sets = {patch.name: patch for patch in patches}

    def patch_of(name: str) -> tuple[Any, list[Any]]:
        patch = sets[name]
        with torch.inference_mode(False):  # loaded as any other model
            lenders = [borrow(spec) for spec in patch.models]
        return unpack(patch.packed, tensors[patch.start : patch.start + patch.count]), lenders

    out: list[torch.Tensor] = []
    with torch.inference_mode(), drawing(call.generators, states) as drawn:
        found = model.encode_packed(call, unpack(call.packed, tensors), patch_of)
        packed = pack(found, out)
    return _told(drawn, call.generators, Result({"packed": packed}, [_out(tensor) for tensor in out]))


def _tensors(inputs: list[Input], count: int) -> list[torch.Tensor]:
    if len(inputs) != count:
        raise BadRequest(f"{count} tensor(s) are needed, {len(inputs)} came")
    return [tensor_from(ref, data) for ref, data in inputs]


def _out(tensor: torch.Tensor) -> tuple[m.TensorRef, memoryview]:
    return describe(tensor), tensor_bytes(tensor)
