"""``DaemonCLIP`` inside ComfyUI: ComfyUI's own ``CLIP`` without weights, whose calls the daemon computes.

ComfyUI's ``CLIP`` code runs unchanged, hook schedules included; only ``encode_token_weights`` is replaced, of
``cond_stage_model`` (the *whole*) and of each encoder inside (a *part*). A request carries the tokens and the state of
the network: the options, and the patches and hooks of the patcher that was loaded last.
"""

from __future__ import annotations

import functools
import numbers
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ..client import Answer
from ..comfyui.patches import Unsendable
from ..core import BadRequest
from ..wire import messages as m
from ..wire.packing import pack, unpack
from .backing import Backing, Request
from .host import comfy
from .patcher import patcher_class, python_inside

if TYPE_CHECKING:
    import torch

_STATE = ("layer", "layer_idx", "return_projected_pooled")
"""Attributes that ``set_clip_options`` of ComfyUI's encoders sets."""


class CLIPShell:
    """Methods that override those of ``comfy.sd.CLIP``, the other base class of ``DaemonCLIP``."""

    _stock: Any
    cond_stage_model: Any
    patcher: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def clone(self, *args: Any, **options: Any) -> Any:
        """Return a clone that is a ``DaemonCLIP`` too; ComfyUI's own method returns a plain ``CLIP``."""
        other = self._stock.clone(self, *args, **options)
        other.__class__ = type(self)
        return other

    def get_sd(self) -> Any:
        """Return the state dict with patches applied; loads the weights into this process."""
        self.patcher.luna.current = self.patcher
        self.materialize("the state dict is asked for")
        comfy("model_management").load_models_gpu([self.patcher], force_patch_weights=True)
        return self._stock.get_sd(self)

    def get_ram_usage(self) -> int:
        """Return the bytes of the weights in this process; 0 for a shell, so ComfyUI's cache does not drop it."""
        return int(self.patcher.model_size())

    def materialize(self, why: str = "materialize() is called") -> Any:
        """Load the weights into this process, once; this process computes all later calls. Return the object."""
        self.patcher.luna.materialise(why)
        return self


class Encoders:
    """Replacement methods for a skeleton's text encoders, and the options set on them.

    Args:
        model: ``cond_stage_model`` on meta tensors.
        backing: computes the calls.
    """

    def __init__(self, model: Any, backing: Backing) -> None:
        self._model = weakref.ref(model)
        self._backing = backing
        self.options: dict[str, Any] = {}
        """Options that ``set_clip_options`` of the whole got since the last reset."""
        self.parts = [name for name, part in model.named_children() if hasattr(part, "encode_token_weights")]
        self._part_options: dict[str, dict[str, Any]] = {name: {} for name in self.parts}

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoders:
        return self

    @property
    def model(self) -> Any:
        """The weightless network."""
        return self._model()

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return the methods to replace on the skeleton, by dotted name."""
        alive = self._model
        methods: dict[str, Callable[..., Any]] = {
            "encode_token_weights": self.encode,
            "set_clip_options": self.set_options,
            "reset_clip_options": self.reset_options,
            "to": lambda *args, **options: alive(),
        }
        for name in self.parts:
            methods[f"{name}.encode_token_weights"] = functools.partial(self.encode_part, name)
            methods[f"{name}.set_clip_options"] = functools.partial(self._set_part_options, name)
            methods[f"{name}.reset_clip_options"] = functools.partial(self._reset_part_options, name)
        return methods

    # --- options ---

    def set_options(self, options: dict[str, Any]) -> Any:
        """Record options for the next call, and set them on the network as ComfyUI does."""
        self.options.update(options)
        return type(self.model).set_clip_options(self.model, options)

    def reset_options(self) -> Any:
        """Forget all options, and reset those of the network."""
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
        """Whether a node has set options of one part, so that the whole's options do not give that part's state."""
        before, options, parts = self._state(), dict(self.options), {k: dict(v) for k, v in self._part_options.items()}
        self.reset_options()
        self.set_options(options)
        expected = self._state()
        for name, values in before.items():
            for key, value in zip(_STATE, values):
                if hasattr(getattr(self.model, name), key):
                    setattr(getattr(self.model, name), key, value)
        self._part_options = parts
        return before != expected

    def part_options(self, name: str) -> dict[str, Any]:
        """Return options that bring a fresh encoder into the present state of the encoder ``name``."""
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
        """Replace ``cond_stage_model.encode_token_weights``; return ``(cond, pooled[, extra])``."""
        patcher = self._backing.current
        self._warn_of_overrides(patcher)
        if (patcher is not None and python_inside(patcher)) or self._set_apart():
            # A node changed how the whole uses its parts: run ComfyUI's code here, and only the parts in the daemon.
            return type(self.model).encode_token_weights(self.model, tokens)
        options = dict(self.options)
        unprojected = options.pop("projected_pooled", None) is False
        # A list of layers (newer ComfyUI) and an explicit ``None`` are sent in ``options``.
        layer = options.pop("layer") if isinstance(options.get("layer"), int) else None
        call = m.ClipEncode(self._backing.model, layer=layer, unprojected=unprojected, options=_plain_options(options))

        def outcome(outputs: dict[str, Any]) -> Any:
            cond, pooled = outputs.pop("cond"), outputs.pop("pooled_output")
            return (cond, pooled, outputs) if outputs else (cond, pooled)

        return self._compute(call, tokens, patcher, outcome, dict(self.options))

    def encode_part(self, name: str, tokens: Any) -> Any:
        """Replace ``cond_stage_model.<name>.encode_token_weights``; return ``(cond, pooled[, extra])``."""
        options = self.part_options(name)
        call = m.ClipEncode(self._backing.model, part=name, options=options)
        return self._compute(call, tokens, self._backing.current, lambda outputs: tuple(outputs["out"]), options)

    def _compute(
        self, call: m.ClipEncode, tokens: Any, patcher: Any, outcome: Callable[[Any], Any], options: dict[str, Any]
    ) -> Any:
        """Encode in the daemon, with the patches of ``patcher``; else with the local model in the same state.

        Args:
            outcome: converts the worker's named outputs to what the encoder's own method returns.
            options: the arguments of the encoder's ``set_clip_options``, for the local model.
        """

        def prepare() -> Request:
            tensors: list[torch.Tensor] = []
            packed = _packed(tokens, tensors)
            patches, hooks, sets = patcher.uses() if patcher is not None else ([], [], [])
            ready = msgspec.structs.replace(call, packed=packed, patches=patches, hooks=hooks)
            return Request(ready, tensors, read, may_draw=False, patch_sets=sets)

        def read(answer: Answer) -> Any:
            return outcome(unpack(answer.result["packed"], answer.tensors))

        return self._backing.compute(
            prepare,
            lambda clip: _encode_locally(clip, call.part, tokens, patcher, options),
            comfy("model_management").minimum_inference_memory,
        )

    def _warn_of_overrides(self, patcher: Any) -> None:
        options = getattr(patcher, "model_options", None) or {}
        if "optimized_attention_override" in options.get("transformer_options", {}):
            self._backing.warn_once("a node's own attention function cannot be sent: the text is encoded without it")


def _encode_locally(clip: Any, part: str, tokens: Any, patcher: Any, options: dict[str, Any]) -> Any:
    """Encode with a local ``CLIP``, in the shell's state: a clone of its patcher gets the patches and hooks."""
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


def _packed(tokens: Any, tensors: list[torch.Tensor]) -> Any:
    """Pack tokens as plain data; embeddings among the tokens are appended to ``tensors``.

    Raises:
        Unsendable: the tokens hold an object of a custom node.
    """
    try:
        return pack(_own_tokens(tokens), tensors)
    except BadRequest as error:
        raise Unsendable(f"the tokens hold something that cannot be sent: {error.message}") from error


def _own_tokens(tokens: Any) -> Any:
    """Convert numbers in tokens to Python's own types, and drop word ids, which the encoders ignore."""
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
    """Return the options of plain types; the worker sets devices and the like itself."""
    plain = (bool, int, float, str, list, type(None))
    return {key: value for key, value in options.items() if isinstance(value, plain)}


@functools.cache
def clip_class() -> Any:
    """Return the class ``DaemonCLIP``, derived from the running ComfyUI's ``CLIP``."""
    stock = comfy("sd").CLIP
    return type("DaemonCLIP", (CLIPShell, stock), {"_stock": stock, "__doc__": __doc__})


def shell_clip(clip: Any, backing: Backing) -> Any:
    """Turn a ``comfy.sd.CLIP`` on meta tensors into a shell."""
    model = clip.cond_stage_model
    backing.hollow(model, Encoders(model, backing).methods())
    clip.__class__ = clip_class()
    clip.patcher.__class__ = patcher_class()
    backing.current = clip.patcher
    return clip
