"""What a worker computes: ops to models, inputs taken apart, random numbers as the caller would have drawn them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luna_daemon.backends import make_backend
from luna_daemon.core import BadRequest, RequestCancelled
from luna_daemon.pool import compute
from luna_daemon.wire import messages as m
from luna_daemon.wire.codec import describe, tensor_bytes, tensor_from
from luna_daemon.wire.packing import pack

MODEL = m.ModelRef("vae")
SPEC = m.LoadSpec("echo", "echo", "", (), "cpu", "auto")


@pytest.fixture
def echo() -> Any:
    """The diagnostic backend's model."""
    return make_backend("echo", {}).load(SPEC)


def no_step(done: int, total: int) -> None: ...


def given(*tensors: torch.Tensor) -> list[compute.Input]:
    """Tensors as they come with a job."""
    return [(describe(tensor), tensor_bytes(tensor)) for tensor in tensors]


def taken(result: compute.Result) -> list[torch.Tensor]:
    """The result's tensors."""
    return [tensor_from(ref, memoryview(bytearray(data))) for ref, data in result.tensors]


class VAE:
    """Adds a random number to its input, and keeps what it was called with."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def decode(self, latents, tiling, step, **options):
        self.options = options
        step(0, 1)
        return latents + torch.rand(1), ["a note"]


class ComfyVAE(VAE):
    """One of the comfy backend."""

    takes_options = True


class Clip:
    """Names its tokens."""

    def tokenize(self, text):
        return {"l": [[(len(text), 1.0)]]}

    def encode(self, tokens, layer, unprojected):
        return {"cond": torch.full((1, 1), float(tokens["l"][0][0][0])), "pooled_output": torch.zeros(1)}


class ComfyClip(Clip):
    """One of the comfy backend: multiplies its tokens by the patches."""

    def encode_packed(self, call, tokens, patch_of):
        for use in call.patches:
            (factor,), lenders = patch_of(use.name)
            tokens = tokens * factor + sum(lenders)
        return tokens


# --- the echo backend --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 4, 4096])
def test_echo(echo, nbytes):
    """As many bytes of float32 as asked for; no tensor of no bytes."""
    result = compute.run(m.Echo(nbytes), echo, [], no_step)
    assert [tensor.nbytes for tensor in taken(result)] == ([nbytes] if nbytes else [])
    assert all(tensor.dtype is torch.float32 for tensor in taken(result))


def test_a_step_can_cancel(echo):
    """Its error comes out as it is."""

    def step(done: int, total: int) -> None:
        raise RequestCancelled("gone")

    with pytest.raises(RequestCancelled):
        compute.run(m.Echo(0, 0.1), echo, [], step)


def test_loading_answers_with_properties(echo):
    assert compute.run(m.ModelLoad(MODEL), echo, [], no_step).value == {"class": "echo"}


def test_what_workers_do_not_serve(echo):
    """A call that the control process should have answered."""
    with pytest.raises(BadRequest, match="Ping"):
        compute.run(m.Ping(), echo, [], no_step)


# --- VAE ---------------------------------------------------------------------------------------------------------


def test_random_numbers_are_the_callers(echo):
    """The worker draws from the states that came, returns the new ones, and says what was drawn."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    expected = torch.ones(2) + torch.rand(1)
    after = torch.get_rng_state()
    torch.manual_seed(8)
    result = compute.run(m.VaeDecode(MODEL, generators=["cpu"]), VAE(), given(torch.ones(2), state), no_step)
    assert result.value == {"drew": ["cpu"]} and result.notes == ["a note"]
    out, new_state = taken(result)
    assert torch.equal(out, expected) and torch.equal(new_state, after)


def test_a_state_that_was_not_sent_is_not_returned():
    """The caller only learns that numbers were drawn."""
    result = compute.run(m.VaeDecode(MODEL), VAE(), given(torch.ones(2)), no_step)
    assert result.value == {"drew": ["cpu"]} and len(result.tensors) == 1


@pytest.mark.parametrize(
    ("tensors", "generators", "words"),
    [
        ([], [], "1 tensor"),
        ([torch.ones(1), torch.ones(1)], [], "1 tensor.* 2 were sent"),
        ([torch.ones(1)], ["cpu"], "2 tensor"),
        ([torch.ones(1, dtype=torch.int32)], [], "int32"),
    ],
)
def test_inputs_that_do_not_fit_a_vae(tensors, generators, words):
    with pytest.raises(BadRequest, match=words):
        compute.run(m.VaeDecode(MODEL, generators=generators), VAE(), given(*tensors), no_step)


def test_what_only_comfyui_knows():
    """Its options reach its model; another backend's refuses them by name."""
    call = m.VaeDecode(MODEL, raw=True, options={"a": 1}, attributes={"layer": {"scale": 2}})
    model = ComfyVAE()
    compute.run(call, model, given(torch.ones(1)), no_step)
    assert model.options == {"raw": True, "options": {"a": 1}, "attributes": {"layer": {"scale": 2}}}
    with pytest.raises(BadRequest, match="raw and options and attributes need the comfy backend"):
        compute.run(call, VAE(), given(torch.ones(1)), no_step)
    compute.run(m.VaeDecode(MODEL), model, given(torch.ones(1)), no_step)
    assert model.options == {}


# --- text encoders -----------------------------------------------------------------------------------------------


def test_text_and_tokens():
    """Text is tokenized first; outputs are named."""
    assert compute.run(m.ClipTokenize(MODEL, "abc"), Clip(), [], no_step).value == {"tokens": {"l": [[(3, 1.0)]]}}
    for call in (m.ClipEncode(MODEL, text="abc"), m.ClipEncode(MODEL, tokens={"l": [[(3, 1.0)]]})):
        result = compute.run(call, Clip(), [], no_step)
        assert result.value == {"names": ["cond", "pooled_output"]} and taken(result)[0].item() == 3.0


@pytest.mark.parametrize("more", [{}, {"text": "a", "packed": 1}, {"text": "a", "tokens": {}}])
def test_a_prompt_comes_in_one_form(more):
    with pytest.raises(BadRequest, match="exactly one of"):
        compute.run(m.ClipEncode(MODEL, **more), ComfyClip(), [], no_step)


def test_packed_tokens_need_comfyui():
    with pytest.raises(BadRequest, match="need the comfy backend"):
        compute.run(m.ClipEncode(MODEL, packed=1), Clip(), [], no_step)


def test_inputs_are_taken_apart():
    """Call tensors, RNG states, patch tensors: each part finds its own, and a patch the weights that it borrows."""
    own: list[torch.Tensor] = []
    packed = pack(torch.tensor([2.0]), own)
    first, second = [], []
    sets = [pack([torch.tensor([3.0])], first), pack([torch.tensor([5.0])], second)]
    patches = [m.Patch("three", sets[0], 2, 1, [SPEC]), m.Patch("five", sets[1], 3, 1)]
    call = m.ClipEncode(
        MODEL, packed=packed, generators=["cpu"], patches=[m.PatchUse("five"), m.PatchUse("three")]
    )  # fmt: skip
    inputs = given(*own, torch.get_rng_state(), *first, *second)
    result = compute.run(call, ComfyClip(), inputs, no_step, patches, lambda spec: 100.0)
    assert taken(result)[0].item() == 2 * 5 * 3 + 100 and "drew" not in result.value


def test_a_state_is_missing():
    """Fewer inputs than the generators that the call names."""
    with pytest.raises(BadRequest):
        compute.run(m.ClipEncode(MODEL, packed=1, generators=["cpu"]), ComfyClip(), [], no_step)
