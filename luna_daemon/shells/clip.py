"""``DaemonCLIP`` inside ComfyUI: ComfyUI's own ``CLIP`` around text encoders without weights, computed by the daemon.

ComfyUI's ``CLIP`` code runs as it is, hook schedules included; only ``encode_token_weights`` of the whole and of each
encoder is replaced. What they send is the state of the network as ComfyUI has set it: the options, and the patches and
hooks of the patcher that was loaded last.
"""

from __future__ import annotations

import functools
import numbers
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..comfyui.patches import PatchSet, Unsendable
from ..core import BadRequest, LimitExceeded, ModelError, PatchMissing
from ..wire import messages as m
from ..wire.packing import pack, unpack
from .backing import Backing, Skeleton, comfy
from .patcher import patcher_class, python_inside

if TYPE_CHECKING:
    import torch

_STATE = ("layer", "layer_idx", "return_projected_pooled")
"""What ``set_clip_options`` of ComfyUI's encoders sets."""


class CLIPShell:
    """What differs from ``comfy.sd.CLIP``, which comes after it in the class' bases."""

    _stock: Any
    cond_stage_model: Any
    patcher: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def clone(self, *args: Any, **options: Any) -> Any:
        """ComfyUI makes a plain ``CLIP`` of it; it stays a shell, or the first LoRA would end it."""
        other = self._stock.clone(self, *args, **options)
        other.__class__ = type(self)
        return other

    def get_sd(self) -> Any:
        """With patches applied, as ComfyUI's after ``load_model``."""
        self.patcher.luna.current = self.patcher
        self.materialize("the state dict is asked for")
        comfy("model_management").load_models_gpu([self.patcher], force_patch_weights=True)
        return self._stock.get_sd(self)

    def get_ram_usage(self) -> int:
        """For ComfyUI's cache under memory pressure: nothing is gained by dropping a shell."""
        return int(self.patcher.model_size())

    def materialize(self, why: str = "materialize() is called") -> Any:
        """Load the true weights here, once; everything on these encoders is computed locally afterwards."""
        self.patcher.luna.materialise(why)
        return self


class Encoders:
    """The compute of a skeleton's text encoders.

    Args:
        model: ``cond_stage_model`` on meta tensors.
        backing: what stands behind it.
    """

    def __init__(self, model: Any, backing: Backing) -> None:
        self._model = weakref.ref(model)
        self._backing = backing
        self.options: dict[str, Any] = {}
        """What the whole was given since its last reset."""
        self.parts = [name for name, part in model.named_children() if hasattr(part, "encode_token_weights")]
        self._part_options: dict[str, dict[str, Any]] = {name: {} for name in self.parts}

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoders:
        return self

    @property
    def model(self) -> Any:
        return self._model()

    def methods(self) -> dict[str, Callable[..., Any]]:
        """What is set on the skeleton, by dotted name."""
        alive = self._model
        found: dict[str, Callable[..., Any]] = {
            "encode_token_weights": self.encode,
            "set_clip_options": self.set_options,
            "reset_clip_options": self.reset_options,
            "to": lambda *args, **options: alive(),
        }
        for name in self.parts:
            found[f"{name}.encode_token_weights"] = functools.partial(self.encode_part, name)
            found[f"{name}.set_clip_options"] = functools.partial(self._set_part_options, name)
            found[f"{name}.reset_clip_options"] = functools.partial(self._reset_part_options, name)
        return found

    # --- options ---

    def set_options(self, options: dict[str, Any]) -> Any:
        self.options.update(options)
        return type(self.model).set_clip_options(self.model, options)

    def reset_options(self) -> Any:
        self.options.clear()
        return type(self.model).reset_clip_options(self.model)

    def _set_part_options(self, name: str, options: dict[str, Any]) -> Any:
        self._part_options[name].update(options)
        part = getattr(self.model, name)
        return type(part).set_clip_options(part, options)

    def _reset_part_options(self, name: str) -> Any:
        self._part_options[name].clear()
        part = getattr(self.model, name)
        return type(part).reset_clip_options(part)

    def _state(self) -> dict[str, list[Any]]:
        return {name: [getattr(getattr(self.model, name), key, None) for key in _STATE] for name in self.parts}

    def _set_apart(self) -> bool:
        """Whether a node has set one encoder's options by itself, so that the whole's do not tell its state."""
        before, given, parts = self._state(), dict(self.options), {k: dict(v) for k, v in self._part_options.items()}
        self.reset_options()
        self.set_options(given)
        expected = self._state()
        for name, values in before.items():
            for key, value in zip(_STATE, values):
                if hasattr(getattr(self.model, name), key):
                    setattr(getattr(self.model, name), key, value)
        self._part_options = parts
        return before != expected

    def part_options(self, name: str) -> dict[str, Any]:
        """Options that bring a fresh encoder into this one's state, whichever way it was set."""
        part = getattr(self.model, name)
        default = getattr(part, "options_default", None)
        if default is None or not all(hasattr(part, key) for key in _STATE):
            return _plain_options(self._part_options[name])
        options: dict[str, Any] = {}
        if (part.layer, part.layer_idx) != tuple(default[:2]):
            options["layer"] = part.layer_idx if part.layer == "hidden" else None
        if part.return_projected_pooled != default[2]:
            options["projected_pooled"] = part.return_projected_pooled
        return options

    # --- encoding ---

    def encode(self, tokens: Any) -> Any:
        """``cond_stage_model.encode_token_weights``: ``(cond, pooled[, extra])``."""
        patcher = self._backing.current
        self._warn_of_overrides(patcher)
        if (patcher is not None and python_inside(patcher)) or self._set_apart():
            # A node's code stands between whole and parts: ComfyUI's own code runs here, the parts in the daemon.
            return type(self.model).encode_token_weights(self.model, tokens)
        options = dict(self.options)
        unprojected = options.pop("projected_pooled", None) is False
        # Newer ComfyUI has lists of layers; and no layer at all is not the same as none given.
        layer = options.pop("layer") if isinstance(options.get("layer"), int) else None
        call = m.ClipEncode(self._backing.model, layer=layer, unprojected=unprojected, options=_plain_options(options))

        def outcome(found: dict[str, Any]) -> Any:
            cond, pooled = found.pop("cond"), found.pop("pooled_output")
            return (cond, pooled, found) if found else (cond, pooled)

        return self._either(call, tokens, patcher, outcome, dict(self.options))

    def encode_part(self, name: str, tokens: Any) -> Any:
        """``cond_stage_model.<name>.encode_token_weights``."""
        options = self.part_options(name)
        call = m.ClipEncode(self._backing.model, part=name, options=options)
        return self._either(call, tokens, self._backing.current, lambda found: tuple(found["out"]), options)

    def _either(
        self, call: m.ClipEncode, tokens: Any, patcher: Any, outcome: Callable[[Any], Any], options: dict[str, Any]
    ) -> Any:
        backing = self._backing

        def remote() -> Any:
            backing.make_room(lambda: comfy("model_management").minimum_inference_memory())
            return outcome(_placed(self._send(call, tokens, patcher)))

        return backing.either(remote, lambda clip: _local(clip, call.part, tokens, patcher, options))

    def _send(self, call: m.ClipEncode, tokens: Any, patcher: Any) -> Any:
        """Ask with the names of the patch sets; what the daemon does not have yet is put, and it is asked again."""
        import msgspec

        tensors: list[torch.Tensor] = []
        try:
            packed = pack(_own_tokens(tokens), tensors)
        except BadRequest as error:
            raise Unsendable(f"the tokens hold something that cannot be sent: {error.message}") from error
        patches, hooks, sets = patcher.uses() if patcher is not None else ([], [], [])
        call = msgspec.structs.replace(call, packed=packed, patches=patches, hooks=hooks)
        try:
            answer = self._backing.send_drawing(call, tensors, likely=False)
        except PatchMissing:
            self._put(sets)
            try:
                answer = self._backing.send_drawing(call, tensors, likely=False)
            except PatchMissing as error:
                raise Unsendable("the daemon cannot keep patches of this size") from error
        return unpack(answer.result["packed"], answer.tensors)

    def _put(self, sets: list[PatchSet]) -> None:
        for one in sets:
            put, tensors = one.put()
            try:
                self._backing.send(put, tensors)
            except LimitExceeded as error:
                raise Unsendable(f"patches of this size are not taken: {error.message}") from error
            except ModelError as error:
                raise Unsendable(f"the daemon does not have the other CLIP of a merge: {error}") from error

    def _warn_of_overrides(self, patcher: Any) -> None:
        options = getattr(patcher, "model_options", None) or {}
        if "optimized_attention_override" in options.get("transformer_options", {}):
            self._backing.say("a node's own attention function cannot be sent, and is left out")


def _local(clip: Any, part: str, tokens: Any, patcher: Any, options: dict[str, Any]) -> Any:
    """The same from a local ``CLIP``: a clone of its patcher gets the shell's patches, hooks and options."""
    memory, model = comfy("model_management"), clip.cond_stage_model
    mirror = clip.patcher.clone()
    if patcher is not None:
        mirror.patches = {key: list(entries) for key, entries in patcher.patches.items()}
        mirror.patches_uuid = patcher.patches_uuid
        mirror.hook_patches = patcher.hook_patches
        mirror.forced_hooks = patcher.current_hooks
    model.reset_clip_options()
    target = getattr(model, part) if part else model
    target.set_clip_options({**options, "execution_device": mirror.load_device})
    memory.load_models_gpu([mirror])
    try:
        return target.encode_token_weights(tokens)
    finally:
        mirror.patch_hooks(None)
        model.reset_clip_options()


def _own_tokens(tokens: Any) -> Any:
    """Tokens as they travel: numbers become Python's own; word ids, which the encoders ignore, stay here."""
    if isinstance(tokens, dict):
        return {key: _own_tokens(value) for key, value in tokens.items()}
    if isinstance(tokens, list):
        return [_own_tokens(item) for item in tokens]
    if isinstance(tokens, tuple):
        short = tokens[:2] if len(tokens) == 3 and isinstance(tokens[2], numbers.Integral) else tokens
        return tuple(_own_tokens(item) for item in short)
    if isinstance(tokens, bool):
        return tokens
    if isinstance(tokens, numbers.Integral):
        return int(tokens)
    return float(tokens) if isinstance(tokens, numbers.Real) else tokens


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Without devices and the like, which are the worker's own business."""
    plain = (bool, int, float, str, list, type(None))
    return {key: value for key, value in options.items() if isinstance(value, plain)}


def _placed(found: Any) -> Any:
    """Tensors where ComfyUI's own results lie."""
    if isinstance(found, dict):
        return {key: _placed(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return type(found)(_placed(item) for item in found)
    return found.to(comfy("model_management").intermediate_device()) if hasattr(found, "untyped_storage") else found


@functools.cache
def clip_class() -> Any:
    """``comfy.sd.CLIP`` of the running ComfyUI, as a shell has it."""
    stock = comfy("sd").CLIP
    return type("DaemonCLIP", (CLIPShell, stock), {"_stock": stock, "__doc__": __doc__})


def shell_clip(clip: Any, backing: Backing) -> Any:
    """Turn a ``comfy.sd.CLIP`` on meta tensors into a shell."""
    model = clip.cond_stage_model
    backing.skeleton = Skeleton(model, backing, Encoders(model, backing).methods())
    clip.__class__ = clip_class()
    clip.patcher.__class__ = patcher_class()
    backing.current = clip.patcher
    return clip
