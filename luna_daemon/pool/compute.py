"""Compute a call with a loaded model: the only place where ops meet backends."""

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
    """A call's result: plain data, tensors as bytes, and notes for the caller."""

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
    """Compute a call.

    Args:
        model: the loaded model.
        inputs: call tensors, RNG states, patch tensors; as descriptors and bytes.
        step: called before each tile; raises to cancel.
        patches: the patch sets that the call names.
        borrow: returns another model, loaded if need be, whose weights a patch set names.

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
        if sum(source is not None for source in (call.text, call.tokens, call.packed)) != 1:
            raise BadRequest("exactly one of text, tokens and packed is needed")
        return _clip(call, model) if call.packed is None else _clip_packed(call, model, inputs, patches, borrow)
    raise BadRequest(f"workers do not serve {type(call).__name__}")


def free_memory() -> None:
    """Return the memory of unloaded weights to the system and to the device's other users."""
    gc.collect()
    release_device_cache()


def release_device_cache() -> None:
    """Free the GPU memory that torch caches, for other processes on the GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _echo(call: m.Echo, model: Any, step: Step) -> Result:
    data = model.echo(call.nbytes, call.seconds, step)
    return Result(None, [(m.TensorRef("float32", (call.nbytes // 4,), call.nbytes, 0), data)] if call.nbytes else [])


def _vae(call: m.VaeEncode | m.VaeDecode, model: Any, inputs: list[Input], step: Step) -> Result:
    import torch

    needed = 1 + len(call.generators)
    if len(inputs) != needed:
        raise BadRequest(f"{needed} tensor(s) are needed, {len(inputs)} were sent")
    (tensor,), states, _ = _split(inputs, len(call.generators))
    if not tensor.is_floating_point():
        raise BadRequest(f"a VAE takes float tensors, not {inputs[0][0].dtype}", "Convert to float32")
    options = _vae_options(call, model)
    run_model = model.encode if isinstance(call, m.VaeEncode) else model.decode
    with torch.inference_mode(), drawing(call.generators, states) as drawn:
        out, notes = run_model(tensor, call.tiling, step, **options)
    return _with_states(drawn, call.generators, Result(None, [_out(out)], notes))


def _vae_options(call: m.VaeEncode | m.VaeDecode, model: Any) -> dict[str, Any]:
    """Return the arguments that only the comfy backend's VAE takes."""
    options: dict[str, Any] = {"raw": True} if call.raw else {}
    if isinstance(call, m.VaeDecode) and call.options:
        options["options"] = call.options
    if call.attributes:
        options["attributes"] = unpack(call.attributes, [])
    if options and not getattr(model, "takes_options", False):
        raise BadRequest(f"{' and '.join(options)} need the comfy backend", "Leave them out, or set comfyui_path")
    return options


def _clip(call: m.ClipEncode, model: Any) -> Result:
    """Encode text, or tokens of the plain form."""
    import torch

    tokens = call.tokens if call.tokens is not None else model.tokenize(call.text)
    with torch.inference_mode():
        outputs = model.encode(tokens, call.layer, call.unprojected)
    return Result({"names": list(outputs)}, [_out(tensor) for tensor in outputs.values()])


def _clip_packed(
    call: m.ClipEncode,
    model: Any,
    inputs: list[Input],
    patches: Sequence[m.Patch],
    borrow: Callable[[m.LoadSpec], Any],
) -> Result:
    """Encode ComfyUI's own tokens, with embeddings, patches and hooks."""
    import torch

    if not hasattr(model, "encode_packed"):
        raise BadRequest("packed tokens need the comfy backend", "Send text or tokens, or set comfyui_path")
    tensors, states, patch_tensors = _split(inputs, len(call.generators), patches)
    sets = {patch.name: patch for patch in patches}

    def patch_of(name: str) -> tuple[Any, list[Any]]:
        with torch.inference_mode(False):  # loaded as any other model
            lenders = [borrow(spec) for spec in sets[name].models]
        return unpack(sets[name].packed, patch_tensors[name]), lenders

    out: list[torch.Tensor] = []
    with torch.inference_mode(), drawing(call.generators, states) as drawn:
        packed = pack(model.encode_packed(call, unpack(call.packed, tensors), patch_of), out)
    return _with_states(drawn, call.generators, Result({"packed": packed}, [_out(tensor) for tensor in out]))


def _split(
    inputs: list[Input], generators: int, patches: Sequence[m.Patch] = ()
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Split a job's inputs. Inputs are: call tensors, RNG states, patch tensors.

    Args:
        generators: number of RNG states.
        patches: patch sets, with the positions of their tensors in ``inputs``.

    Returns:
        The call's tensors, the RNG states, and by patch set its tensors.
    """
    tensors = [tensor_from(ref, data) for ref, data in inputs]
    states_end = min((patch.start for patch in patches), default=len(tensors))
    states_start = max(0, states_end - generators)
    patch_tensors = {patch.name: tensors[patch.start : patch.start + patch.count] for patch in patches}
    return tensors[:states_start], tensors[states_start:states_end], patch_tensors


def _with_states(drawn: Drawn, sent: Sequence[str], result: Result) -> Result:
    """Add which random generators the call drew from, and the new states of those whose state was sent."""
    if drawn.names:
        result.value = {**(result.value or {}), "drew": drawn.names}
        result.tensors += [_out(state) for name, state in zip(drawn.names, drawn.states) if name in sent]
    return result


def _out(tensor: torch.Tensor) -> tuple[m.TensorRef, memoryview]:
    return describe(tensor), tensor_bytes(tensor)
