"""What decides a VAE's result beside its input, on a real daemon: random numbers, and attributes that nodes set.

Each result is the stock VAE's, bit for bit, and so is the next random number of this process. The daemon's counters are
read: nothing stepped in, nothing was loaded here.
"""

from __future__ import annotations

import json
import os
import sys

import pytest

from luna_daemon.core import BadRequest
from luna_daemon.shells.build import make_from_checkpoint, make_vae
from luna_daemon.wire import messages as m
from tests.comfy.shell_helpers import DEMO_VAE, ROOT
from tests.integration.conftest import daemons_below

pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("inference")]

LTXV = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
    "decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]],
    "encoder_blocks": [["res_x", {"num_layers": 1}]], "norm_layer": "pixel_norm", "patch_size": 4,
    "latent_log_var": "uniform", "causal_decoder": False, "timestep_conditioning": True,
}  # fmt: skip
"""LTXV's VAE with few layers; like the real one it adds noise before and while it decodes."""


@pytest.fixture(scope="module")
def ltxv(stock, checkpoint, tmp_path_factory):
    """A checkpoint with that VAE inside, seeded random weights."""
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    torch, generator = stock.torch, stock.torch.Generator().manual_seed(3)
    state = stock.utils.load_torch_file(str(checkpoint))
    state = {name: value for name, value in state.items() if not name.startswith("first_stage_model.")}
    for name, value in VideoVAE(config=LTXV).state_dict().items():
        if "per_channel_statistics" in name:
            value = torch.ones_like(value) if "std" in name else torch.zeros_like(value)
        elif not name.endswith("timestep_scale_multiplier"):
            value = torch.randn(value.shape, generator=generator) * 0.05
        state[f"first_stage_model.{name}"] = value.contiguous()
    path = tmp_path_factory.mktemp("ltxv") / "ltxv.safetensors"
    stock.utils.save_torch_file(state, str(path), metadata={"config": json.dumps({"vae": LTXV})})
    return path


@pytest.fixture(scope="module")
def daemon(stock, ltxv, tmp_path_factory):
    folders = (DEMO_VAE.parent, ROOT / "build" / "models", ltxv.parent)
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        yield start(
            backend="comfy", comfyui_path=os.environ["COMFYUI_PATH"], comfyui_python=sys.executable,
            model_dirs=os.pathsep.join(map(str, folders)), cpu_threads=1, max_vae_workers=1,
        )  # fmt: skip


@pytest.fixture
def served(daemon):
    """How many VAE requests the daemon answered in the test; fails if anything was done without it."""
    before = daemon.info()

    def count():
        now = daemon.info()
        assert (now["fallbacks"], now["materialised"]) == (before["fallbacks"], before["materialised"])
        return sum(now["requests"].get(op, 0) - before["requests"].get(op, 0) for op in ("vae.encode", "vae.decode"))

    return count


@pytest.fixture(scope="module")
def local(stock, ltxv):
    return stock.sd.load_checkpoint_guess_config(str(ltxv), output_model=False, output_clip=False)[2]


@pytest.fixture
def vae(daemon, ltxv):
    return make_from_checkpoint(ltxv, client=daemon.client())[1]


@pytest.fixture
def same(stock, local, vae):
    """Whether shell and stock VAE give the same from the same seed, and leave the same next random number."""
    torch = stock.torch

    def check(work, mine=None, theirs=None, seed=11):
        found = []
        for each in (mine or vae, theirs or local):
            torch.manual_seed(seed)
            found.append((work(each), torch.rand(3), work(each), torch.rand(3)))
        assert [torch.equal(a, b) for a, b in zip(*found)] == [True] * 4, "result, next number, and both again"
        return found[0]

    return check


def random(stock, *shape, seed=0):
    return stock.torch.rand(*shape, generator=stock.torch.Generator().manual_seed(seed))


def test_a_decoder_that_draws(stock, vae, same, served):
    """Twice from one seed: the second draw goes on where the first ended; of the VAE, and of the network alone."""
    latent = random(stock, 1, 128, 2, 4, 4)
    first, _, second, _ = same(lambda each: each.decode(latent))
    assert not stock.torch.equal(first, second), "it does draw"
    assert same(lambda each: each.first_stage_model.decode(latent.to(each.vae_dtype)))
    assert served() == 4


def test_an_encoder_that_does_not(stock, vae, same, served):
    """Its generators stay where they are, and from the second call on their states stay at home."""
    video = random(stock, 9, 64, 64, 3)
    first, one, second, _ = same(lambda each: each.encode(video))
    stock.torch.manual_seed(11)
    assert stock.torch.equal(first, second) and stock.torch.equal(one, stock.torch.rand(3))
    assert vae.first_stage_model.luna._draws == {(m.VaeEncode, False): False} and served() == 2


def test_an_attribute_turns_drawing_off_and_on(stock, vae, local, same, served):
    """What drew nothing and then draws is asked again with the states: one request more, the same result."""
    latent = random(stock, 1, 128, 2, 4, 4, seed=5)
    # Noise before the decoder, and in its layers.
    blocks = "decoder.up_blocks.0.res_blocks.0"
    for each in (vae, local):
        each.first_stage_model.timestep_conditioning = False
        each.first_stage_model.get_submodule(blocks).inject_noise = False
    try:
        first, _, second, _ = same(lambda each: each.decode(latent))
        assert stock.torch.equal(first, second) and served() == 2
    finally:
        for each in (vae, local):
            each.first_stage_model.timestep_conditioning = True
            each.first_stage_model.get_submodule(blocks).inject_noise = True
    first, _, second, _ = same(lambda each: each.decode(latent))
    assert not stock.torch.equal(first, second) and served() == 5


def test_attributes_are_put_back(stock, daemon, ltxv, vae, local, same, served):
    """Another client of the same model never sees them, nor does the next call; an error in between changes nothing."""
    other, latent = make_from_checkpoint(ltxv, client=daemon.client())[1], random(stock, 1, 128, 2, 4, 4, seed=6)
    vae.first_stage_model.timestep_conditioning = False
    plain = vae.decode(latent)
    assert same(lambda each: each.decode(latent), mine=other)
    with pytest.raises(BadRequest):
        daemon.client().call(
            m.VaeDecode(
                vae.first_stage_model.luna.model, attributes={"": {"timestep_conditioning": False}, "x": {"a": 1}}
            ),
            [latent],
        )
    assert same(lambda each: each.decode(latent), mine=other)
    assert not stock.torch.equal(plain, other.decode(latent)) and served() >= 6


def test_a_regularizer_that_samples(stock, daemon, same, served):
    """``regularization.sample``, as nodes set it on a KL VAE: the encoder draws, from this process' numbers."""
    path = ROOT / "build" / "models" / "sdxl_vae.safetensors"
    if not path.exists():
        pytest.skip("build/models/sdxl_vae.safetensors is not there: 'make bench' makes it")
    shell, real = make_vae([path], client=daemon.client()), stock.sd.VAE(sd=stock.utils.load_torch_file(str(path)))
    image = random(stock, 1, 64, 48, 3)
    mode = shell.encode(image)
    for each in (shell, real):
        each.first_stage_model.regularization.sample = True
    first, *_ = same(lambda each: each.encode(image), shell, real)
    assert same(lambda each: each.encode_tiled(image, tile_x=64, tile_y=64, overlap=16), shell, real)
    assert not stock.torch.equal(first, mode) and served() == 1 + 1 + 2 + 2, "the first draw was asked for twice"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"attributes": {"no.such.layer": {"sample": True}}}, "no such layer"),
        ({"attributes": {"": {"__class__": 1}}}, "not a valid attribute"),
        ({"generators": ["dice"]}, "unknown"),
        ({"generators": ["cpu"]}, "not a state"),
        ({"generators": ["cpu", "cpu"]}, "needed"),
    ],
)
def test_what_is_refused(stock, daemon, vae, call, says):
    tensors = [random(stock, 1, 128, 2, 4, 4), stock.torch.zeros(7, dtype=stock.torch.uint8)]
    with pytest.raises(BadRequest, match=says):
        daemon.client().call(
            m.VaeDecode(vae.first_stage_model.luna.model, **call), tensors[: 2 if "generators" in call else 1]
        )
