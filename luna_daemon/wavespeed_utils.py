"""First Block Cache for a local model: a step that hardly differs from the last computed step skips most blocks.

The idea is ParaAttention's and Comfy-WaveSpeed's (chengzeyi): run the first block; if its residual is close to that of
the last computed step, add the other blocks' cached residual instead of running these blocks. This implementation needs
no other pack and keeps the patches of others. It depends on the model, as the model's code shows:

- transformers with ``patches_replace["dit"]``: every block is hooked, around existing patches. Residuals are cached per
  stage ("double_block", "single_block"), so that whatever lies between stages (ControlNet, VACE, audio) is applied in
  every step;
- UNets with ``input_block_patch``: a reused step leaves the forward after the second input block, the first with more
  than one convolution, and the output layer gets that block's output plus the cached residual of the rest;
- other models: ComfyUI's EasyCache or LazyCache, with thresholds of their own.

The cache lies in the options of a sampling run, with an entry per conditioning chunks, shape, context window, and index
among the calls of one sigma (Heun's second evaluation, tiles).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

from .core import BadRequest, logger

__all__ = ["FBCacheInfo", "FBCacheStats", "apply_fb_cache_to_model", "fb_cache_info"]

Method = Literal["blocks", "unet", "wavespeed", "easycache", "lazycache"]

_KEY = "luna_fb_cache"
_KINDS = ("double_block", "single_block", "block")


@dataclass
class FBCacheStats:
    """Number of evaluations of the model over all runs: computed in full, and reused after the first block."""

    computed: int = 0
    reused: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> FBCacheStats:
        return self  # clones of a MODEL count together


@dataclass(frozen=True)
class FBCacheInfo:
    """The cache of a MODEL, and the reason for this choice; ``stats`` counts with "blocks" and "unet" only."""

    method: Method
    reason: str
    stats: FBCacheStats = field(default_factory=FBCacheStats)


@dataclass(frozen=True)
class _Limits:
    threshold: float
    start: float
    end: float
    max_hits: int


def fb_cache_info(model: Any) -> FBCacheInfo | None:
    """Return the cache that ``apply_fb_cache_to_model`` gave this MODEL; ``None`` for a MODEL without a cache."""
    info = model.model_options.get(_KEY)
    return info if isinstance(info, FBCacheInfo) else None


def apply_fb_cache_to_model(
    model: Any, *, residual_diff_threshold: float = 0.1, start: float = 0.0, end: float = 1.0,
    max_consecutive_cache_hits: int = -1, object_to_patch: str = "diffusion_model", prefer_wavespeed: bool = False,
    easycache_threshold: float = 0.2, start_percent: float | None = None, end_percent: float | None = None,
) -> Any:  # fmt: skip
    """Clone a ComfyUI MODEL and give it a First Block Cache; ``fb_cache_info`` returns which.

    Args:
        residual_diff_threshold: mean relative change of the first block's residual below which a step is reused, for
            the picture of the batch that changed most. 0 or less returns ``model`` itself.
        start: part of the schedule before which every step is computed, 0 to 1; ``start_percent`` is the old name.
        end: part of the schedule after which every step is computed; ``end_percent`` is the old name.
        max_consecutive_cache_hits: reuses after which a step is computed; -1: no limit; 0 returns ``model`` itself.
        object_to_patch: name of the transformer or UNet in the MODEL.
        prefer_wavespeed: use Comfy-WaveSpeed's node where installed; the node replaces any model function wrapper.
        easycache_threshold: ``reuse_threshold`` of ComfyUI's EasyCache and LazyCache, on another scale than
            ``residual_diff_threshold``. Both nodes stay within their default range of 0.15 to 0.95 of the schedule.

    Raises:
        BadRequest: an argument is wrong.
    """
    start = start if start_percent is None else start_percent
    end = end if end_percent is None else end_percent
    limits = _Limits(residual_diff_threshold, start, end, max_consecutive_cache_hits)
    network = _checked_network(model, object_to_patch, limits)
    if residual_diff_threshold <= 0 or max_consecutive_cache_hits == 0:
        return model
    node = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get("ApplyFBCacheOnModel")
    if prefer_wavespeed and node is not None:
        return _with_wavespeed(node, model, object_to_patch, limits)
    note = "; Comfy-WaveSpeed was asked for and is not installed" if prefer_wavespeed else ""
    if _mentions(network, "patches_replace", "dit"):
        return _with_own_cache(model, network, limits, FBCacheInfo("blocks", "the model offers block hooks" + note))
    if _mentions(network, "input_block_patch") and _mentions(network, "DIFFUSION_MODEL") and hasattr(network, "out"):
        return _with_own_cache(model, network, limits, FBCacheInfo("unet", "the UNet offers input hooks" + note))
    return _with_core_cache(model, network, easycache_threshold, limits, note)


def _checked_network(model: Any, name: str, limits: _Limits) -> Any:
    if not hasattr(model, "add_wrapper_with_key"):
        raise BadRequest(f"model is a {type(model).__name__}, not a ComfyUI MODEL")
    if math.isnan(limits.threshold):
        raise BadRequest("residual_diff_threshold is not a number")
    if not 0.0 <= limits.start <= limits.end <= 1.0:
        raise BadRequest(f"start={limits.start} and end={limits.end}: must be 0 <= start <= end <= 1")
    if limits.max_hits < -1:
        raise BadRequest(f"max_consecutive_cache_hits={limits.max_hits}", "-1 means unlimited, 0 means off")
    try:
        return model.get_model_object(name)
    except AttributeError:
        raise BadRequest(f"object_to_patch={name!r}: the MODEL has no such part") from None


def _mentions(network: Any, *words: str) -> bool:
    """Return whether a function of the classes of the network or its submodules uses all these names."""
    classes = {base for module in network.modules() for base in type(module).__mro__}
    functions = (value for base in classes for value in vars(base).values())
    codes = (function.__code__ for function in functions if isinstance(getattr(function, "__code__", None), CodeType))
    return any(set(words) <= {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))} for code in codes)


def _labelled(model: Any, info: FBCacheInfo) -> Any:
    model.model_options[_KEY] = info
    logger.info("first block cache: %s (%s)", info.method, info.reason)
    return model


def _with_wavespeed(node: Any, model: Any, name: str, limits: _Limits) -> Any:
    patched = node().patch(
        model=model, object_to_patch=name, residual_diff_threshold=limits.threshold,
        max_consecutive_cache_hits=limits.max_hits, start=limits.start, end=limits.end,
    )[0]  # fmt: skip
    return _labelled(patched, FBCacheInfo("wavespeed", "Comfy-WaveSpeed was asked for and is installed"))


def _with_own_cache(model: Any, network: Any, limits: _Limits, info: FBCacheInfo) -> Any:
    import torch
    from comfy.patcher_extension import WrappersMP

    lists = (len(part) for part in network.modules() if isinstance(part, torch.nn.ModuleList))
    cache = _FirstBlockCache(limits, info, max(lists, default=0))
    clone = model.clone()
    for place, wrapper in ((WrappersMP.OUTER_SAMPLE, cache.outer_sample), (WrappersMP.APPLY_MODEL, cache.apply_model)):
        clone.remove_wrappers_with_key(place, _KEY)
        clone.add_wrapper_with_key(place, _KEY, wrapper)
    return _labelled(clone, info)


def _with_core_cache(model: Any, network: Any, threshold: float, limits: _Limits, note: str) -> Any:
    """Apply ComfyUI's EasyCache or LazyCache; an old ComfyUI has neither, and the model is returned unchanged."""
    try:
        from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
    except ImportError:
        logger.warning("first block cache: the model has no hooks and this ComfyUI has no EasyCache: nothing is cached")
        return model
    values = threshold, max(limits.start, 0.15), min(limits.end, 0.95), False
    reason = f"the model has no block hooks; reuse_threshold {threshold}{note}"
    if _mentions(network, "DIFFUSION_MODEL"):
        patched = EasyCacheNode.execute(model, *values).result[0]
        if _keeps_chunks_apart(patched.model_options["transformer_options"]["easycache"]):
            return _labelled(patched, FBCacheInfo("easycache", reason))
        reason += "; this ComfyUI's EasyCache mixes the conditionings of a batch"
    return _labelled(LazyCacheNode.execute(model, *values).result[0], FBCacheInfo("lazycache", reason))


def _keeps_chunks_apart(easycache: Any) -> bool:
    """Return whether EasyCache applies to each conditioning its own change (not so in ComfyUI 0.3.64, issue 10344)."""
    import torch

    try:
        probe = easycache.clone()
        probe.uuid_cache_diffs = {"a": torch.ones(1, 1), "b": torch.zeros(1, 1)}
        return bool(probe.apply_cache_diff(torch.zeros(2, 1), ["a", "b"]).flatten().tolist() == [1.0, 0.0])
    except (AttributeError, RuntimeError, TypeError):
        return False


@dataclass
class _Entry:
    """Results of the last computed step of one stream of calls."""

    residual: Any = None  # residual of the first block, [B, ...]
    rest: dict[str, Any] = field(default_factory=dict)  # residual of the other blocks, per stage
    hits: int = 0

    def may_reuse(self, residual: Any, limits: _Limits) -> bool:
        """Return whether each row of this residual [B, ...] is close to that of the last computed step."""
        import torch

        if not self.rest or self.residual.shape != residual.shape or self.hits == limits.max_hits:
            return False
        change = (residual - self.residual).abs().flatten(1).mean(1, dtype=torch.float32)
        size = self.residual.abs().flatten(1).mean(1, dtype=torch.float32)
        return bool((change < limits.threshold * size).all())  # a NaN is never close


class _Run:
    """The cache of one sampling run: the sigmas at which steps may be reused, and an entry per stream of calls."""

    def __init__(self, first_sigma: float, last_sigma: float) -> None:
        self.first_sigma, self.last_sigma = first_sigma, last_sigma
        self.entries: dict[tuple[Any, ...], _Entry] = {}
        self._calls: dict[tuple[Any, ...], tuple[float, int]] = {}

    def entry(self, x: Any, options: dict[str, Any]) -> _Entry | None:
        """Find or make the entry for a call with latents x [B, C, ...]; ``None`` if this call is not cached."""
        chunks = options.get("uuids") or options.get("cond_or_uncond")
        if not chunks or options.get("sigmas") is None:
            return None
        sigma = float(options["sigmas"].max())
        if not self.last_sigma <= sigma <= self.first_sigma:
            return None
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        stream = (tuple(chunks), tuple(x.shape), x.dtype, x.device, window)
        previous, ordinal = self._calls.get(stream, (math.nan, 0))
        ordinal = ordinal + 1 if previous == sigma else 0
        self._calls[stream] = sigma, ordinal
        return self.entries.setdefault((*stream, ordinal), _Entry())


class _FirstBlockCache:
    """The two wrappers of a cached MODEL, and the settings; each run's cache is in the run's options."""

    def __init__(self, limits: _Limits, info: FBCacheInfo, depth: int) -> None:
        self.limits, self.info, self.depth = limits, info, depth

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap a sampling run: make the run's cache, and drop it at the end."""
        guider = executor.class_obj
        to_sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
        run = _Run(float(to_sigma(self.limits.start)), float(to_sigma(self.limits.end)))
        options = guider.model_options.setdefault("transformer_options", {})  # a copy that belongs to this run
        options[_KEY] = run
        stats, reused, computed = self.info.stats, self.info.stats.reused, self.info.stats.computed
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(_KEY, None)
            run.entries.clear()
            reused, computed = stats.reused - reused, stats.computed - computed
            logger.info("first block cache: %d of %d evaluations reused", reused, reused + computed)

    def apply_model(
        self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Wrap an evaluation of x [B, C, ...]: add the hooks to the options of this call."""
        import torch

        options = transformer_options or {}
        run = options.get(_KEY)
        entry = run.entry(x, options) if isinstance(run, _Run) and not torch.is_grad_enabled() else None
        if entry is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        current = (_BlockPass if self.info.method == "blocks" else _UNetPass)(entry, self.limits)
        hooked = current.hooked(options, self.depth)
        result = executor(x, t, c_concat, c_crossattn, control, hooked, **kwargs)
        current.finish(self.info.stats)
        return result


class _Pass:
    """One evaluation: decides after the first block if the others are skipped, and else records their residual."""

    def __init__(self, entry: _Entry, limits: _Limits) -> None:
        self.entry, self.limits = entry, limits
        self.reuse: bool | None = None  # None until the first block has run
        self.residual: Any = None  # also None if this evaluation cannot be reused
        self.rest: dict[str, Any] = {}

    def decide(self, residual: Any) -> bool:
        self.residual = residual
        self.reuse = residual is not None and self.entry.may_reuse(residual, self.limits)
        return self.reuse

    def finish(self, stats: FBCacheStats) -> None:
        """Count a successful forward; if computed in full, its results become those of the last computed step."""
        if self.reuse:
            self.entry.hits += 1
            stats.reused += 1
        else:
            self.entry.residual, self.entry.hits = self.residual, 0
            self.entry.rest = self.rest if self.residual is not None else {}
            stats.computed += 1


class _BlockPass(_Pass):
    """An evaluation of a transformer by block hooks, which get ``{"img": [B, L, D], ...}`` and run or skip the block.

    Only the stream that the final layer reads is cached ("img", in one family "x"), since only blocks read the text.
    """

    answers_dict = True

    def hooked(self, options: dict[str, Any], depth: int) -> dict[str, Any]:
        self.added: set[str] = set()
        replace = options.get("patches_replace", {})
        others = replace.get("dit", {})
        keys = {*others, *((kind, number) for kind in _KINDS for number in range(depth))}
        hooks = {key: functools.partial(self._block, key[0], others.get(key)) for key in keys}
        return {**options, "patches_replace": {**replace, "dit": hooks}}

    def _block(self, stage: str, other: Callable[..., Any] | None, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        name = "img" if "img" in args else "x"
        if self.reuse and self._skips(stage, args[name]):
            rest = None if stage in self.added else self.entry.rest.get(stage)
            self.added.add(stage)  # the first hook of a stage adds the residual of the whole stage
            main = args[name] if rest is None else args[name] + rest
            return {**args, name: main} if self.answers_dict else main
        before = args[name].clone()  # blocks may work in place
        out = extra["original_block"](args) if other is None else other(args, extra)
        after = out[name] if isinstance(out, dict) else out
        change = before.neg_().add_(after) if before.shape == after.shape else None
        if self.reuse is None:
            self.answers_dict = isinstance(out, dict)
            self.decide(change)
        elif change is None:
            self.residual = None
        else:
            self.rest[stage] = self.rest[stage].add_(change) if stage in self.rest else change
        return out

    def _skips(self, stage: str, main: Any) -> bool:
        """Return whether the block is skipped: never if the cached residual does not fit main [B, L, D], as of here."""
        rest = self.entry.rest.get(stage)
        if rest is not None and stage not in self.added and rest.shape != main.shape:
            self.reuse, self.residual = False, None
        return bool(self.reuse)


class _UNetPass(_Pass):
    """An evaluation of a UNet: leaves the forward after the second input block, or records it to the output layer."""

    def hooked(self, options: dict[str, Any], _depth: int) -> dict[str, Any]:
        from comfy.patcher_extension import WrappersMP

        wrappers, place = options.get("wrappers", {}), WrappersMP.DIFFUSION_MODEL
        innermost = {**wrappers.get(place, {}), _KEY: [self._forward]}
        return {**options, "wrappers": {**wrappers, place: innermost}}

    def _forward(
        self, executor: Any, x: Any, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        options = transformer_options or {}
        patches = options.get("patches", {})
        probes = [
            *patches.get("input_block_patch", ()),
            self._probe,
        ]  # last: after the other patches
        options = {**options, "patches": {**patches, "input_block_patch": probes}}
        out = executor.class_obj.out
        handle = out.register_forward_pre_hook(self._before_output)
        try:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        except _Enough:
            return out(self.start + self.entry.rest["out"])
        finally:
            handle.remove()

    def _probe(self, hidden: Any, options: dict[str, Any]) -> Any:
        """Look at the output of each input block, hidden [B, C, H, W]."""
        if options["block"] == ("input", 0):
            self.before = hidden.clone()
        elif options["block"] == ("input", 1):
            self.start = hidden.clone()
            if self.decide(hidden - self.before if hidden.shape == self.before.shape else self.start):
                raise _Enough
        return hidden

    def _before_output(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        if not self.reuse and inputs[0].shape == self.start.shape:
            self.rest["out"] = inputs[0] - self.start


class _Enough(Exception):
    """Leaves a UNet's forward; ``_UNetPass._forward`` catches every one."""
