"""Merges of two daemon CLIPs on a real daemon: the second one's weights are named, not sent, and the result is stock's.

Each test reads the daemon's counters: nothing stepped in, nothing was loaded here, and hardly a byte was uploaded.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from luna_daemon.core import BadRequest, ModelMismatchError, ModelNotFound
from luna_daemon.files.identity import file_id
from luna_daemon.shells.build import make_clip
from luna_daemon.wire import messages as m
from luna_daemon.wire.packing import pack
from tests.integration.conftest import daemons_below

pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("inference")]


@pytest.fixture(scope="module")
def second(stock, clip_l, tmp_path_factory):
    """Another text encoder of CLIP-L's shape, in float32: a merge converts it."""
    state, generator = stock.utils.load_torch_file(str(clip_l)), stock.torch.Generator().manual_seed(7)
    for name, weight in state.items():
        if weight.is_floating_point():
            noise = stock.torch.randn(weight.shape, generator=generator) * 0.02
            state[name] = weight.float() + noise
    # The file that the first one was made from has none: ComfyUI would leave there what lies in memory.
    state["text_projection.weight"] = stock.torch.randn(768, 768, generator=generator) * 0.02
    path = tmp_path_factory.mktemp("models") / "second.safetensors"
    stock.utils.save_torch_file(state, str(path))
    return path


@pytest.fixture(scope="module")
def first(stock, clip_l, second):
    state = stock.utils.load_torch_file(str(clip_l)) | {
        "text_projection.weight": stock.torch.eye(768, dtype=stock.torch.float16)
    }
    path = second.with_name("first.safetensors")
    stock.utils.save_torch_file(state, str(path))
    return path


@pytest.fixture(scope="module")
def daemon(stock, first, tmp_path_factory):
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        yield start(
            backend="comfy", comfyui_path=os.environ["COMFYUI_PATH"], comfyui_python=sys.executable,
            model_dirs=str(first.parent), cpu_threads=1, max_clip_workers=1, conditioning_cache_mb=0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def node(stock):
    """The merge nodes."""
    from comfy_extras import nodes_model_merging as nodes

    return SimpleNamespace(simple=nodes.CLIPMergeSimple().merge, add=nodes.CLIPAdd().merge,
                           subtract=nodes.CLIPSubtract().merge)  # fmt: skip


@pytest.fixture
def shells(daemon, first, second):
    client = daemon.client()
    return [make_clip([path], "stable_diffusion", client=client) for path in (first, second)]


@pytest.fixture(scope="module")
def locals_(stock, first, second):
    return [stock.sd.load_clip([str(path)], clip_type=stock.sd.CLIPType.STABLE_DIFFUSION) for path in (first, second)]


@pytest.fixture
def counts(daemon):
    """Prompts that the daemon encoded in this test; fails if anything was done without it."""
    before = daemon.info()

    def since():
        now = daemon.info()
        assert (now["fallbacks"], now["materialised"]) == (before["fallbacks"], before["materialised"])
        return now["requests"].get("clip.encode", 0) - before["requests"].get("clip.encode", 0)

    return since


def encoded(clip):
    return clip.encode_from_tokens(clip.tokenize("a (lighthouse:1.3) in a storm"), return_pooled=True)


def equal(stock, mine, theirs):
    return all(stock.torch.equal(a, b) for a, b in zip(encoded(mine), encoded(theirs), strict=True))


def with_lora(stock, clip, lora, strength=0.8):
    return stock.sd.load_lora_for_models(None, clip, dict(lora), 0.0, strength)[1]


MERGES = {
    "simple": lambda node, a, b: node.simple(a, b, 0.35)[0],
    "add": lambda node, a, b: node.add(a, b)[0],
    "subtract": lambda node, a, b: node.subtract(a, b, 0.6)[0],
}


@pytest.mark.parametrize("merge", MERGES)
def test_each_merge(stock, node, shells, locals_, counts, merge):
    """The stock result, from names alone; the first and the second CLIP stay what they are."""
    mine, theirs = (MERGES[merge](node, *pair) for pair in (shells, locals_))
    uploads = [tensor for one in mine.patcher.uses()[2] for tensor in one.put()[1]]
    assert sum(tensor.numel() for tensor in uploads) < 100 and type(mine) is type(shells[0])
    assert equal(stock, mine, theirs)
    assert not equal(stock, mine, locals_[0])
    for shell, local in zip(shells, locals_):
        assert equal(stock, shell, local)
    assert counts() == 4


def test_a_lora_on_the_second(stock, node, shells, locals_, make_lora, counts):
    """Its patches travel with the names of its weights."""
    mine, theirs = (node.simple(a, with_lora(stock, b, make_lora(11)), 0.35)[0] for a, b in (shells, locals_))
    assert equal(stock, mine, theirs)
    assert not equal(stock, mine, node.simple(*locals_, 0.35)[0])
    assert counts() == 2


def test_a_lora_on_a_merge_and_a_merge_of_merges(stock, node, shells, locals_, make_lora, counts):
    """LoRA after the merge, LoRA before it, and a merge as the second CLIP of another."""
    found = []
    for a, b in (shells, locals_):
        merged = with_lora(stock, node.simple(with_lora(stock, a, make_lora(12), 0.5), b, 0.6)[0], make_lora(13))
        found.append((merged, node.subtract(a, merged, 0.3)[0]))
    for mine, theirs in zip(*found):
        assert equal(stock, mine, theirs)
    assert counts() == 2


def test_a_model_merged_with_itself(stock, node, shells, locals_, make_lora, counts):
    """The worker lends the weights of the model that it patches: unpatched ones, whatever was loaded last."""
    for strength in (0.8, 0.4):
        mine, theirs = (node.add(a, with_lora(stock, a, make_lora(14), strength))[0] for a, _ in (shells, locals_))
        assert equal(stock, mine, theirs)
    assert counts() == 2


def test_the_second_is_loaded_again(stock, node, daemon, shells, locals_, counts):
    """Unloaded in between, by whoever wants room: nothing of it is kept, and the result is the same."""
    mine, theirs = (node.simple(*pair, 0.2)[0] for pair in (shells, locals_))
    assert equal(stock, mine, theirs)
    client = daemon.client()
    assert len(client.models()["loaded"]) == 2
    client.unload(shells[1].patcher.luna.model)
    assert len(client.models()["loaded"]) == 1
    assert equal(stock, mine, theirs) and len(client.models()["loaded"]) == 2
    assert counts() == 2


def test_only_models_that_may_be_named(daemon, second, clip_l, tmp_path):
    """As for any model: in the folders, the client's very file, a text encoder."""
    client, outside = daemon.client(), tmp_path / "outside.safetensors"
    outside.write_bytes(second.read_bytes()[:1000])

    def put(model):
        client.call(m.PatchPut("b2:refused", [], [model]))

    with pytest.raises(ModelNotFound, match="outside the model folders"):
        put(m.ModelRef("clip", files=(file_id(outside),)))
    with pytest.raises(ModelMismatchError, match="size"):
        put(m.ModelRef("clip", files=(m.FileId(str(second), 5),)))
    with pytest.raises(BadRequest, match="'vae'"):
        put(m.ModelRef("vae", files=(file_id(second),)))


@pytest.mark.parametrize(("index", "key"), [(0, "no.such.key"), (3, "clip_l.logit_scale"), ("0", "x"), (-9, "x")])
def test_what_names_nothing(daemon, stock, shells, locals_, index, key):
    """A weight that is not there, a model that did not come: said so; the worker lives on."""
    client, name, second = daemon.client(), f"b2:{index}{key}", shells[1].patcher.luna.model
    entry = {"model": index, "key": key, "patches": []}
    client.call(m.PatchPut(name, [["clip_l.logit_scale", None, None, entry]], [second]))
    tokens = pack({"l": [[(1, 1.0)] * 77]}, [])
    with pytest.raises(BadRequest, match="cannot be read"):
        client.call(m.ClipEncode(shells[0].patcher.luna.model, packed=tokens, patches=[m.PatchUse(name)]))
    assert equal(stock, shells[0], locals_[0])
