"""Text encoders of the comfy backend, which encode with the patches and hooks that a call names."""

from __future__ import annotations

import functools
import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...comfyui.patches import decode_set
from ...core import BadRequest
from ...wire.messages import ClipEncode, PatchUse
from .library import ComfyLibrary

if TYPE_CHECKING:
    import torch

PatchOf = Callable[[str], "tuple[Any, list[ComfyText]]"]
"""Maps the name of a patch set to its patches, and to the models whose weights those patches refer to."""

_MAX_CLONES = 8
"""Patched clones kept per model: a call with patches that were used before need not copy them again."""


class ComfyText:
    """A ``comfy.sd.CLIP`` with its patched clones. Weights are fully loaded: a partial load changes results."""

    def __init__(self, backend: ComfyLibrary, clip: Any) -> None:
        self._backend = backend
        self._clip = clip
        self._clones: OrderedDict[tuple[PatchUse, ...], tuple[Any, list[ComfyText]]] = OrderedDict()
        """Per stack of patches the patched clone, and the other models whose weights its patches hold."""
        self.nbytes = int(clip.patcher.model_size())

    def properties(self) -> dict[str, Any]:
        """Describe the model as ``TextModel`` does, without the two sizes."""
        model = self._clip.cond_stage_model
        return {
            "encoders": [name for name, part in model.named_children() if hasattr(part, "encode_token_weights")],
            "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in model.dtypes)),
            "device": str(self._clip.patcher.load_device),
            "class": type(model).__name__,
        }

    def tokenize(self, text: str) -> Any:
        """Tokenize with ComfyUI's tokenizer, which finds no embeddings here."""
        return self._clip.tokenize(text)

    def weights(self) -> dict[str, tuple[torch.Tensor, Any]]:
        """Give every unpatched weight on the CPU, with ComfyUI's conversion function for quantized weights."""
        entries = self._clip.patcher.get_key_patches()
        # Copies, since the parameters move to the GPU and stay there as long as they are referenced.
        return {key: (patches[0][0].detach().to("cpu"), patches[0][1]) for key, patches in entries.items()}

    def forget(self, unloaded: Sequence[Any]) -> None:
        """Drop the clones that hold weights of unloaded models."""
        for stack, (_, models) in list(self._clones.items()):
            if any(model in unloaded for model in models):
                del self._clones[stack]

    def encode(self, tokens: Any, layer: int | None, unprojected: bool) -> dict[str, torch.Tensor]:
        """Encode without patches.

        Returns:
            ``cond`` ``[1,T,D]``, ``pooled_output`` ``[1,P]`` and the further tensors of the result.

        Raises:
            OutOfMemory: the device has no room.
        """
        call = ClipEncode(None, layer=layer, unprojected=unprojected)  # type: ignore[arg-type]
        result = self.encode_packed(call, tokens, lambda name: ([], []))
        return {name: value for name, value in result.items() if hasattr(value, "untyped_storage")}

    def encode_packed(self, call: ClipEncode, tokens: Any, patch_of: PatchOf) -> dict[str, Any]:
        """Encode ComfyUI's own tokens with patches and hooks: by all encoders, or by ``call.part`` alone.

        Returns:
            ``cond`` ``[1,T,D]``, ``pooled_output`` ``[1,P]`` and the family's further entries. For ``call.part`` the
            dictionary has only ``out``, a tuple.

        Raises:
            BadRequest: no encoder is named ``call.part``, or a patch set cannot be read.
            OutOfMemory: the device has no room.
        """
        with self._backend.progress(lambda done, total: None):
            clip = self._patched(call.patches, patch_of)
            model = clip.cond_stage_model
            model.reset_clip_options()
            if call.part:
                return {"out": tuple(self._encode_part(clip, call, tokens, patch_of))}
            options = {**call.options, **({} if call.layer is None else {"layer": call.layer})}
            model.set_clip_options({**options, **({"projected_pooled": False} if call.unprojected else {})})
            out = self._loaded(clip, call.hooks, patch_of, lambda: model.encode_token_weights(tokens))
        extra = out[2] if len(out) > 2 else {}
        return {"cond": out[0], "pooled_output": out[1], **extra}

    def _encode_part(self, clip: Any, call: ClipEncode, tokens: Any, patch_of: PatchOf) -> Any:
        part = getattr(clip.cond_stage_model, call.part, None)
        if part is None or not hasattr(part, "encode_token_weights"):
            raise BadRequest(
                f"the model has no text encoder {call.part!r}", f"Use one of {self.properties()['encoders']}"
            )
        part.reset_clip_options()
        part.set_clip_options(dict(call.options))
        return self._loaded(clip, call.hooks, patch_of, lambda: part.encode_token_weights(tokens))

    def _loaded(self, clip: Any, hooks: list[PatchUse], patch_of: PatchOf, work: Callable[[], Any]) -> Any:
        """Run ``work`` with every weight patched and on its device, and with the hooks applied on top."""
        self._backend.memory.load_models_gpu([clip.patcher], force_full_load=True)
        if not hooks:
            return work()
        module = importlib.import_module("comfy.hooks")
        # A clone for this call: the patcher itself would keep the hooks of every call, and patch all weights again.
        hooked, group = clip.patcher.clone(), module.HookGroup()
        for use in hooks:
            hook = module.WeightHook()
            hooked.add_hook_patches(hook, _decoded(*patch_of(use.name)), use.strength_patch, use.strength_model)
            group.add(hook)
        try:
            hooked.patch_hooks(group)
            return work()
        finally:
            hooked.patch_hooks(None)

    def _patched(self, patches: list[PatchUse], patch_of: PatchOf) -> Any:
        """Give the clone with these patches; a new clone for patches seen before would patch all weights again."""
        if not patches:
            return self._clip
        stack = tuple(patches)
        if stack not in self._clones:
            clip, others = self._clip.clone(), []
            for use in patches:
                packed, models = patch_of(use.name)
                clip.add_patches(_decoded(packed, models), use.strength_patch, use.strength_model)
                others += [model for model in models if model is not self]
            self._clones[stack] = clip, others
            if len(self._clones) > _MAX_CLONES:
                self._clones.popitem(last=False)
        self._clones.move_to_end(stack)
        return self._clones[stack][0]


def _decoded(patches: Any, models: Sequence[ComfyText]) -> dict[Any, Any]:
    """Make the argument of ``add_patches``, with copies of the tensors: shared memory lasts only for the call."""
    weights = functools.cache(lambda index: models[index].weights())
    return decode_set(_copied(patches), lambda index, key: weights(index)[key])


def _copied(value: Any) -> Any:
    if hasattr(value, "untyped_storage"):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
