"""First Block Cache on the real ComfyUI: what it skips, what it keeps, and that nothing leaks or mixes.

The weights are random: the tests show that the cache does what it says, not how good a picture it leaves.
"""

from __future__ import annotations

import gc
import math
import sys
import types
import weakref

import pytest

from luna_daemon import wavespeed_utils
from luna_daemon.core import BadRequest
from luna_daemon.inference_wrapper import wrap_model_for_inference
from luna_daemon.wavespeed_utils import apply_fb_cache_to_model, fb_cache_info

HOOKED = ["sd3", "flux", "chroma", "hunyuan_video", "wan", "qwen_image", "ltxv", "aura_flow", "hunyuan3d"]
OWN = [*HOOKED, "unet"]
ALWAYS = 1e9
"""A threshold below which every change lies."""
NEVER = 1e-9


@pytest.fixture(autouse=True)
def inference_mode(comfy):
    """As ComfyUI runs everything."""
    with comfy.torch.inference_mode():
        yield


def evaluate(model, patcher, sigmas, control=None, contexts=()):
    """The results of one evaluation per sigma, as the steps of one run, on the same input but for the contexts."""
    run = wavespeed_utils._Run(math.inf, 0.0)
    patcher.pre_run()
    results = []
    for number, sigma in enumerate(sigmas):
        inputs = model.inputs()
        if contexts:
            inputs["c_crossattn"] = contexts[number]
        options = {
            "wrappers": patcher.wrappers, "uuids": list(range(model.rows)), "luna_fb_cache": run,
            "sigmas": model.comfy.torch.tensor([sigma]),
        }  # fmt: skip
        fresh = {name: list(values) for name, values in control.items()} if control else None
        results.append(patcher.model.apply_model(**inputs, control=fresh, transformer_options=options))
    return results


@pytest.mark.parametrize("family", OWN)
def test_a_reused_step_is_right(tiny, family):
    """On the same input the first block plus the cached rest gives the computed result, and only that block runs."""
    model = tiny(family)
    first_blocks = 2 if family == "unet" else 1
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=0.01)
    assert fb_cache_info(cached).method == ("unet" if family == "unet" else "blocks")
    plain = model.apply()
    with model.counting() as count:
        computed, reused = evaluate(model, cached, [1.0, 0.9])
    assert count == [len(model.blocks) + first_blocks]
    assert model.comfy.torch.equal(computed, plain)
    model.comfy.torch.testing.assert_close(reused, plain, rtol=1e-4, atol=1e-4)
    assert (fb_cache_info(cached).stats.computed, fb_cache_info(cached).stats.reused) == (1, 1)


@pytest.mark.parametrize("family", OWN)
def test_the_stock_sampler_evaluates_fewer_blocks(tiny, family):
    """With every change allowed, 6 steps run all blocks once and the first block five times more."""
    model = tiny(family)
    first_blocks = 2 if family == "unet" else 1
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)
    with model.counting() as count:
        result = model.sample(cached, steps=6)
    assert count == [len(model.blocks) + 5 * first_blocks]
    assert result.isfinite().all()


@pytest.mark.parametrize("family", OWN)
def test_where_nothing_is_reused_the_picture_is_the_same(tiny, family):
    """With a threshold that nothing meets, the hooked model gives the same bits as the plain one."""
    model = tiny(family)
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=NEVER)
    assert model.comfy.torch.equal(model.sample(cached, steps=3), model.sample(steps=3))
    assert fb_cache_info(cached).stats.reused == 0


def test_the_threshold_decides(tiny):
    """A larger threshold evaluates fewer blocks and gives a picture that is further off, in steps between."""
    model = tiny("sd3")
    plain = model.sample(steps=20)
    counts, differences = [], []
    for threshold in (0.05, 0.6, 1.0, ALWAYS):
        with model.counting() as count:
            result = model.sample(apply_fb_cache_to_model(model.model, residual_diff_threshold=threshold), steps=20)
        counts.append(count[0])
        differences.append(float((result - plain).abs().mean()))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) >= 3
    assert differences[0] < differences[2] < differences[3]


def test_off_is_the_same_model(tiny):
    """A threshold of 0 or less and no allowed hits return the very MODEL, unmarked."""
    model = tiny("sd3").model
    assert apply_fb_cache_to_model(model, residual_diff_threshold=0.0) is model
    assert apply_fb_cache_to_model(model, residual_diff_threshold=-1.0) is model
    assert apply_fb_cache_to_model(model, max_consecutive_cache_hits=0) is model
    assert fb_cache_info(model) is None


def test_the_model_given_stays_as_it_was(tiny):
    """Wrappers, options and pictures of the MODEL given are untouched; applying again replaces, clones keep it."""
    model = tiny("sd3")
    plain = model.sample(steps=3)
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)
    assert not model.model.wrappers and fb_cache_info(model.model) is None
    again = apply_fb_cache_to_model(cached, residual_diff_threshold=NEVER)
    assert model.comfy.torch.equal(model.sample(again, steps=3), plain)
    model.sample(cached.clone(), steps=3)
    assert fb_cache_info(cached).stats.reused == 2
    assert not model.comfy.torch.equal(model.sample(cached, steps=3), plain)
    assert model.comfy.torch.equal(model.sample(steps=3), plain)


@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_max_consecutive_cache_hits(tiny, family):
    """After so many reused steps one is computed: 2 allowed of 9 steps computes three of them."""
    model = tiny(family)
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS, max_consecutive_cache_hits=2)
    model.sample(cached, steps=9)
    assert fb_cache_info(cached).stats == wavespeed_utils.FBCacheStats(computed=3, reused=6)


@pytest.mark.parametrize("names", [("start", "end"), ("start_percent", "end_percent")], ids=["new", "predecessor"])
def test_start_and_end(tiny, names):
    """Steps outside of the range, by sigma, are plain ones: not counted, not remembered, under either name."""
    model = tiny("sd3")
    to_sigma = model.model.get_model_object("model_sampling").percent_to_sigma
    cached = apply_fb_cache_to_model(
        model.model, residual_diff_threshold=ALWAYS, object_to_patch="diffusion_model", **dict(zip(names, (0.3, 0.8)))
    )
    inside = []

    def look(model_, x, sigmas, extra_args, callback=None, disable=None):
        for sigma in sigmas[:-1]:
            model_(x, sigma * x.new_ones(x.shape[0]), **extra_args)
            inside.append(to_sigma(0.8) <= float(sigma) <= to_sigma(0.3))
        return x

    sampler = model.comfy.samplers.KSAMPLER(look)
    sigmas = model.comfy.samplers.calculate_sigmas(model.model.get_model_object("model_sampling"), "simple", 10)
    with model.counting() as count:
        guided(model, cached, sampler, sigmas)
    assert 0 < sum(inside) < len(inside)
    assert fb_cache_info(cached).stats == wavespeed_utils.FBCacheStats(computed=1, reused=sum(inside) - 1)
    assert count == [4 * (len(inside) - sum(inside) + 1) + sum(inside) - 1]


def guided(model, patcher, sampler, sigmas, cfg=3.0):
    """One sampling run through ComfyUI's guider."""
    guider = model.comfy.samplers.CFGGuider(patcher)
    guider.set_conds(model.positive, model.negative)
    guider.set_cfg(cfg)
    noise = model.comfy.sample.prepare_noise(model.latent, 1)
    return guider.sample(noise, model.latent, sampler, sigmas, seed=1, disable_pbar=True)


@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_two_runs_never_mix(tiny, family):
    """A run gives the same bits whatever ran before it, finished or broken off, and leaves no tensors behind."""
    model = tiny(family)
    torch = model.comfy.torch
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)
    runs = []
    keep = wavespeed_utils._Run.__init__

    def init(run, *sigmas):
        keep(run, *sigmas)
        runs.append(weakref.ref(run))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wavespeed_utils._Run, "__init__", init)
        first = model.sample(cached, steps=3, seed=5)
        model.sample(cached, steps=3, seed=6)
        with pytest.raises(RuntimeError, match="interrupted"):
            broken_off(model, cached)
        assert torch.equal(model.sample(cached, steps=3, seed=5), first)
    gc.collect()
    assert len(runs) == 4 and [run() for run in runs] == [None] * 4
    assert "luna_fb_cache" not in cached.model_options["transformer_options"]


def broken_off(model, patcher):
    """A run that fails in its second step, as ComfyUI's interrupt does."""

    def callback(step, *_):
        if step == 1:
            raise RuntimeError("interrupted")

    noise = model.comfy.sample.prepare_noise(model.latent, 6)
    return model.comfy.sample.sample(
        patcher, noise, 3, 3.0, "euler", "simple", model.positive, model.negative, model.latent, callback=callback,
        disable_pbar=True,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_conditionings_that_run_apart_are_kept_apart(tiny, monkeypatch, family):
    """Where memory lets cond and uncond run one after the other only, the picture is that of the joint run."""
    model = tiny(family)
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)
    joint = model.sample(cached, steps=4)
    assert fb_cache_info(cached).stats == wavespeed_utils.FBCacheStats(computed=1, reused=3)
    monkeypatch.setattr(type(model.model.model), "memory_required", lambda *_, **__: 1e30)
    apart = model.sample(cached, steps=4)
    assert fb_cache_info(cached).stats == wavespeed_utils.FBCacheStats(computed=3, reused=9)
    model.comfy.torch.testing.assert_close(apart, joint, rtol=1e-3, atol=1e-3)


def test_evaluations_of_one_sigma_are_streams_of_their_own(tiny):
    """Heun evaluates a sigma twice; each of the two remembers its own: 6 steps are 11 calls, of which 2 compute."""
    model = tiny("sd3")
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)
    model.sample(cached, steps=6, sampler="heun")
    assert fb_cache_info(cached).stats == wavespeed_utils.FBCacheStats(computed=2, reused=9)


def test_streams_are_told_apart(comfy):
    """Other conditionings, shapes and context windows, and a second call at one sigma, get an entry of their own."""
    run = wavespeed_utils._Run(10.0, 1.0)
    x, window = comfy.torch.zeros(1, 4, 8, 8), types.SimpleNamespace(index_list=[0, 1])
    calls = [
        (5.0, x, {"uuids": ["a"]}), (4.9, x, {"uuids": ["b"]}), (4.8, x[:, :, :4], {"uuids": ["a"]}),
        (4.7, x, {"uuids": ["a"], "context_window": window}), (4.6, x.half(), {"uuids": ["a"]}),
        (5.0, x, {"uuids": ["a"]}),
    ]  # fmt: skip
    entries = [run.entry(x, {**options, "sigmas": comfy.torch.tensor([sigma])}) for sigma, x, options in calls]
    assert len(set(map(id, entries))) == len(calls)
    assert run.entry(x, {"uuids": ["a"], "sigmas": comfy.torch.tensor([4.0])}) is entries[0]
    assert run.entry(x, {"uuids": ["a"], "sigmas": comfy.torch.tensor([0.5])}) is None
    assert run.entry(x, {"uuids": ["a"], "sigmas": comfy.torch.tensor([11.0])}) is None
    assert run.entry(x, {"sigmas": comfy.torch.tensor([4.0])}) is None


def test_the_picture_that_changed_most_decides(comfy):
    """One row of a batch over the threshold computes the step for all; a NaN is never close."""
    torch = comfy.torch
    entry = wavespeed_utils._Entry(torch.ones(4, 3, 2), {"stage": torch.ones(1)})
    limits = wavespeed_utils._Limits(0.5, 0.0, 1.0, -1)
    near = torch.full((4, 3, 2), 1.4)
    far = near.clone()
    far[2] = 1.6
    assert entry.may_reuse(near, limits) and not entry.may_reuse(far, limits)
    assert not entry.may_reuse(near[:2], limits)
    assert not entry.may_reuse(near * math.nan, limits)


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_what_lies_between_blocks_is_applied_once(tiny, family):
    """ControlNet's additions after each block are neither cached nor lost: a reused step equals the computed one."""
    model = tiny(family)
    torch = model.comfy.torch
    torch.manual_seed(0)
    control = {"input": list(torch.randn(len(model.blocks), 1, 16, 64)), "output": []}
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=0.01)
    without = evaluate(model, cached, [1.0])[0]
    computed, reused = evaluate(model, cached, [1.0, 0.9], control=control)
    assert fb_cache_info(cached).stats.reused == 1
    assert not torch.allclose(computed, without)
    torch.testing.assert_close(reused, computed, rtol=1e-4, atol=1e-4)


def test_another_length_is_computed(tiny):
    """A stage whose token count is not the remembered one runs its blocks, and nothing of such a step is reused."""
    model = tiny("flux")
    torch = model.comfy.torch
    context = model.positive[0][0]
    longer = torch.cat([context, context], dim=1)
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)
    with model.counting() as count:
        results = evaluate(model, cached, [1.0, 0.9, 0.8, 0.7], contexts=[context, longer, longer, longer])
    assert count == [5 + (1 + 3) + 5 + 1]
    assert all(result.shape == model.latent.shape and result.isfinite().all() for result in results)
    torch.testing.assert_close(results[3], results[2], rtol=1e-4, atol=1e-4)


def test_other_peoples_patches_stay(tiny):
    """Block replacements, block patches, function wrappers, LoRA and the inference wrapper stack with the cache."""
    model = tiny("sd3")
    torch = model.comfy.torch
    called = []

    def replaced(args, extra):
        called.append("block")
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.5}

    def function(apply, call):
        called.append("function")
        return apply(call["input"], call["timestep"], **call["c"])

    def patched(patcher):
        patcher = patcher.clone()
        patcher.set_model_patch_replace(replaced, "dit", "double_block", 0)
        patcher.set_model_patch_replace(replaced, "dit", "double_block", 2)
        patcher.set_model_unet_function_wrapper(function)
        return wrap_model_for_inference(patcher)

    def cached(patcher, threshold):
        return apply_fb_cache_to_model(patcher, residual_diff_threshold=threshold)

    plain = model.sample(patched(model.model), steps=3)
    for order in (lambda t: cached(patched(model.model), t), lambda t: patched(cached(model.model, t))):
        assert torch.equal(model.sample(order(NEVER), steps=3), plain)
        called.clear()
        model.sample(order(ALWAYS), steps=3)
        assert called.count("function") == 3 and called.count("block") == 4  # the first each time, the third once


def test_a_unets_other_patches_stay(tiny):
    """Input block patches and DIFFUSION_MODEL wrappers of others run, before ours, in computed and reused steps."""
    model = tiny("unet")
    called = []

    def patch(hidden, options):
        called.append(options["block"])
        return hidden * 1.5

    def wrapper(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        called.append("wrapper")
        return out

    def patched(patcher):
        patcher = patcher.clone()
        patcher.set_model_input_block_patch(patch)
        patcher.add_wrapper_with_key(model.comfy.WrappersMP.DIFFUSION_MODEL, "other", wrapper)
        return patcher

    plain = model.sample(patched(model.model), steps=3)
    never = apply_fb_cache_to_model(patched(model.model), residual_diff_threshold=NEVER)
    assert model.comfy.torch.equal(model.sample(never, steps=3), plain)
    called.clear()
    model.sample(patched(apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)), steps=3)
    assert called.count("wrapper") == 3
    assert called.count(("input", 1)) == 3 and called.count(("input", 2)) == 1


def test_gradients_are_never_taken_through_a_cache(tiny):
    """With gradients on, as in training, every evaluation is computed and differentiable."""
    model = tiny("sd3")
    torch = model.comfy.torch
    with torch.inference_mode(False):
        model = tiny("sd3")
        cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=ALWAYS)
        with model.counting() as count:
            results = evaluate(model, cached, [1.0, 0.9])
    assert count == [8] and all(result.grad_fn is not None for result in results)
    assert fb_cache_info(cached).stats.computed == 0


# --- caches of others --------------------------------------------------------------------------------------------


class FakeWaveSpeed:
    """Stands for Comfy-WaveSpeed's node: the method's name and arguments are its own."""

    def patch(self, model, object_to_patch, residual_diff_threshold, max_consecutive_cache_hits=-1, start=0.0, end=1.0):
        clone = model.clone()
        clone.seen = (object_to_patch, residual_diff_threshold, max_consecutive_cache_hits, start, end)
        return (clone,)


def test_wavespeed_is_used_where_installed_and_asked_for(tiny, monkeypatch):
    """Its node gets our arguments if both hold; installed alone, or asked for alone, is our own cache, and says so."""
    model = tiny("sd3").model
    monkeypatch.setitem(sys.modules, "nodes", types.SimpleNamespace(NODE_CLASS_MAPPINGS={}))
    missing = apply_fb_cache_to_model(model, prefer_wavespeed=True)
    assert fb_cache_info(missing).method == "blocks" and "not installed" in fb_cache_info(missing).reason
    sys.modules["nodes"].NODE_CLASS_MAPPINGS["ApplyFBCacheOnModel"] = FakeWaveSpeed
    assert fb_cache_info(apply_fb_cache_to_model(model)).method == "blocks"
    used = apply_fb_cache_to_model(
        model, prefer_wavespeed=True, residual_diff_threshold=0.12, start=0.1, end=0.9, max_consecutive_cache_hits=3
    )
    assert used.seen == ("diffusion_model", 0.12, 3, 0.1, 0.9)
    assert fb_cache_info(used).method == "wavespeed" and fb_cache_info(model) is None


@pytest.mark.parametrize("family", ["lumina2", "pixart"])
def test_models_without_block_hooks_get_comfyuis_own_cache(tiny, family):
    """EasyCache or LazyCache serves them under its own threshold, in its own range, and the answer says which."""
    model = tiny(family)
    cached = apply_fb_cache_to_model(model.model, residual_diff_threshold=0.12, easycache_threshold=0.3, end=0.9)
    info = fb_cache_info(cached)
    holder = cached.model_options["transformer_options"]["easycache"]
    assert info.method == holder.name.lower()
    assert (holder.reuse_threshold, holder.start_percent, holder.end_percent) == (0.3, 0.15, 0.9)
    with model.counting() as count:
        result = model.sample(cached, steps=12)
    assert count[0] < 12 * len(model.blocks) and result.isfinite().all()


def test_easycache_only_where_it_keeps_conditionings_apart(tiny, monkeypatch):
    """An EasyCache that adds each conditioning's change to all of a batch is passed over for LazyCache."""
    from comfy_extras import nodes_easycache

    model = tiny("lumina2").model

    def apart(holder, x, uuids):
        return x + holder.torch.cat([holder.uuid_cache_diffs[uuid] for uuid in uuids])

    def together(holder, x, uuids):
        return x + sum(holder.uuid_cache_diffs[uuid] for uuid in uuids)

    monkeypatch.setattr(nodes_easycache.EasyCacheHolder, "torch", nodes_easycache.torch, raising=False)
    monkeypatch.setattr(nodes_easycache.EasyCacheHolder, "apply_cache_diff", together)
    passed_over = fb_cache_info(apply_fb_cache_to_model(model))
    monkeypatch.setattr(nodes_easycache.EasyCacheHolder, "apply_cache_diff", apart)
    taken = fb_cache_info(apply_fb_cache_to_model(model))
    assert passed_over.method == "lazycache" and "mixes" in passed_over.reason
    assert taken.method == "easycache"


def test_an_old_comfyui_without_easycache_leaves_the_model(tiny, monkeypatch, caplog):
    """No hooks and no EasyCache: the MODEL comes back unchanged, and a warning says so."""
    model = tiny("pixart").model
    monkeypatch.setitem(sys.modules, "comfy_extras.nodes_easycache", None)
    assert apply_fb_cache_to_model(model) is model
    assert "nothing is cached" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"residual_diff_threshold": math.nan}, "residual_diff_threshold"), ({"start": 0.6, "end": 0.4}, "start=0.6"),
        ({"end": 1.5}, "end=1.5"), ({"start_percent": -0.1}, "start=-0.1"),
        ({"max_consecutive_cache_hits": -2}, "max_consecutive_cache_hits=-2"), ({"object_to_patch": "unet"}, "'unet'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(tiny, arguments, named):
    """Each is refused with its name and value."""
    with pytest.raises(BadRequest, match=named):
        apply_fb_cache_to_model(tiny("sd3").model, **arguments)


def test_something_else_than_a_model_is_refused():
    """The error names the type."""
    with pytest.raises(BadRequest, match="NoneType"):
        apply_fb_cache_to_model(None)
