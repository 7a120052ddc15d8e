"""A stand-in for the daemon that answers with ComfyUI in this process, and files of any shapes without weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from luna_daemon.client import Answer
from luna_daemon.comfyui.attributes import attributes_set
from luna_daemon.comfyui.patches import decode_set
from luna_daemon.core import PatchMissing
from luna_daemon.wire import messages as m
from luna_daemon.wire.packing import pack, unpack

ROOT = Path(__file__).resolve().parents[2]
DEMO_VAE = ROOT / "demo" / "model" / "luna_demo_vae.safetensors"


class InProcess:
    """Answers as the daemon does, and remembers what it was asked; ``error`` is raised instead while it is set."""

    def __init__(self, comfy: SimpleNamespace, vae: Any = None, clip: Any = None) -> None:
        self.comfy, self.vae, self.clip = comfy, vae, clip
        self.calls: list[Any] = []
        self.sets: dict[str, Any] = {}
        self.error: Exception | None = None
        self.progress: list[m.Progress] = []
        self.fallbacks = self.told_fallbacks = self.materialised = self.untold_materialised = 0

    def call(
        self, call: Any, tensors: Sequence[Any] = (), *, on_progress: Any = None, is_cancelled: Any = None
    ) -> Answer:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        for progress in self.progress:
            on_progress(progress)
        with self.comfy.torch.inference_mode():
            return getattr(self, type(call).__name__.lower())(call, [tensor.cpu() for tensor in tensors])

    def asked(self, kind: type) -> list[Any]:
        return [call for call in self.calls if isinstance(call, kind)]

    def count_materialised(self) -> None:
        self.untold_materialised += 1
        self.report_pending()

    def report_pending(self) -> None:
        if self.error is None:
            self.told_fallbacks, self.fallbacks = self.told_fallbacks + self.fallbacks, 0
            self.materialised, self.untold_materialised = self.materialised + self.untold_materialised, 0

    def vaeencode(self, call: m.VaeEncode, tensors: list[Any]) -> Answer:
        return self._vae("encode", call, tensors[0])

    def vaedecode(self, call: m.VaeDecode, tensors: list[Any]) -> Answer:
        return self._vae("decode", call, tensors[0])

    def _vae(self, name: str, call: Any, tensor: Any) -> Answer:
        with attributes_set(self.vae.first_stage_model, unpack(call.attributes, [])):
            return self._vae_as_it_is(name, call, tensor)

    def _vae_as_it_is(self, name: str, call: Any, tensor: Any) -> Answer:
        if call.raw:
            self.comfy.management.load_models_gpu([self.vae.patcher])
            found = getattr(self.vae.first_stage_model, name)(tensor.to(self.vae.vae_dtype)).float()
        elif call.tiling is not None:
            given = {key: getattr(call.tiling, key) for key in call.tiling.__struct_fields__}
            work = getattr(self.vae, f"{name}_tiled")
            found = work(tensor, **{key: value for key, value in given.items() if value is not None})
        else:
            parts = [getattr(self.vae, name)(tensor[i : i + 1]) for i in range(tensor.shape[0])]
            found = self.comfy.torch.cat(parts)
        return Answer(None, [found.clone()], [])

    def patchput(self, call: m.PatchPut, tensors: list[Any]) -> Answer:
        self.sets[call.name] = (call.packed, [tensor.clone() for tensor in tensors])
        return Answer(None, [], [])

    def _patches(self, name: str) -> Any:
        packed, tensors = self.sets[name]
        weights = self.clip.patcher.get_key_patches()
        return decode_set(unpack(packed, tensors), lambda index, key: weights[key][0])

    def clipencode(self, call: m.ClipEncode, tensors: list[Any]) -> Answer:
        if any(use.name not in self.sets for use in [*call.patches, *call.hooks]):
            raise PatchMissing("not kept")
        clip, group = self.clip.clone(), self.comfy.hooks.HookGroup()
        for use in call.patches:
            clip.add_patches(self._patches(use.name), use.strength_patch, use.strength_model)
        for use in call.hooks:
            hook = self.comfy.hooks.WeightHook()
            clip.patcher.add_hook_patches(hook, self._patches(use.name), use.strength_patch, use.strength_model)
            group.add(hook)
        model = clip.cond_stage_model
        model.reset_clip_options()
        target = getattr(model, call.part) if call.part else model
        options = dict(call.options) | ({} if call.layer is None else {"layer": call.layer})
        target.set_clip_options(options | ({"projected_pooled": False} if call.unprojected else {}))
        self.comfy.management.load_models_gpu([clip.patcher])
        clip.patcher.patch_hooks(group if call.hooks else None)
        out = target.encode_token_weights(unpack(call.packed, tensors))
        clip.patcher.patch_hooks(None)
        clip.patcher.detach()
        found = {"out": tuple(out)} if call.part else {"cond": out[0], "pooled_output": out[1]}
        if not call.part and len(out) > 2:
            found |= out[2]
        results: list[Any] = []
        return Answer({"packed": pack(found, results)}, [tensor.clone() for tensor in results], [])


def empty_file(path: Path, state: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of these shapes whose bytes are all zero: a hole that takes no disk."""
    names = {"torch.float32": ("F32", 4), "torch.float16": ("F16", 2), "torch.bfloat16": ("BF16", 2)}
    names |= {"torch.int64": ("I64", 8), "torch.bool": ("BOOL", 1), "torch.complex64": ("F32", 8)}
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in state.items():
        dtype, item = names[str(tensor.dtype)]
        start, end = end, end + tensor.numel() * item
        table[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path
