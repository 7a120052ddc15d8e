"""DaemonCLIP inside ComfyUI: ComfyUI's own CLIP code around text encoders that the daemon computes."""

from __future__ import annotations

import copy
import time

import psutil
import pytest

from luna_daemon.core import DaemonConnectionError, LimitExceeded, ModelNotFound
from luna_daemon.shells.build import make_clip
from luna_daemon.wire import messages as m
from tests.comfy.shell_helpers import InProcess, empty_file

pytest_plugins = ["tests.comfy.shell_fixtures"]

LONG = " ".join(f"word{number}" for number in range(90))
PROMPTS = {"plain": "a cat", "weighted": "a (cat:1.3), [dog], (moon:0.7)", "chunks": f"(start:1.2) {LONG}", "empty": ""}


@pytest.fixture
def daemon(stock, local_clip):
    """Stands in for the daemon."""
    return InProcess(stock, clip=local_clip.clone())


@pytest.fixture
def clip(clip_l, daemon, inference):
    """The shell, used as ComfyUI uses a CLIP: under inference_mode."""
    return make_clip([clip_l], "stable_diffusion", client=daemon)


def same(stock, found, expected):
    """Whether two results of encode_from_tokens are the same, bit for bit."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(stock, found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(same(stock, a, b) for a, b in zip(found, expected))
    if isinstance(expected, stock.torch.Tensor):
        return stock.torch.equal(found, expected)
    return found is expected or found == expected


def both(stock, clip, local, prompt="a (cat:1.3)", **options):
    """Whether the shell encodes as the local model does; outputs as dicts."""
    tokens = local.tokenize(prompt)
    options = {"return_pooled": True, "return_dict": True} | options
    return same(
        stock, clip.encode_from_tokens(clip.tokenize(prompt), **options), local.encode_from_tokens(tokens, **options)
    )


def values(state):
    """A state dict's own values; what the file lacks is whatever lay in memory, in ComfyUI too."""
    return {name: value.clone() for name, value in state.items() if not name.endswith("text_projection.weight")}


def loaded(stock, clip, lora):
    """The patches that a LoRA loader would add."""
    return stock.lora.load_lora(lora, stock.lora.model_lora_keys_clip(clip.cond_stage_model, {}))


# --- what it is --------------------------------------------------------------------------------------------------


def test_it_is_a_clip_without_weights(stock, clip, local_clip, daemon):
    assert isinstance(clip, stock.sd.CLIP) and type(clip).__name__ == "DaemonCLIP"
    assert type(clip.cond_stage_model) is type(local_clip.cond_stage_model)
    assert type(clip.tokenizer) is type(local_clip.tokenizer)
    state, real = clip.cond_stage_model.state_dict(), local_clip.cond_stage_model.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in real.items()
    }
    assert sum(value.nbytes for value in state.values() if not value.is_meta) < 1000
    for name in ("layer_idx", "use_clip_schedule", "apply_hooks_to_conds", "tokenizer_options"):
        assert getattr(clip, name) == getattr(local_clip, name)
    assert clip.get_ram_usage() == clip.patcher.model_size() == 0 and not daemon.calls


def test_it_is_built_in_a_moment(stock, clip_l, daemon):
    """As fast as ComfyUI's own, and less than a quarter of the weights: what there is, is the tokenizer's."""
    make_clip([clip_l], client=daemon)
    start = time.perf_counter()
    stock.sd.load_clip([str(clip_l)], clip_type=stock.sd.CLIPType.STABLE_DIFFUSION)
    usual = time.perf_counter() - start
    before, start = psutil.Process().memory_full_info().uss, time.perf_counter()
    shell = make_clip([clip_l], client=daemon)
    seconds = time.perf_counter() - start
    assert seconds < 2 * usual + 0.1, (seconds, usual)
    assert psutil.Process().memory_full_info().uss - before < 60e6 and shell.layer_idx is None


ENCODERS = {
    "l": {"text_model.encoder.layers.0.mlp.fc1.weight": (1,), "text_model.encoder.layers.1.mlp.fc1.weight": (1,)},
    "g": {"text_model.encoder.layers.30.mlp.fc1.weight": (1,)},
    "t5": {
        "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096), "encoder.final_layer_norm.weight": (4096,)
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "encoders", "parts"),
    [
        ("sdxl", "l g", ("clip_l", "clip_g")), ("sd3", "l g t5", ("clip_l", "clip_g", "t5xxl")),
        ("flux", "l t5", ("clip_l", "t5xxl")), ("unknown", "l g", ("clip_l", "clip_g")),
    ],
)  # fmt: skip
def test_families_are_built_from_their_headers(stock, daemon, tmp_path, family, encoders, parts):
    """Up to 10 GB of weights as fast as ComfyUI builds them empty, and nothing in memory; each answers by itself."""
    torch, kind = stock.torch, getattr(stock.sd.CLIPType, family.upper(), stock.sd.CLIPType.STABLE_DIFFUSION)
    start = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state, strict=True: ((), ()))
        real = stock.sd.load_text_encoder_state_dicts(
            [{name: torch.empty(shape) for name, shape in ENCODERS[one].items()} for one in encoders.split()],
            clip_type=kind, model_options={"initial_device": torch.device("meta")},
        )  # fmt: skip
    usual = time.perf_counter() - start
    paths = []
    for name in parts:
        state = getattr(real.cond_stage_model, name).transformer.state_dict()
        paths.append(empty_file(tmp_path / f"{name}.safetensors", state))
    before, start = psutil.Process().memory_full_info().uss, time.perf_counter()
    shell = make_clip(paths, family, client=daemon)
    seconds = time.perf_counter() - start
    assert seconds < 3 * usual + 0.2, (seconds, usual)
    assert psutil.Process().memory_full_info().uss - before < 150e6
    model = shell.cond_stage_model
    assert type(model).__name__ == type(real.cond_stage_model).__name__
    assert model.state_dict().keys() == real.cond_stage_model.state_dict().keys()
    assert all("encode_token_weights" in getattr(model, name).__dict__ for name in parts)
    stock.management.load_models_gpu([shell.patcher, shell.clone().patcher], memory_required=1 << 30)
    assert set(shell.tokenize("a cat")) == {{"clip_l": "l", "clip_g": "g", "t5xxl": "t5xxl"}[name] for name in parts}


def test_tokens_are_made_here(clip, local_clip, daemon):
    for prompt in PROMPTS.values():
        assert clip.tokenize(prompt, return_word_ids=True) == local_clip.tokenize(prompt, return_word_ids=True)
    assert not daemon.calls


def test_it_stays_a_shell(stock, clip, make_lora):
    """After what LoraLoader, CLIPSetLastLayer and SetClipHooks do, and after copies."""
    _, with_lora = stock.sd.load_lora_for_models(None, clip, make_lora(1), 1.0, 1.0)
    layered = with_lora.clone()
    layered.clip_layer(-2)
    hooked = layered.clone()
    hooks = stock.hooks.create_hook_lora(make_lora(2), 1.0, 1.0)
    hooked.patcher.forced_hooks = hooks.clone()
    hooked.patcher.register_all_hook_patches(hooks, stock.hooks.create_target_dict(stock.hooks.EnumWeightTarget.Clip))
    for other in (with_lora, layered, hooked, copy.copy(hooked)):
        assert type(other) is type(clip) and type(other.patcher) is type(clip.patcher)
        assert other.cond_stage_model is clip.cond_stage_model and other.patcher.model_size() == 0
    assert copy.deepcopy(clip) is clip and layered.layer_idx == -2 and clip.layer_idx is None
    assert clip.patcher.patches == {} and with_lora.patcher.patches.keys() == hooked.patcher.patches.keys()


def test_patches_are_those_of_the_real_one(stock, clip, local_clip, make_lora):
    """Accepted keys, and the patcher's lists, for two LoRAs."""
    shell, real = clip.clone(), local_clip.clone()
    for seed, strength in ((1, 0.8), (2, 0.5)):
        patches = loaded(stock, clip, make_lora(seed))
        assert len(patches) == 6
        assert set(shell.add_patches(patches, strength)) == set(real.add_patches(patches, strength)) == set(patches)
    assert shell.add_patches({"no.such.key": ("diff", (1,))}) == []
    assert shell.patcher.patches == real.patcher.patches


def test_memory_management_takes_it_for_a_model(stock, clip, daemon):
    memory = stock.management
    other = clip.clone()
    for flags in ({}, {"force_full_load": True}, {"memory_required": 1 << 40}):
        memory.load_models_gpu([clip.patcher, other.patcher], **flags)
    memory.free_memory(1 << 60, clip.patcher.load_device)
    assert clip.load_model() is clip.patcher
    memory.unload_all_models()
    clip.patcher.cleanup()
    assert daemon.materialised == 0 and not daemon.calls


# --- encoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_encoded_as_locally(stock, clip, local_clip, daemon, name):
    assert both(stock, clip, local_clip.clone(), PROMPTS[name])
    assert len(daemon.calls) == 1 and daemon.fallbacks == daemon.materialised == 0


def test_every_form_of_the_result(stock, clip, local_clip):
    tokens = clip.tokenize("a (dog:1.2)")
    for options in ({}, {"return_pooled": True}, {"return_pooled": "unprojected"}, {"return_dict": True}):
        assert same(
            stock, clip.encode_from_tokens(tokens, **options), local_clip.clone().encode_from_tokens(tokens, **options)
        )
    assert stock.torch.equal(clip.encode("a dog"), local_clip.clone().encode("a dog"))
    found = clip.encode_from_tokens_scheduled(tokens, add_dict={"width": 8})
    assert same(stock, found, local_clip.clone().encode_from_tokens_scheduled(tokens, add_dict={"width": 8}))
    assert isinstance(found[0], list)
    assert same(
        stock, clip.encode_from_tokens(clip.tokenize("a (dog:1.2)", return_word_ids=True)),
        local_clip.encode_from_tokens(tokens),
    )  # fmt: skip


def test_clip_skip(stock, clip, local_clip, daemon):
    """Of this clone alone."""
    shell, real = clip.clone(), local_clip.clone()
    shell.clip_layer(-2)
    real.clip_layer(-2)
    assert both(stock, shell, real) and both(stock, clip, local_clip.clone())
    assert not same(stock, shell.encode("a cat"), clip.encode("a cat"))
    assert [call.layer for call in daemon.asked(m.ClipEncode)] == [-2, None, -2, None]


def test_textual_inversion(stock, clip, local_clip):
    """A tensor among the tokens."""
    tokens = clip.tokenize("a cat")
    row = stock.torch.randn(768, generator=stock.torch.Generator().manual_seed(3))
    tokens["l"][0][2] = (row, 1.1)
    assert same(stock, clip.encode_from_tokens(tokens), local_clip.clone().encode_from_tokens(tokens))


def test_results_end_on_comfyuis_intermediate_device(stock, clip, monkeypatch):
    tokens = clip.tokenize("a cat")
    send = InProcess.call

    def call(self, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stock.management, "intermediate_device", lambda: stock.torch.device("cpu"))
            return send(self, *args, **options)

    monkeypatch.setattr(InProcess, "call", call)
    monkeypatch.setattr(stock.management, "intermediate_device", lambda: stock.torch.device("meta"))
    assert all(tensor.is_meta for tensor in clip.encode_from_tokens(tokens, return_pooled=True))


# --- patches -----------------------------------------------------------------------------------------------------


def test_loras_in_both_orders(stock, clip, local_clip, daemon, make_lora):
    """Same as local for each; each LoRA is uploaded once, whatever clone, strength and order use it."""
    first, second = make_lora(1), make_lora(2)
    results = []
    for stack in ([(first, 1.0)], [(first, 0.5), (second, 1.0)], [(second, 1.0), (first, 0.5)]):
        shell, real = clip, local_clip.clone()
        for lora, strength in stack:
            _, shell = stock.sd.load_lora_for_models(None, shell, dict(lora), 1.0, strength)
            _, real = stock.sd.load_lora_for_models(None, real, dict(lora), 1.0, strength)
        assert both(stock, shell, real)
        results.append(shell.encode("a cat"))
    assert not stock.torch.equal(results[1], results[2]) and not stock.torch.equal(results[0], results[1])
    assert both(stock, clip, local_clip.clone())
    assert len({put.name for put in daemon.asked(m.PatchPut)}) == 2
    assert daemon.fallbacks == daemon.materialised == 0


def test_every_kind_of_patch(stock, clip, local_clip):
    """diff, set, a scale without a patch, an offset, adapters of other kinds, model_as_lora as a hook."""
    torch = stock.torch
    generator = torch.Generator().manual_seed(5)
    layer = "clip_l.transformer.text_model.encoder.layers.3"
    weight, bias = f"{layer}.mlp.fc2.weight", f"{layer}.mlp.fc2.bias"
    part = torch.randn(100, 3072, generator=generator)
    loha = next(kind for kind in sys_adapters() if kind.name == "loha")
    weights = [torch.randn(*shape, generator=generator) for shape in ((768, 4), (4, 768), (768, 4), (4, 768))]
    kinds = [
        ({bias: ("diff", (torch.randn(768, generator=generator),))}, 0.5, 1.0),
        ({bias: ("set", (torch.randn(768, generator=generator),))}, 1.0, 1.0),
        ({f"{layer}.self_attn.q_proj.weight": (None,)}, 0.0, 1.5),
        ({(weight, (0, 50, 100)): ("diff", (part,))}, 1.0, 1.0),
        ({f"{layer}.self_attn.k_proj.weight": loha(set(), (*weights[:2], 2.0, *weights[2:], None, None, None))}, 1, 1),
    ]
    shell, real = clip.clone(), local_clip.clone()
    before = real.encode("a cat")
    for patches, strength, model in kinds:
        one = clip.clone(), local_clip.clone()
        for each in (shell, real, *one):
            assert each.add_patches(patches, strength, model) == list(patches)
        assert both(stock, *one) and not torch.equal(one[1].encode("a cat"), before)
    assert both(stock, shell, real)


def sys_adapters():
    import comfy.weight_adapter

    return comfy.weight_adapter.adapters


def test_patches_that_a_node_edited_by_hand(stock, clip, local_clip, make_lora):
    """What counts is what the patcher holds."""
    shell, real = clip.clone(), local_clip.clone()
    patches = loaded(stock, clip, make_lora(1))
    for each in (shell, real):
        each.add_patches(patches, 1.0)
        each.patcher.patches.pop(next(iter(patches)))
    assert both(stock, shell, real)


def test_put_again_after_the_daemon_forgot(stock, clip, local_clip, daemon, make_lora):
    shell, real = clip.clone(), local_clip.clone()
    patches = loaded(stock, clip, make_lora(1))
    shell.add_patches(patches)
    real.add_patches(patches)
    assert both(stock, shell, real)
    daemon.sets.clear()
    assert both(stock, shell, real) and len(daemon.asked(m.PatchPut)) == 2


def test_what_cannot_be_sent_is_computed_here(stock, clip, local_clip, daemon, make_lora, caplog):
    """A node's own function in a patch, or patches that the daemon does not take: the same picture, one warning."""
    shell, real = clip.clone(), local_clip.clone()
    weight = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc2.bias"
    diff = stock.torch.ones(768)
    for each in (shell, real):
        each.add_patches({(weight, None, stock.torch.neg): ("diff", (diff,))})
    assert both(stock, shell, real) and both(stock, shell, real)
    assert (daemon.told_fallbacks + daemon.fallbacks, daemon.materialised) == (2, 1)
    assert caplog.text.count("cannot be sent") == 1
    assert both(stock, clip, local_clip.clone()) and daemon.asked(m.ClipEncode)


def test_patches_beyond_the_daemons_limits(stock, clip, local_clip, daemon, make_lora, monkeypatch):
    def refuse(self, call, tensors):
        raise LimitExceeded("too large")

    monkeypatch.setattr(InProcess, "patchput", refuse)
    shell, real = clip.clone(), local_clip.clone()
    patches = loaded(stock, clip, make_lora(1))
    shell.add_patches(patches)
    real.add_patches(patches)
    assert both(stock, shell, real) and daemon.materialised == 1


def test_a_merge_names_the_other_clips_weights(stock, clip, local_clip, clip_l, daemon):
    """As CLIPMergeSimple does it, key by key; one set that carries no weight but the few that shells have."""
    shell, real, other = clip.clone(), local_clip.clone(), make_clip([clip_l], client=daemon)
    assert daemon.materialised == 0
    for target, source in ((shell, other), (real, local_clip)):
        patches = source.get_key_patches()
        for key, entries in patches.items():
            if not key.endswith((".position_ids", ".logit_scale")):
                assert target.add_patches({key: entries}, 0.25, 0.7) == [key]
    assert both(stock, shell, real)
    (put,) = daemon.asked(m.PatchPut)
    assert put.models == [other.patcher.luna.model] and sum(t.numel() for t in daemon.sets[put.name][1]) < 100
    assert both(stock, other, local_clip.clone()) and daemon.fallbacks == daemon.materialised == 0


def test_a_local_merge_reads_the_shells_weights(stock, clip, local_clip, daemon, caplog):
    """A local first CLIP computes with the values: they are read here, once, with a warning."""
    results = []
    for second in (clip, local_clip):
        first = local_clip.clone()
        for key, entries in second.get_key_patches().items():
            if not key.endswith((".position_ids", ".logit_scale", "text_projection.weight")):
                first.add_patches({key: entries}, 0.25, 0.7)
        results.append(first.encode("a cat"))
    assert same(stock, *results) and daemon.materialised == 1 and not daemon.calls
    assert caplog.text.count("a node reads the values of weights") == 1


def test_a_merge_with_a_model_that_the_daemon_refuses(stock, clip, local_clip, clip_l, daemon, monkeypatch, caplog):
    """The first CLIP is computed here then, and says why."""

    def refuse(self, call, tensors):
        raise ModelNotFound("outside the model folders")

    monkeypatch.setattr(InProcess, "patchput", refuse)
    shell, real, other = clip.clone(), local_clip.clone(), make_clip([clip_l], client=daemon)
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    for target, source in ((shell, other), (real, local_clip)):
        target.add_patches({key: source.get_key_patches()[key]}, 0.5, 0.5)
    assert both(stock, shell, real) and "outside the model folders" in caplog.text
    assert daemon.told_fallbacks + daemon.fallbacks == 1


def test_scales_key_by_key_are_few_sets(stock, clip, local_clip, daemon):
    """As CLIPAttentionMultiply does it: 96 calls, one upload per strength."""
    shell, real = clip.clone(), local_clip.clone()
    for each in (shell, real):
        for key in each.patcher.model_state_dict():
            for part, strength in (("q_proj", 1.2), ("k_proj", 0.9), ("v_proj", 1.1)):
                if f"self_attn.{part}." in key:
                    each.add_patches({key: (None,)}, 0.0, strength)
    assert both(stock, shell, real) and len(daemon.asked(m.PatchPut)) == 3 and daemon.materialised == 0


def test_a_layer_of_none_is_the_last(stock, clip, local_clip, daemon):
    """Given, it is not the same as no layer given."""
    results = []
    for each in (clip.clone(), local_clip.clone()):
        each.cond_stage_model.reset_clip_options()
        each.cond_stage_model.set_clip_options({"layer": None})
        each.load_model()
        results.append(each.cond_stage_model.encode_token_weights(each.tokenize("a cat")))
        each.cond_stage_model.reset_clip_options()
    assert same(stock, *results) and daemon.calls[-1].options == {"layer": None}


def test_a_deep_copy_of_an_encoder(stock, clip, local_clip, daemon):
    """Nodes make one to change it; it asks the daemon as its original does."""
    copied = copy.deepcopy(clip.cond_stage_model)
    pairs = clip.tokenize("a cat")["l"]
    found = copied.clip_l.encode_token_weights(pairs)
    stock.management.load_model_gpu(local_clip.patcher)
    assert same(stock, found, local_clip.cond_stage_model.clip_l.encode_token_weights(pairs))
    assert daemon.materialised == 0


# --- hooks -------------------------------------------------------------------------------------------------------


def set_hooks(stock, clip, hooks, schedule):
    """As the node SetClipHooks does."""
    other = clip.clone()
    other.apply_hooks_to_conds = hooks
    other.patcher.forced_hooks = hooks.clone()
    other.use_clip_schedule = schedule
    if not schedule:
        other.patcher.forced_hooks.set_keyframes_on_hooks(None)
    target = stock.hooks.create_target_dict(stock.hooks.EnumWeightTarget.Clip)
    other.patcher.register_all_hook_patches(hooks, target)
    return other


def hooks_of(stock, loras, keyframes):
    groups = []
    for lora, strength in loras:
        group = stock.hooks.create_hook_lora(lora, 1.0, strength)
        frames = stock.hooks.HookKeyframeGroup()
        for percent, factor in keyframes:
            frames.add(stock.hooks.HookKeyframe(strength=factor, start_percent=percent))
        group.set_keyframes_on_hooks(frames)
        groups.append(group)
    return stock.hooks.HookGroup.combine_all_hooks(groups)


@pytest.mark.parametrize("schedule", [True, False])
def test_hook_schedules(stock, clip, local_clip, daemon, make_lora, schedule):
    """One call per keyframe, with its strengths, on top of a LoRA; hooks and ranges stay in the conditioning."""
    patches = loaded(stock, clip, make_lora(3))
    found = []
    for each in (clip.clone(), local_clip.clone()):
        each.add_patches(patches, 0.7)
        hooks = hooks_of(stock, [(make_lora(1), 0.8), (make_lora(2), 0.6)], [(0.0, 1.0), (0.4, 0.5), (0.8, 0.0)])
        hooked = set_hooks(stock, each, hooks, schedule)
        result = hooked.encode_from_tokens_scheduled(hooked.tokenize("a (cat:1.2)"), add_dict={"width": 8})
        assert all(entry[1].pop("hooks") is hooks for entry in result)
        found.append(result)
    assert same(stock, *found) and len(found[0]) == (3 if schedule else 1)
    if schedule:
        assert not stock.torch.equal(found[0][0][0], found[0][1][0])
    last = daemon.asked(m.ClipEncode)[-1]
    assert len(last.hooks) == 2 and len(last.patches) == 1 and len(daemon.sets) == 3
    assert both(stock, clip, local_clip.clone()) and daemon.fallbacks == daemon.materialised == 0


# --- one encoder alone, and nodes' own code ----------------------------------------------------------------------


def test_one_encoder_alone(stock, clip, local_clip, daemon, make_lora):
    """As ADV_CLIP_emb does: own options, patches of the patcher that was loaded, one encoder."""
    patches = loaded(stock, clip, make_lora(1))
    results = []
    for each in (clip.clone(), local_clip.clone()):
        each.add_patches(patches)
        each.cond_stage_model.reset_clip_options()
        each.cond_stage_model.set_clip_options({"layer": -3, "projected_pooled": False})
        stock.management.load_model_gpu(each.patcher)
        pairs = each.tokenize("a (cat:1.3)")["l"]
        results.append(each.cond_stage_model.clip_l.encode_token_weights(pairs))
        each.cond_stage_model.reset_clip_options()
    assert same(stock, *results) and daemon.asked(m.ClipEncode)[-1].part == "clip_l"
    assert daemon.asked(m.ClipEncode)[-1].options == {"layer": -3}


def test_an_encoders_own_options_count(stock, clip, local_clip, daemon):
    """Set behind the whole's back; ComfyUI's own code then puts the parts together here."""
    results = []
    for each in (clip.clone(), local_clip.clone()):
        each.cond_stage_model.reset_clip_options()
        each.cond_stage_model.clip_l.set_clip_options({"layer": -4})
        each.load_model()
        results.append(each.cond_stage_model.encode_token_weights(each.tokenize("a cat")))
        each.cond_stage_model.reset_clip_options()
    assert same(stock, *results) and daemon.calls[-1].part == "clip_l"
    assert both(stock, clip, local_clip.clone()) and daemon.calls[-1].part == ""


def test_a_nodes_own_code_in_the_encoder(stock, clip, local_clip, daemon):
    """As prompt-control does: an object patch around one encoder runs here, its encoder in the daemon."""
    results = []
    for each in (clip.clone(), local_clip.clone()):
        inner = each.patcher.get_model_object("clip_l.encode_token_weights")

        def doubled(pairs, inner=inner):
            cond, *rest = inner(pairs)
            return (cond * 2, *rest)

        patched = each.clone()
        patched.patcher.add_object_patch("clip_l.encode_token_weights", doubled)
        results.append(patched.encode("a (cat:1.3)"))
        results.append(each.encode("a (cat:1.3)"))
    assert same(stock, results[:2], results[2:]) and not stock.torch.equal(results[0], results[1])
    assert daemon.asked(m.ClipEncode)[0].part == "clip_l" and daemon.fallbacks == daemon.materialised == 0


# --- without the daemon, and with true weights -------------------------------------------------------------------


def test_the_local_model_steps_in(stock, clip, local_clip, daemon, make_lora, caplog):
    """With the same patches, layer and hooks; the daemon is used as soon as it is back."""
    patches = loaded(stock, clip, make_lora(1))
    hooks = hooks_of(stock, [(make_lora(2), 0.8)], [(0.0, 1.0), (0.5, 0.5)])
    pairs = []
    for each in (clip.clone(), local_clip.clone()):
        each.add_patches(patches, 0.7)
        each.clip_layer(-2)
        pairs.append((each, set_hooks(stock, each, hooks, True)))
    daemon.error = DaemonConnectionError("no daemon")
    (shell, hooked), (real, real_hooked) = pairs
    for _ in range(2):
        assert both(stock, shell, real) and both(stock, clip, local_clip.clone())
        assert both(stock, shell, real, return_pooled="unprojected")
        found, expected = [each.encode_from_tokens_scheduled(clip.tokenize("a cat")) for each in (hooked, real_hooked)]
        assert same(stock, [entry[0] for entry in found], [entry[0] for entry in expected])
    assert caplog.text.count("steps in") == 1 and daemon.fallbacks == 10
    daemon.error = None
    assert both(stock, shell, real) and daemon.told_fallbacks == 10 and "is back" in caplog.text


def test_the_state_dict_is_real_and_patched(stock, clip, local_clip, daemon, make_lora, caplog):
    """As CLIPSave and CheckpointSave take it."""
    patches = loaded(stock, clip, make_lora(1))
    states = []
    for each in (clip.clone(), local_clip.clone()):
        each.add_patches(patches)
        stock.management.load_models_gpu([each.load_model()], force_patch_weights=True)
        states.append(values(each.get_sd()))
        stock.management.unload_all_models()
    assert same(stock, *states) and daemon.materialised == 1
    assert caplog.text.count("weights are loaded here") == 1 and f"({__name__}:" in caplog.text
    asked = len(daemon.calls)
    assert both(stock, clip, local_clip.clone()) and len(daemon.calls) == asked


def test_patched_weights_by_the_patcher(stock, clip, local_clip, daemon, make_lora):
    """As the LoRA extraction takes them."""
    patches = loaded(stock, clip, make_lora(1))
    states = []
    for each in (clip.clone(), local_clip.clone()):
        each.add_patches(patches)
        stock.management.load_models_gpu([each.patcher], force_patch_weights=True)
        states.append(values(each.patcher.model_state_dict()))
        stock.management.unload_all_models()
    assert same(stock, *states) and daemon.materialised == 1


def test_a_weights_value(stock, clip, local_clip, daemon):
    """Shapes cost nothing; a value is the true one."""
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = clip.patcher.model_state_dict()[name]
    assert weight.shape == (3072, 768) and weight.dtype == stock.torch.float16 and daemon.materialised == 0
    assert weight.float().sum() == local_clip.patcher.model_state_dict()[name].float().sum()
    assert daemon.materialised == 1 and both(stock, clip, local_clip.clone()) and len(daemon.calls) == 1


def test_running_a_layer(stock, clip, local_clip, daemon):
    """Code that computes with the encoder itself."""
    tokens = stock.torch.tensor([[1, 2, 3]])
    embed = clip.cond_stage_model.clip_l.transformer.get_input_embeddings()
    real = local_clip.cond_stage_model.clip_l.transformer.get_input_embeddings()
    assert stock.torch.equal(embed(tokens), real(tokens)) and daemon.materialised == 1
    assert both(stock, clip, local_clip.clone()) and not daemon.calls
