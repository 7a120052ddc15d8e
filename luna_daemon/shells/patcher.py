"""The patcher of a shell: ComfyUI's own, whose loads do nothing and whose size is 0.

ComfyUI may load, unload, clone and patch it like any other; it would crash on ``meta`` tensors, and evict the diffusion
model to make room for weights that are not there. Once the network has true weights (``Backing.local``), every method
is ComfyUI's again.
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
    """What differs from ``ModelPatcher``, which comes after it in the class' bases."""

    _stock: Any
    model: Any
    object_patches: dict[str, Any]
    hook_patches: dict[Any, Any]
    current_hooks: Any
    forced_hooks: Any
    patches: dict[str, list[tuple[Any, ...]]]

    @property
    def luna(self) -> Backing:
        """What computes for the shell."""
        backing: Backing = self.model.luna
        return backing

    @property
    def load_device(self) -> Any:
        """The CPU as long as there is nothing to load: on a GPU ComfyUI would make room first."""
        import torch

        return self.__dict__["load_device"] if self.luna.local else torch.device("cpu")

    @load_device.setter
    def load_device(self, device: Any) -> None:
        self.__dict__["load_device"] = device

    def clone(self, *args: Any, **options: Any) -> Any:
        """A clone with the same patches, which remembers the device that the weights belong on."""
        other = self._stock.clone(self, *args, **options)
        other.__dict__["load_device"] = self.__dict__["load_device"]
        other.luna_sets = list(self.sets)
        return other

    # --- size and loading ---

    def model_size(self) -> int:
        """Bytes of the weights; 0 as long as there are none, so that nothing is evicted for them."""
        return int(self._stock.model_size(self)) if self.luna.local else 0

    def loaded_size(self) -> int:
        """Bytes of the weights on the device; 0 as long as there are none."""
        return int(self._stock.loaded_size(self)) if self.luna.local else 0

    def lowvram_patch_counter(self) -> int:
        """Weights that are patched when they are used; 0 as long as there are none."""
        return int(self._stock.lowvram_patch_counter(self)) if self.luna.local else 0

    def get_ram_usage(self) -> int:
        """Bytes in RAM, for ComfyUI's cache under memory pressure."""
        return self.model_size()

    def load(self, *args: Any, **options: Any) -> Any:
        """Load the weights; without weights, note whose patches and hooks hold now."""
        if self.luna.local:
            return self._stock.load(self, *args, **options)
        self.luna.current = self
        self._stock.apply_hooks(self, self.forced_hooks, force_apply=True)
        return None

    def patch_model(self, *args: Any, **options: Any) -> Any:
        """Patch the network; without weights, only put in the objects of nodes."""
        if self.luna.local:
            return self._stock.patch_model(self, *args, **options)
        # Objects that nodes put into the network are put there: it may be their code that calls the encoders.
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
        """Load as much as fits; without weights, nothing."""
        if not self.luna.local and force_patch_weights:
            # Somebody is about to read patched weights: CLIPSave, LoRA extraction.
            self.luna.current = self
            self.luna.materialise("patched weights are asked for", load=False)
        if self.luna.local:
            self._correct_device()
            return self._stock.partially_load(
                self, self.load_device, extra_memory, force_patch_weights=force_patch_weights
            )
        self.unpatch_model()
        self.patch_model()
        return 0

    def _correct_device(self) -> None:
        """ComfyUI noted the CPU for a shell; with weights it is the device that they belong on."""
        for entry in comfy("model_management").current_loaded_models:
            if entry.model is self:
                entry.device = self.load_device

    def partially_unload(self, *args: Any, **options: Any) -> Any:
        """Free memory of the device; returns the bytes freed."""
        return self._stock.partially_unload(self, *args, **options) if self.luna.local else 0

    # --- hooks: remembered, and sent with each call ---

    def patch_hooks(self, hooks: Any) -> None:
        """Apply hooks to the weights; without weights, remember them for the next call."""
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
        """The patches as they were added, one set per call; grouped anew if a node edited ``patches`` itself."""
        sets: list[PatchSet] = self.__dict__.setdefault("luna_sets", [])
        if not matches(sets, self.patches):
            sets[:] = group(self.patches)
        return sets

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> list[Any]:
        """Add weight patches; returns the keys that the network has."""
        accepted: list[Any] = self._stock.add_patches(self, patches, strength_patch, strength_model)
        known = set(accepted)
        taken = {key: value for key, value in patches.items() if key in known}
        if taken:
            sets = self.__dict__.setdefault("luna_sets", [])
            append(sets, PatchSet(taken, strength_patch, strength_model, single=len(taken) == 1))
        return accepted

    def uses(self) -> tuple[list[PatchUse], list[PatchUse], list[PatchSet]]:
        """What a request names: patches, hook patches with the strengths of this moment, and all their sets."""
        sets = list(self.sets)
        patches = [one.use() for one in sets]
        hooks: list[PatchUse] = []
        for hook in getattr(self.current_hooks, "hooks", ()):
            strength = 1.0 if math.isclose(hook.strength, 1.0) else float(hook.strength)
            for one in self._hook_sets(hook.hook_ref):
                hooks.append(one.use(strength))
                sets.append(one)
        return patches, hooks, sets

    def _hook_sets(self, hook_ref: Any) -> list[PatchSet]:
        """A hook's patches as sets, kept: a schedule asks for them at each keyframe."""
        patches = self.hook_patches.get(hook_ref, {})
        kept: dict[Any, list[PatchSet]] = self.__dict__.setdefault("luna_hook_sets", {})
        if hook_ref not in kept or not matches(kept[hook_ref], patches):
            kept[hook_ref] = group(patches)
        return kept[hook_ref]

    def get_key_patches(self, *args: Any, **options: Any) -> dict[str, list[Any]]:
        """Weights and their patches by key; weights that are not here are fetched when they are read."""
        found: dict[str, list[Any]] = self._stock.get_key_patches(self, *args, **options)
        if self.luna.local:
            return found
        return {
            key: [(_weight_ref(entries[0][0], self.luna, key), entries[0][1]), *entries[1:]]
            for key, entries in found.items()
        }

    def model_state_dict(self, *args: Any, **options: Any) -> Any:
        """The network's state dict; weights that are not here are fetched when they are read."""
        found = self._stock.model_state_dict(self, *args, **options)
        if self.luna.local:
            return found
        return {key: _weight_ref(value, self.luna, key) for key, value in found.items()}


def python_inside(patcher: Any) -> list[str]:
    """Names of objects that nodes put into the network by this patcher: code that cannot be sent."""
    return [name for name in patcher.object_patches if name not in _HARMLESS_OBJECTS]


@functools.cache
def patcher_class() -> Any:
    """``ModelPatcher`` of the running ComfyUI, as a shell has it."""
    stock = comfy("model_patcher").ModelPatcher
    return type("DaemonPatcher", (PatcherShell, stock), {"_stock": stock})


@functools.cache
def _ref_class() -> Any:
    """A ``meta`` tensor that knows whose weight it stands for, and fetches it as soon as somebody computes with it."""
    import torch

    # Of a meta tensor these are known without the weight.
    kind: Any = torch.Tensor
    facts = {getattr(kind, name).__get__ for name in ("shape", "dtype", "device", "is_meta", "ndim", "layout")}
    facts |= {kind.size, kind.dim, kind.numel, kind.nelement, kind.element_size, kind.is_floating_point}

    class WeightRef(torch.Tensor):
        """Stands for ``luna_key`` of the model behind ``luna``."""

        luna: Backing
        luna_key: str

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in facts:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            real = [_true(value) for value in args]
            return func(*real, **{name: _true(value) for name, value in (kwargs or {}).items()})

    return WeightRef


def _true(value: Any) -> Any:
    """The weight that a reference stands for; anything else is itself."""
    if isinstance(value, (list, tuple)):
        return type(value)(_true(item) for item in value)
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
