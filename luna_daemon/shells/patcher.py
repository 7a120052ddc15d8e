"""The patcher of a shell: ComfyUI's ``ModelPatcher`` with size 0, whose loads do nothing.

ComfyUI may load, unload, clone and patch a shell like any other model. Its own ``ModelPatcher`` would crash on ``meta``
tensors, and evict the diffusion model to make room for weights that are not there. Once the network has weights
(``Backing.local``), every method is ComfyUI's again.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from ..comfyui.patches import PatchSet, append, group, matches
from ..wire.messages import PatchUse
from .backing import Backing
from .host import comfy

_HARMLESS_OBJECTS = frozenset({"manual_cast_dtype"})
"""Object patches that newer ComfyUI sets on every text encoder by itself."""


class PatcherShell:
    """Methods that override those of ``ModelPatcher``, the other base class of ``DaemonPatcher``."""

    _stock: Any
    model: Any
    object_patches: dict[str, Any]
    hook_patches: dict[Any, Any]
    current_hooks: Any
    forced_hooks: Any
    patches: dict[str, list[tuple[Any, ...]]]

    @property
    def luna(self) -> Backing:
        """The backing that computes the shell's calls."""
        backing: Backing = self.model.luna
        return backing

    @property
    def load_device(self) -> Any:
        """The CPU as long as there are no weights to load: for a GPU, ComfyUI would free memory first."""
        import torch

        return self.__dict__["load_device"] if self.luna.local else torch.device("cpu")

    @load_device.setter
    def load_device(self, device: Any) -> None:
        self.__dict__["load_device"] = device

    def clone(self, *args: Any, **options: Any) -> Any:
        """Return a clone with the same patches and the same device for the weights."""
        other = self._stock.clone(self, *args, **options)
        other.__dict__["load_device"] = self.__dict__["load_device"]
        other.luna_sets = list(self.sets)
        return other

    # --- size and loading ---

    def model_size(self) -> int:
        """Return the bytes of the weights; 0 without weights, so that ComfyUI evicts nothing for a shell."""
        return int(self._stock.model_size(self)) if self.luna.local else 0

    def loaded_size(self) -> int:
        """Return the bytes of the weights on the device; 0 without weights."""
        return int(self._stock.loaded_size(self)) if self.luna.local else 0

    def lowvram_patch_counter(self) -> int:
        """Return the number of weights that are patched at each use; 0 without weights."""
        return int(self._stock.lowvram_patch_counter(self)) if self.luna.local else 0

    def get_ram_usage(self) -> int:
        """Return the bytes in RAM, for ComfyUI's cache under memory pressure."""
        return self.model_size()

    def load(self, *args: Any, **options: Any) -> Any:
        """Load the weights; without weights, only become the backing's current patcher."""
        if self.luna.local:
            return self._stock.load(self, *args, **options)
        self.luna.current = self
        self._stock.apply_hooks(self, self.forced_hooks, force_apply=True)
        return None

    def patch_model(self, *args: Any, **options: Any) -> Any:
        """Patch the network; without weights, only set the objects that nodes put into it."""
        if self.luna.local:
            return self._stock.patch_model(self, *args, **options)
        # Such an object may be the code that calls the encoders.
        options.pop("load_weights", None)
        self._stock.patch_model(self, *args[:2], load_weights=False)
        self.load()
        return self.model

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        """Undo ``patch_model``."""
        if self.luna.local:
            return self._stock.unpatch_model(self, device_to, unpatch_weights)
        return self._stock.unpatch_model(self, None, unpatch_weights=False)

    def partially_load(self, device_to: Any, extra_memory: Any = 0, force_patch_weights: bool = False) -> Any:
        """Load as much as fits, and return the bytes loaded; 0 without weights."""
        if not self.luna.local and force_patch_weights:
            # A node is about to read patched weights: CLIPSave, LoRA extraction.
            self.luna.current = self
            self.luna.materialise("a node reads patched weights", load=False)
        if self.luna.local:
            self._correct_device()
            return self._stock.partially_load(
                self, self.load_device, extra_memory, force_patch_weights=force_patch_weights
            )
        self.unpatch_model()
        self.patch_model()
        return 0

    def _correct_device(self) -> None:
        """Set the device in ComfyUI's list of loaded models, which recorded the CPU for the shell."""
        for entry in comfy("model_management").current_loaded_models:
            if entry.model is self:
                entry.device = self.load_device

    def partially_unload(self, *args: Any, **options: Any) -> Any:
        """Free memory of the device; return the bytes freed."""
        return self._stock.partially_unload(self, *args, **options) if self.luna.local else 0

    # --- hooks: recorded, and sent with each call ---

    def patch_hooks(self, hooks: Any) -> None:
        """Apply hooks to the weights; without weights, record the hooks for the next call."""
        if self.luna.local:
            self._stock.patch_hooks(self, hooks)
        else:
            self.current_hooks = hooks

    def unpatch_hooks(self, *args: Any, **options: Any) -> None:
        """Undo ``patch_hooks``."""
        if self.luna.local:
            self._stock.unpatch_hooks(self, *args, **options)
        else:
            self.current_hooks = None

    # --- patches ---

    @property
    def sets(self) -> list[PatchSet]:
        """The patches, one set per ``add_patches`` call; grouped again if a node edited ``patches`` directly."""
        sets: list[PatchSet] = self.__dict__.setdefault("luna_sets", [])
        if not matches(sets, self.patches):
            sets[:] = group(self.patches)
        return sets

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> list[Any]:
        """Add weight patches; return the keys that the network has."""
        accepted: list[Any] = self._stock.add_patches(self, patches, strength_patch, strength_model)
        known = set(accepted)
        added = {key: value for key, value in patches.items() if key in known}
        if added:
            sets = self.__dict__.setdefault("luna_sets", [])
            append(sets, PatchSet(added, strength_patch, strength_model, single=len(added) == 1))
        return accepted

    def uses(self) -> tuple[list[PatchUse], list[PatchUse], list[PatchSet]]:
        """Return what a request names: patches, hook patches at their present strengths, and the sets of both."""
        sets = list(self.sets)
        patches = [patch_set.use() for patch_set in sets]
        hooks: list[PatchUse] = []
        for hook in getattr(self.current_hooks, "hooks", ()):
            strength = 1.0 if math.isclose(hook.strength, 1.0) else float(hook.strength)
            for patch_set in self._hook_sets(hook.hook_ref):
                hooks.append(patch_set.use(strength))
                sets.append(patch_set)
        return patches, hooks, sets

    def _hook_sets(self, hook_ref: Any) -> list[PatchSet]:
        """Return a hook's patches as sets; cached, since a schedule needs them at each keyframe."""
        patches = self.hook_patches.get(hook_ref, {})
        kept: dict[Any, list[PatchSet]] = self.__dict__.setdefault("luna_hook_sets", {})
        if hook_ref not in kept or not matches(kept[hook_ref], patches):
            kept[hook_ref] = group(patches)
        return kept[hook_ref]

    def get_key_patches(self, *args: Any, **options: Any) -> dict[str, list[Any]]:
        """Return weights and their patches by key; without weights, a weight is loaded when its values are read."""
        by_key: dict[str, list[Any]] = self._stock.get_key_patches(self, *args, **options)
        if self.luna.local:
            return by_key
        return {
            key: [(_weight_ref(entries[0][0], self.luna, key), entries[0][1]), *entries[1:]]
            for key, entries in by_key.items()
        }

    def model_state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the network's state dict; without weights, a weight is loaded when its values are read."""
        state = self._stock.model_state_dict(self, *args, **options)
        if self.luna.local:
            return state
        return {key: _weight_ref(value, self.luna, key) for key, value in state.items()}


def python_inside(patcher: Any) -> list[str]:
    """Return the names of objects that nodes put into the network: code that cannot be sent."""
    return [name for name in patcher.object_patches if name not in _HARMLESS_OBJECTS]


@functools.cache
def patcher_class() -> Any:
    """Return the class ``DaemonPatcher``, derived from the running ComfyUI's ``ModelPatcher``."""
    stock = comfy("model_patcher").ModelPatcher
    return type("DaemonPatcher", (PatcherShell, stock), {"_stock": stock})


@functools.cache
def _ref_class() -> Any:
    """Return the class of ``meta`` tensors that stand for a weight and load it for the first computation."""
    import torch

    # A meta tensor answers these without the weight.
    kind: Any = torch.Tensor
    attributes = {getattr(kind, name).__get__ for name in ("shape", "dtype", "device", "is_meta", "ndim", "layout")}
    attributes |= {kind.size, kind.dim, kind.numel, kind.nelement, kind.element_size, kind.is_floating_point}

    class WeightRef(torch.Tensor):
        """Stands for the weight ``luna_key`` of the model behind ``luna``."""

        luna: Backing
        luna_key: str

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in attributes:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            values = [_real(value) for value in args]
            return func(*values, **{name: _real(value) for name, value in (kwargs or {}).items()})

    return WeightRef


def _real(value: Any) -> Any:
    """Return the weight that a reference stands for; any other value as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_real(item) for item in value)
    if not isinstance(value, _ref_class()):
        return value
    backing: Backing = value.luna
    return backing.weight(value.luna_key)


def _weight_ref(weight: Any, backing: Backing, key: str) -> Any:
    import torch

    if not weight.is_meta:
        return weight
    ref: Any = torch.Tensor._make_subclass(_ref_class(), weight.detach())
    ref.luna, ref.luna_key = backing, key
    return ref
