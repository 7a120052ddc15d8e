"""ComfyUI's weight patches, the argument of ``ModelPatcher.add_patches``, to and from plain data.

A patch set is the patches of one ``add_patches`` call (one LoRA, say). Its name is a hash of its content, so it is
uploaded once for all instances. The client encodes, the worker decodes; both need ComfyUI only for its adapters.

A set on the wire is a list of ``[key, offset, function, value]``, and a value is one of:

- ``{"plain": (...)}``: a tuple as ComfyUI has it: ``("diff", (t,))``, ``("set", (t,))``, ``("model_as_lora", (t,))``,
  ``(None,)``;
- ``{"adapter": "lora", "weights": (...)}``: one of ``comfy.weight_adapter.adapters`` by its name;
- ``{"weights": tensor, "patches": [[strength_patch, value, strength_model, offset, function], ...]}``: another model's
  weight with its own patches, as ``get_key_patches`` hands it out for merges;
- ``{"model": index, "key": key, "patches": [...]}``: the same for a model that the daemon can load by itself; ``index``
  is the model's position in the list of models that the set names.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core import BadRequest
from ..wire.codec import describe, tensor_bytes
from ..wire.messages import ModelRef, PatchPut, PatchUse
from ..wire.packing import pack

if TYPE_CHECKING:
    import torch

_FUNCTIONS = ("swap_scale_shift",)
"""Functions of ``comfy.utils`` that ComfyUI's own key maps put into a patch; no other function can be sent."""

Patches = dict[str, list[tuple[Any, ...]]]
"""``ModelPatcher.patches``: per key ``(strength_patch, value, strength_model, offset, function)``."""

WeightOf = Callable[[int, str], tuple[Any, Any]]
"""From a model's index and a key to that model's weight and ComfyUI's conversion function for the weight."""


class Unsendable(BadRequest):
    """Something that only the local process can compute with: a function, an object of a custom node."""


@dataclass
class Beside:
    """Tensors and models that a patch set's plain data refers to."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    models: list[ModelRef] = field(default_factory=list)
    """Models whose weights the set names instead of holding them."""

    def index(self, model: ModelRef) -> int:
        """Return a model's position in ``models``; appends a new model."""
        if model not in self.models:
            self.models.append(model)
        return self.models.index(model)


def encode_set(patches: Mapping[Any, Any], beside: Beside) -> list[Any]:
    """Encode the argument of ``add_patches`` as plain data; tensors and models are appended to ``beside``.

    Raises:
        Unsendable: a patch holds a function or an object that cannot be sent.
    """
    entries = []
    for name, value in patches.items():
        key, offset, function = _split(name)
        entries.append([key, _offset(offset), _function_name(function), _encode(value, beside)])
    return entries


def _no_model(index: int, key: str) -> tuple[Any, Any]:
    raise BadRequest(f"weight {key!r} is of model {index}, which was not sent")


def decode_set(value: Any, weight_of: WeightOf = _no_model) -> dict[Any, Any]:
    """Decode the unpacked result of ``encode_set`` to the argument of ``add_patches``.

    Raises:
        BadRequest: ``value`` is not a valid patch set.
    """
    try:
        decoded: dict[Any, Any] = {}
        for key, offset, function, patch in value:
            parts = (key, offset) if function is None else (key, offset, _function(function))
            decoded[key if offset is None and function is None else parts] = _decode(patch, weight_of)
        return decoded
    except BadRequest:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"a patch set cannot be read: {error}") from error


def _split(name: Any) -> tuple[str, Any, Any]:
    """Split a key of ``add_patches``: text, or ``(text, offset[, function])``."""
    if isinstance(name, str):
        return name, None, None
    return name[0], name[1], name[2] if len(name) > 2 else None


def _offset(offset: Any) -> tuple[int, ...] | None:
    return None if offset is None else tuple(int(part) for part in offset)


def _function_name(function: Any) -> str | None:
    if function is None:
        return None
    name = getattr(function, "__name__", "")
    if name in _FUNCTIONS and getattr(function, "__module__", "") == "comfy.utils":
        return str(name)
    raise Unsendable(f"a patch applies the function {name or function!r}, which cannot be sent")


def _function(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise BadRequest(f"patch function {name!r} is unknown")
    return getattr(importlib.import_module("comfy.utils"), name)


def _adapters() -> dict[str, Any]:
    return {adapter.name: adapter for adapter in importlib.import_module("comfy.weight_adapter").adapters}


def _encode(value: Any, beside: Beside) -> dict[str, Any]:
    if isinstance(value, list):
        (weight, convert), *patches = value
        if (backing := getattr(weight, "luna", None)) is not None:  # a shell's weight: the daemon has the model
            named: dict[str, Any] = {"model": beside.index(backing.model), "key": weight.luna_key}
        else:
            named = {"weights": _plain(_converted(weight, convert), beside.tensors)}
        return {**named, "patches": _entries(patches, beside)}
    if isinstance(value, tuple):
        return {"plain": _plain(value, beside.tensors)}
    if type(value) is _adapters().get(getattr(value, "name", "")):
        return {"adapter": value.name, "weights": _plain(tuple(value.weights), beside.tensors)}
    raise Unsendable(f"a {type(value).__module__}.{type(value).__name__} as a patch cannot be sent")


def _entries(patches: Iterable[Any], beside: Beside) -> list[Any]:
    return [
        [float(strength), _encode(value, beside), float(model), _offset(offset), _function_name(function)]
        for strength, value, model, offset, function in patches
    ]


def _converted(weight: Any, convert: Any) -> Any:
    """Return the weight as ComfyUI computes with it: a quantized weight is converted in float32, others are kept."""
    import torch

    if convert is None or "get_key_patches" in getattr(convert, "__qualname__", ""):
        return weight
    return convert(weight.to(dtype=torch.float32, copy=True), inplace=True)


def _plain(value: Any, tensors: list[torch.Tensor]) -> Any:
    try:
        return pack(value, tensors)
    except Unsendable:
        raise
    except BadRequest as error:
        raise Unsendable(f"a patch holds something that cannot be sent: {error.message}") from error


def _decode(value: dict[str, Any], weight_of: WeightOf) -> Any:
    if "plain" in value:
        return value["plain"]
    if "adapter" in value:
        return _adapters()[value["adapter"]](set(), value["weights"])
    patches = [
        (strength, _decode(patch, weight_of), model, offset, None if function is None else _function(function))
        for strength, patch, model, offset, function in value["patches"]
    ]
    if "model" in value:
        return [weight_of(value["model"], value["key"]), *patches]
    return [(value["weights"], _as_it_is), *patches]


def _as_it_is(weight: Any, **_: Any) -> Any:
    """Stand in for the conversion function of a weight, which the client has converted before sending."""
    return weight


@dataclass
class PatchSet:
    """The patches of one ``add_patches`` call, and how strongly they apply."""

    patches: dict[Any, Any]
    strength_patch: float = 1.0
    strength_model: float = 1.0
    single: bool = False
    """Whether the set was added key by key, so that the next key joins it."""
    _name: str = field(default="", repr=False)

    def put(self) -> tuple[PatchPut, list[torch.Tensor]]:
        """Return the call that uploads the set, and the call's tensors.

        Raises:
            Unsendable: see ``encode_set``.
        """
        beside = Beside()
        packed = encode_set(self.patches, beside)
        if not self._name:
            self._name = _digest(packed, beside)
        return PatchPut(self._name, packed, beside.models), beside.tensors

    def use(self, strength: float = 1.0) -> PatchUse:
        """Return the reference to the set for a request; the set is hashed once.

        Args:
            strength: a hook keyframe's, which multiplies ``strength_patch``.

        Raises:
            Unsendable: see ``encode_set``.
        """
        if not self._name:
            self.put()
        return PatchUse(self._name, float(self.strength_patch) * strength, float(self.strength_model))


def _digest(packed: Any, beside: Beside) -> str:
    """Hash all that decides the patched weights: keys, kinds, scalars, models, each tensor's dtype, shape, bytes."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps([packed, beside.models], default=repr).encode())
    for tensor in beside.tensors:
        ref = describe(tensor)
        digest.update(f"|{ref.dtype}{ref.shape}{ref.order}|".encode())
        digest.update(tensor_bytes(tensor))
    return f"b2:{digest.hexdigest()}"


def matches(sets: Iterable[PatchSet], patches: Patches) -> bool:
    """Whether ``sets``, applied in order, give the patcher's ``patches``, which a node may have edited directly."""
    expected: Patches = {}
    for patch_set in sets:
        for name, value in patch_set.patches.items():
            key, offset, function = _split(name)
            entry = (patch_set.strength_patch, value, patch_set.strength_model, offset, function)
            expected.setdefault(key, []).append(entry)
    if expected.keys() != patches.keys():
        return False
    return all(
        len(entries) == len(patches[key])
        and all(a[1] is b[1] and (a[0], *a[2:]) == (b[0], *b[2:]) for a, b in zip(entries, patches[key]))
        for key, entries in expected.items()
    )


def group(patches: Patches) -> list[PatchSet]:
    """Return sets that give ``patches`` when applied in order: the n-th patches of all keys, grouped by strength."""
    sets: list[PatchSet] = []
    for level in range(max((len(entries) for entries in patches.values()), default=0)):
        by_strength: dict[tuple[float, float], PatchSet] = {}
        for key, entries in patches.items():
            if level >= len(entries):
                continue
            strength, value, model, offset, function = entries[level]
            plain = offset is None and function is None
            name = key if plain else (key, offset) if function is None else (key, offset, function)
            by_strength.setdefault((strength, model), PatchSet({}, strength, model)).patches[name] = value
        sets.extend(by_strength.values())
    return sets


def append(sets: list[PatchSet], new: PatchSet) -> None:
    """Add a set to ``sets``. Keys that a merge adds singly become one set, if no key's patches change order."""
    if new.single:
        key = next(iter(new.patches))
        for index in range(len(sets) - 1, -1, -1):
            last = sets[index]
            if not last.single or key in last.patches:
                break
            if _strengths(last) == _strengths(new):
                # A new object: clones share the old one.
                sets[index] = PatchSet({**last.patches, **new.patches}, *_strengths(new), single=True)
                return
    sets.append(new)


def _strengths(patch_set: PatchSet) -> tuple[float, float]:
    return patch_set.strength_patch, patch_set.strength_model
