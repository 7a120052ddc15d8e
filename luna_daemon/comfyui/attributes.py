"""Attributes that nodes set on a network: detected on the weightless network, set on the real network during a call.

Plain values can be sent: padding modes, noise scales, whether a regularizer samples. Code, layers and tensors cannot.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..core import BadRequest
from ..wire.packing import pack

_ABSENT = object()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_INTERNAL = frozenset({"_compiled_call_impl"})
"""Attributes that torch sets: they do not change the result."""


class Watch:
    """The attributes of a network now, to detect later what nodes have set.

    Args:
        network: torch module, held weakly.
    """

    def __init__(self, network: Any) -> None:
        # Weak, since the network holds this object: an unused network with weights should be freed at once.
        self._modules = [(name, weakref.ref(module), _attributes(module)) for name, module in network.named_modules()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return self

    def changes(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return what was set since this object was made.

        Returns:
            Packed plain values by module and attribute, and the names of changes that cannot be sent.
        """
        plain: dict[str, dict[str, Any]] = {}
        other: list[str] = []
        for name, alive, (attributes, children, hooks) in self._modules:
            module = alive()
            if module is None:  # removed from the network: its parent's children differ
                continue
            now = module.__dict__
            for key, value in now.items():
                if attributes.get(key, _ABSENT) is not value and key not in _ignored(name):
                    _sort(name, key, attributes.get(key, _ABSENT), value, plain, other)
            removed = [key for key in attributes if key not in now]
            if removed or children != _children(module) or hooks != _hooks(module):
                other.append(".".join(filter(None, [name, *removed[:1]])) or type(module).__name__)
        return plain, other


def _sort(module: str, key: str, before: Any, value: Any, plain: dict[str, dict[str, Any]], other: list[str]) -> None:
    packed = _packed(value)
    if packed is _ABSENT:
        other.append(f"{module}.{key}".lstrip("."))
    elif type(before) is not type(value) or _packed(before) != packed:
        plain.setdefault(module, {})[key] = packed


def _packed(value: Any) -> Any:
    """Return plain data packed for sending; ``_ABSENT`` for anything else."""
    tensors: list[Any] = []
    try:
        packed = pack(value, tensors)
    except BadRequest:
        return _ABSENT
    return _ABSENT if tensors else packed


def _attributes(module: Any) -> tuple[dict[str, Any], list[tuple[str, int]], list[int]]:
    return dict(module.__dict__), _children(module), _hooks(module)


def _children(module: Any) -> list[tuple[str, int]]:
    """Return the name and id of each child; a compiled layer counts as the layer itself."""
    return [(name, id(getattr(child, "_orig_mod", child))) for name, child in module._modules.items()]


def _hooks(module: Any) -> list[int]:
    return [len(module.__dict__[name]) for name in _HOOKS]


def _ignored(module: str) -> frozenset[str]:
    return _INTERNAL if module else _INTERNAL | _of_patchers()


@functools.cache
def _of_patchers() -> frozenset[str]:
    """Return the attributes that ComfyUI's own patcher sets on a model; read from its source, as versions differ."""
    source = inspect.getsource(importlib.import_module("comfy.model_patcher"))
    return frozenset(re.findall(r"\.model\.(\w+)\s*=[^=]", source))


@contextmanager
def attributes_set(network: Any, new: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Set attributes on layers for the time of a ``with`` block.

    Args:
        network: torch module.
        new: values by layer and attribute.

    Raises:
        BadRequest: there is no such layer, or a name is not a valid attribute name.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, values in new.items():
            for key, value in values.items():
                try:
                    attributes = network.get_submodule(name).__dict__
                except AttributeError as error:
                    raise BadRequest(f"attribute {key!r} of {name!r}: there is no such layer") from error
                if not key.isidentifier() or key.startswith("__"):
                    raise BadRequest(f"{key!r} is not a valid attribute name")
                before.append((attributes, key, attributes.get(key, _ABSENT)))
                attributes[key] = value
        yield
    finally:
        for attributes, key, value in reversed(before):
            if value is _ABSENT:
                attributes.pop(key, None)
            else:
                attributes[key] = value
