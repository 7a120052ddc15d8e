"""The backend that users run: ComfyUI's own ``comfy.sd`` in a worker, so results equal ComfyUI's bit for bit.

The worker runs under ComfyUI's interpreter, with ComfyUI's folder first on ``sys.path``. Every family that this
ComfyUI detects is served; there is no list of families here.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comfyui.attributes import attributes_set
from ..comfyui.meta import joined
from ..comfyui.patches import decode_set
from ..core import BadRequest, ConfigError, ModelKind, ModelLoadError, OutOfMemory
from ..wire.messages import ClipEncode, LoadSpec, PatchUse, Tiling
from .base import Step

if TYPE_CHECKING:
    import torch

PatchOf = Callable[[str], "tuple[Any, list[ComfyText]]"]
"""The patches of a set, by its name, and the models whose weights it names."""

_MOST_CLONES = 8
"""Patched clones kept per model: each keeps its patches, and coming back to one need not copy them again."""


class ComfyBackend:
    """ComfyUI in this process.

    Args:
        root: ComfyUI's folder.
        device: what the worker is for; ``cpu`` keeps ComfyUI off the GPU.
        flags: ComfyUI's own command-line flags.
    """

    name = "comfy"

    def __init__(self, root: Path, device: str, flags: Sequence[str]) -> None:
        if not (root / "comfy" / "sd.py").is_file():
            raise ConfigError(f"{str(root)!r} is not ComfyUI: it has no comfy/sd.py", "Set comfyui_path")
        sys.path.insert(0, str(root))
        _parse_flags(_with_cpu(device, flags))
        self.sd = importlib.import_module("comfy.sd")
        self.utils = importlib.import_module("comfy.utils")
        self.memory = importlib.import_module("comfy.model_management")

    def versions(self) -> dict[str, str]:
        """ComfyUI's and torch's: both decide bits."""
        import torch

        return {"comfyui": importlib.import_module("comfyui_version").__version__, "torch": str(torch.__version__)}

    def devices(self) -> list[str]:
        """What ComfyUI would compute on."""
        return [str(self.memory.get_torch_device())]

    def load(self, spec: LoadSpec) -> ComfyVae | ComfyText:
        """Load a VAE or text encoders as ComfyUI's loader nodes do.

        Raises:
            ModelLoadError: not a model that this ComfyUI knows, or truncated.
            OutOfMemory: no room on the device.
        """
        try:
            model = self._vae(spec) if spec.kind == ModelKind.VAE else self._clip(spec)
        except self.memory.OOM_EXCEPTION as error:
            raise OutOfMemory(f"no room for {spec.key}") from error
        except Exception as error:
            # ComfyUI raises whatever its detection stumbles over; the caller needs to know the file.
            raise ModelLoadError(f"{', '.join(spec.files)}: {type(error).__name__}: {error}") from error
        return model

    def _vae(self, spec: LoadSpec) -> ComfyVae:
        if spec.checkpoint:
            vae = self._from_checkpoint(spec)[2]
        else:
            files = [Path(file) for file in spec.files]
            weights = joined([self.utils.load_torch_file(str(file)) for file in files], files)
            vae = self.sd.VAE(sd=weights, device=_device(spec.device), dtype=_dtype(spec.precision))
        if vae is None or vae.first_stage_model is None:
            raise ModelLoadError("no VAE was found in it")
        return ComfyVae(self, vae)

    def _clip(self, spec: LoadSpec) -> ComfyText:
        if spec.checkpoint:
            clip = self._from_checkpoint(spec)[1]
        else:
            family = getattr(self.sd.CLIPType, spec.type.upper(), self.sd.CLIPType.STABLE_DIFFUSION)
            clip = self.sd.load_clip(list(spec.files), clip_type=family, model_options=self._options(spec))
        if clip is None:
            raise ModelLoadError("no text encoder was found in it")
        return ComfyText(self, clip)

    def _from_checkpoint(self, spec: LoadSpec) -> Any:
        return self.sd.load_checkpoint_guess_config(
            spec.files[0],
            output_vae=spec.kind == ModelKind.VAE,
            output_clip=spec.kind == ModelKind.CLIP,
            output_model=False,
            te_model_options=self._options(spec),
        )

    def _options(self, spec: LoadSpec) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if (device := _device(spec.device)) is not None:
            options.update(load_device=device, offload_device=device)
        if (dtype := _dtype(spec.precision)) is not None:
            options["dtype"] = dtype
        return options

    @contextmanager
    def progress(self, step: Step) -> Iterator[None]:
        """ComfyUI's progress bars, which its tiled code drives, become our steps; a step may cancel."""
        self.utils.set_progress_bar_global_hook(lambda value, total, *rest, **more: step(int(value), int(total)))
        try:
            yield
        except self.memory.OOM_EXCEPTION as error:
            raise OutOfMemory(f"no room on the device: {error}", "Use smaller tiles, or free memory") from error
        finally:
            self.utils.set_progress_bar_global_hook(None)


class ComfyVae:
    """A ``comfy.sd.VAE``; the batch is cut into single samples, since the cut decides bits."""

    def __init__(self, backend: ComfyBackend, vae: Any) -> None:
        self._backend = backend
        self._vae = vae
        # A decoder that mixes the batch in time (SVD) takes it as the frames of one sample.
        names = [name for name, _ in vae.first_stage_model.named_modules()]
        self._mixes_frames = any("time_stack" in name or "time_mix" in name for name in names)
        self.nbytes = int(vae.patcher.model_size())

    def properties(self) -> dict[str, Any]:
        """Plain facts, as ``VaeModel`` asks; ratios along the sides."""
        vae = self._vae
        return {
            "latent_channels": int(vae.latent_channels),
            "downscale_ratio": vae.spacial_compression_encode(),
            "upscale_ratio": vae.spacial_compression_decode(),
            "dtype": str(vae.vae_dtype).removeprefix("torch."),
            "device": str(vae.device),
            "class": type(vae.first_stage_model).__name__,
        }

    def encode(
        self,
        pixels: torch.Tensor,
        tiling: Tiling | None,
        step: Step,
        raw: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, list[str]]:
        """As ``VAE.encode`` and ``encode_tiled``; ``raw`` is the network alone; ``attributes`` are set on layers."""
        with attributes_set(self._vae.first_stage_model, attributes or {}):
            return self._encode(pixels, tiling, step, raw)

    def _encode(
        self, pixels: torch.Tensor, tiling: Tiling | None, step: Step, raw: bool
    ) -> tuple[torch.Tensor, list[str]]:
        vae = self._vae
        # Frames of a video arrive as a batch; they are one sample.
        video = vae.latent_dim == 3 and pixels.ndim < 5 and not vae.not_video
        if raw:
            return self._raw(vae.first_stage_model.encode, pixels, step)
        if tiling is not None:
            return self._run(lambda part: vae.encode_tiled(part, **tiling.given()), [pixels], step)
        return self._run(vae.encode, [pixels] if video else _singles(pixels), step)

    def decode(
        self,
        latents: torch.Tensor,
        tiling: Tiling | None,
        step: Step,
        raw: bool = False,
        options: dict[str, Any] | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, list[str]]:
        """As ``VAE.decode`` and ``decode_tiled``; ``raw`` is the network alone; ``attributes`` are set on layers."""
        with attributes_set(self._vae.first_stage_model, attributes or {}):
            return self._decode(latents, tiling, step, raw, options)

    def _decode(
        self,
        latents: torch.Tensor,
        tiling: Tiling | None,
        step: Step,
        raw: bool,
        options: dict[str, Any] | None,
    ) -> tuple[torch.Tensor, list[str]]:
        vae = self._vae
        if raw:
            return self._raw(vae.first_stage_model.decode, latents, step)
        if tiling is not None:
            return self._run(lambda part: vae.decode_tiled(part, **tiling.given()), [latents], step)
        parts = [latents] if self._mixes_frames else _singles(latents)
        return self._run(lambda part: vae.decode(part, **_options_of(options)), parts, step)

    def _run(
        self, work: Callable[[Any], Any], parts: Sequence[torch.Tensor], step: Step
    ) -> tuple[torch.Tensor, list[str]]:
        import torch

        notes: list[str] = []
        results: list[torch.Tensor] = []
        with self._backend.progress(step), self._watch_tiling(notes):
            for number, part in enumerate(parts):
                step(number, len(parts))
                results.append(work(part).to("cpu", torch.float32))
        return _joined(results), notes

    def _raw(self, network: Callable[[Any], Any], tensor: torch.Tensor, step: Step) -> tuple[torch.Tensor, list[str]]:
        vae = self._vae
        self._backend.memory.load_models_gpu([vae.patcher], force_full_load=True)
        return self._run(lambda part: network(part.to(vae.vae_dtype).to(vae.device)), [tensor], step)

    @contextmanager
    def _watch_tiling(self, notes: list[str]) -> Iterator[None]:
        """Note when ComfyUI falls back to tiles by itself, for lack of memory."""
        logger = importlib.import_module("logging").getLogger()

        class Watch(importlib.import_module("logging").Filter):  # type: ignore[misc]
            def filter(self, record: Any) -> bool:
                if "Ran out of memory when regular VAE" in record.getMessage():
                    notes.append("computed in tiles: not enough memory for one pass")
                return True

        watch = Watch()
        logger.addFilter(watch)
        try:
            yield
        finally:
            logger.removeFilter(watch)


class ComfyText:
    """A ``comfy.sd.CLIP``, with its patched clones. Weights are fully loaded: a partial load changes bits."""

    def __init__(self, backend: ComfyBackend, clip: Any) -> None:
        self._backend = backend
        self._clip = clip
        self._clones: OrderedDict[tuple[PatchUse, ...], tuple[Any, list[ComfyText]]] = OrderedDict()
        """By their patches: the clones, and whose weights they hold."""
        self.nbytes = int(clip.patcher.model_size())

    def properties(self) -> dict[str, Any]:
        """Plain facts, as ``TextModel`` asks."""
        model = self._clip.cond_stage_model
        return {
            "encoders": [name for name, part in model.named_children() if hasattr(part, "encode_token_weights")],
            "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in model.dtypes)),
            "device": str(self._clip.patcher.load_device),
            "class": type(model).__name__,
        }

    def tokenize(self, text: str) -> Any:
        """With ComfyUI's tokenizer; embeddings in the text are not looked up here."""
        return self._clip.tokenize(text)

    def weights(self) -> dict[str, tuple[torch.Tensor, Any]]:
        """Every weight as the file has it, unpatched and on the CPU, with ComfyUI's conversion of quantized ones."""
        found = self._clip.patcher.get_key_patches()
        # Not the parameters themselves: those move to the GPU, and stay there as long as somebody holds them.
        return {key: (entries[0][0].detach().to("cpu"), entries[0][1]) for key, entries in found.items()}

    def forget(self, gone: Sequence[Any]) -> None:
        """Models are unloaded: drop the clones that hold weights of theirs."""
        for stack in [stack for stack, (_, lenders) in self._clones.items() if any(one in gone for one in lenders)]:
            del self._clones[stack]

    def encode(self, tokens: Any, layer: int | None, unprojected: bool) -> dict[str, torch.Tensor]:
        """Encode without patches; only tensors of the result."""
        call = ClipEncode(None, layer=layer, unprojected=unprojected)  # type: ignore[arg-type]
        found = self.encode_packed(call, tokens, lambda name: ([], []))
        return {name: value for name, value in found.items() if hasattr(value, "untyped_storage")}

    def encode_packed(self, call: ClipEncode, tokens: Any, patch_of: PatchOf) -> dict[str, Any]:
        """Encode ComfyUI's own tokens with patches and hooks, as a whole or one encoder alone."""
        with self._backend.progress(lambda done, total: None):
            clip = self._patched(call.patches, patch_of)
            model = clip.cond_stage_model
            model.reset_clip_options()
            if call.part:
                return {"out": tuple(self._part(clip, call, tokens, patch_of))}
            options = {**call.options, **({} if call.layer is None else {"layer": call.layer})}
            model.set_clip_options({**options, **({"projected_pooled": False} if call.unprojected else {})})
            out = self._loaded(clip, call.hooks, patch_of, lambda: model.encode_token_weights(tokens))
        extra = out[2] if len(out) > 2 else {}
        return {"cond": out[0], "pooled_output": out[1], **extra}

    def _part(self, clip: Any, call: ClipEncode, tokens: Any, patch_of: PatchOf) -> Any:
        part = getattr(clip.cond_stage_model, call.part, None)
        if part is None or not hasattr(part, "encode_token_weights"):
            raise BadRequest(f"there is no text encoder {call.part!r}", f"Use one of {self.properties()['encoders']}")
        part.reset_clip_options()
        part.set_clip_options(dict(call.options))
        return self._loaded(clip, call.hooks, patch_of, lambda: part.encode_token_weights(tokens))

    def _loaded(self, clip: Any, hooks: list[PatchUse], patch_of: PatchOf, work: Callable[[], Any]) -> Any:
        """Run with every weight on its device, patched, and hooks on top."""
        self._backend.memory.load_models_gpu([clip.patcher], force_full_load=True)
        if not hooks:
            return work()
        module = importlib.import_module("comfy.hooks")
        # A clone for this call: on the patcher itself hooks would gather, and all weights be patched anew.
        hooked, group = clip.patcher.clone(), module.HookGroup()
        for use in hooks:
            hook = module.WeightHook()
            hooked.add_hook_patches(hook, _own(*patch_of(use.name)), use.strength_patch, use.strength_model)
            group.add(hook)
        try:
            hooked.patch_hooks(group)
            return work()
        finally:
            hooked.patch_hooks(None)

    def _patched(self, patches: list[PatchUse], patch_of: PatchOf) -> Any:
        """A clone with these patches: the same one for the same stack, or its weights would be patched anew."""
        if not patches:
            return self._clip
        stack = tuple(patches)
        if stack not in self._clones:
            clip, lenders = self._clip.clone(), []
            for use in patches:
                packed, models = patch_of(use.name)
                clip.add_patches(_own(packed, models), use.strength_patch, use.strength_model)
                lenders += [model for model in models if model is not self]
            self._clones[stack] = clip, lenders
            if len(self._clones) > _MOST_CLONES:
                self._clones.popitem(last=False)
        self._clones.move_to_end(stack)
        return self._clones[stack][0]


def _parse_flags(flags: Sequence[str]) -> None:
    """Have ComfyUI read ``flags`` instead of this process' command line."""
    before, sys.argv = sys.argv, ["comfyui", *flags]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    except SystemExit as error:
        raise ConfigError(f"ComfyUI does not take {' '.join(flags)!r}", "Mend comfyui_args") from error
    finally:
        sys.argv = before


def _with_cpu(device: str, flags: Sequence[str]) -> list[str]:
    """ComfyUI refuses to start without a GPU unless it is told so."""
    import torch

    gpu = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    mps = torch.backends.mps.is_available()
    return [*flags, *(["--cpu"] if device == "cpu" or not (gpu or mps) else [])]


def _singles(batch: torch.Tensor) -> list[torch.Tensor]:
    return [batch[number : number + 1] for number in range(batch.shape[0])]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One batch of its samples, in memory as ComfyUI's own.

    Pixels lie there channels first, and whoever encodes them again gets other bits from another layout.
    """
    import torch

    if len(parts) == 1:
        return parts[0]
    strides = parts[0].stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    joined = torch.cat([part.permute(order) for part in parts], dim=order.index(0))
    return joined.permute([order.index(dim) for dim in range(len(order))])


def _device(name: str) -> Any:
    import torch

    return None if name == "auto" else torch.device(name)


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)


def _options_of(options: dict[str, Any] | None) -> dict[str, Any]:
    return {"vae_options": options} if options else {}


def _own(patches: Any, models: Sequence[ComfyText]) -> dict[Any, Any]:
    """A patch set with tensors of its own: those that came lie in shared memory that goes back after the call."""
    weights: dict[int, dict[str, Any]] = {}

    def weight_of(index: int, key: str) -> Any:
        if index not in weights:
            weights[index] = models[index].weights()
        return weights[index][key]

    return decode_set(_copied(patches), weight_of)


def _copied(value: Any) -> Any:
    if hasattr(value, "untyped_storage"):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
