"""Files that are no model, models of the wrong kind, inputs that do not fit: the worker says so and works on."""

from __future__ import annotations

import io
import os
import zipfile

import pytest
import torch

from luna_daemon.core import BadRequest, LimitExceeded, LunaError, ModelLoadError, ModelNotFound
from luna_daemon.wire import messages as m
from tests.integration.helpers import DEMO_TOML, DEMO_VAE, tiny_clip

TOML = (
    DEMO_TOML
    + """
[models.gone]
vae = ["nowhere/gone.safetensors"]
[models.tiny]
clip = ["clip.safetensors"]
type = "sd15"
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model files that are none."""
    folder = tmp_path_factory.mktemp("broken")
    whole = DEMO_VAE.read_bytes()
    pickle = io.BytesIO()
    with zipfile.ZipFile(pickle, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    contents = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "header only": whole[:64],
        "text": b"<!DOCTYPE html><title>404 Not Found</title>\n",
        "pickle": pickle.getvalue(),
        "zeros": bytes(4096),
        "huge header": b"\xff" * 8 + whole,
        "no dictionary": (6).to_bytes(8, "little") + b"[1, 2]",
    }
    for name, data in contents.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    (folder / "vae.safetensors").write_bytes(whole)
    (folder / "folder").mkdir()
    tiny_clip(folder / "clip.safetensors")
    return folder


@pytest.fixture(scope="module")
def daemon(start_module_daemon, folder):
    """A daemon with one worker that everything below must leave alive."""
    daemon = start_module_daemon(toml=TOML, model_dirs=folder, cpu_threads=1, conditioning_cache_mb=0)
    daemon.client().vae_decode(torch.zeros(1, 16, 4, 4), "demo")
    return daemon


@pytest.fixture(autouse=True)
def the_worker_works_on(daemon):
    """After every test the one worker there was decodes, and no process was started or lost."""
    pids = [worker["pid"] for worker in daemon.info()["workers"]]
    yield
    with daemon.client() as client:
        assert client.vae_decode(torch.zeros(1, 16, 4, 4), "demo").shape == (1, 32, 32, 3)
    info = daemon.wait_for(lambda info: info["arena"]["used"] == 0 and info["in_flight"] == 0)
    assert [worker["pid"] for worker in info["workers"]] == pids and info["crashes"] == 0


def load(daemon, kind, path, type="sd15"):
    with daemon.client() as client:
        return client.warm(m.ModelRef(kind, files=(m.FileId(str(path)),), type=type))


BROKEN = {
    "empty": "is empty",
    "truncated": "is truncated",
    "header only": "cut short",
    "text": "a text file",
    "pickle": "pickle.*can run code",
    "zeros": "not a valid safetensors file",
    "huge header": "not a valid safetensors file",
    "no dictionary": "not a valid safetensors file",
    "folder": "has no .safetensors file",
}


@pytest.mark.parametrize("name, words", BROKEN.items(), ids=BROKEN)
def test_a_file_that_is_no_model(daemon, folder, name, words):
    """The error names the file and what it is instead."""
    path = folder / name if name == "folder" else folder / f"{name}.safetensors"
    with pytest.raises(ModelLoadError, match=words) as caught:
        load(daemon, "vae", path)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "kind, name, words",
    [("vae", "clip", "is a CLIP-L text encoder, not a VAE"), ("clip", "vae", "is a TAESD VAE, not a text encoder")],
)
def test_a_model_of_the_other_kind(daemon, folder, kind, name, words):
    """A text encoder given as VAE, and the other way round, is named as what it is."""
    with pytest.raises(ModelLoadError, match=words):
        load(daemon, kind, folder / f"{name}.safetensors")


def test_names_that_lead_nowhere(daemon):
    """An unknown name lists the known ones; a known one whose file is missing lists the places tried."""
    client = daemon.client()
    with pytest.raises(ModelNotFound, match=r"no model is named 'sdlx'.*demo, gone"):
        client.vae_decode(torch.zeros(1, 4, 4, 4), "sdlx")
    with pytest.raises(ModelNotFound, match=r"gone\.safetensors' does not exist; tried .*nowhere"):
        client.vae_decode(torch.zeros(1, 4, 4, 4), "gone")
    with pytest.raises(ModelNotFound, match="'demo' has no clip"):
        client.clip_encode("a cat", clip_type="demo")
    with pytest.raises(ModelLoadError, match="flux9"):
        load(daemon, "clip", "clip.safetensors", type="flux9")


def test_a_model_that_cannot_be_loaded_starts_no_storm(daemon, folder):
    """Twenty requests for it are twenty errors, from the worker there is."""
    number = max(worker["number"] for worker in daemon.info()["workers"])
    for _ in range(20):
        with pytest.raises(ModelLoadError):
            load(daemon, "vae", folder / "truncated.safetensors")
    assert max(worker["number"] for worker in daemon.info()["workers"]) == number


def test_a_model_that_was_replaced_is_loaded_anew(daemon, folder):
    """The same path with another content is another model: never answered with the old weights."""
    path = folder / "replaced.safetensors"
    path.write_bytes((folder / "vae.safetensors").read_bytes())
    load(daemon, "vae", path, "sd3")
    path.write_bytes(b"no longer a model")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelLoadError, match="replaced"):
        load(daemon, "vae", path, "sd3")
    daemon.client().unload()


LATENTS = {
    "channels": (torch.zeros(1, 4, 8, 8), r"\[1, 4, 8, 8\]"),
    "axes": (torch.zeros(16, 8, 8), r"\[16, 8, 8\]"),
    "nothing": (torch.zeros(0, 16, 8, 8), r"\[0, 16, 8, 8\]"),
    "no height": (torch.zeros(1, 16, 0, 8), r"\[1, 16, 0, 8\]"),
    "whole numbers": (torch.zeros(1, 16, 8, 8, dtype=torch.int64), "int64"),
    "a number": (torch.tensor(1.0), r"\[\]"),
}


@pytest.mark.parametrize("latents, words", LATENTS.values(), ids=LATENTS)
def test_latents_that_do_not_fit(daemon, latents, words):
    """Wrong shape or dtype: BadRequest that shows it."""
    with pytest.raises(BadRequest, match=words):
        daemon.client().vae_decode(latents, "demo")


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (64, 64, 3), (1, 4, 64, 3), (1, 64, 64, 1), (0, 64, 64, 3)])
def test_pixels_that_do_not_fit(daemon, shape):
    """Channels first, no batch, smaller than a latent, grey or nothing: BadRequest with the shape."""
    with pytest.raises(BadRequest, match="pixels have shape"):
        daemon.client().vae_encode(torch.zeros(shape), "demo")


@pytest.mark.parametrize("count", [0, 2])
def test_how_many_tensors(daemon, count):
    """A decode takes one tensor."""
    with pytest.raises(BadRequest, match=f"{count} were sent"):
        call = m.VaeDecode(m.ModelRef("vae", name="demo"))
        daemon.client().call(call, [torch.zeros(1, 16, 4, 4)] * count)


@pytest.mark.parametrize("tiling", [m.Tiling(0, 0, 0), m.Tiling(-8, 8, 0), m.Tiling(8, 8, 8), m.Tiling(2**40, 8, 64)])
def test_tiles_that_make_no_sense(daemon, tiling):
    """No tile size makes a worker hang, run out of memory, or die: a picture, or a typed error."""
    call = m.VaeDecode(m.ModelRef("vae", name="demo"), tiling)
    try:
        answer = daemon.client().call(call, [torch.zeros(1, 16, 16, 16)], deadline_s=10)
        assert answer.tensors[0].shape == (1, 128, 128, 3)
    except LunaError as error:
        assert isinstance(error, BadRequest), error


def test_an_empty_prompt_and_a_very_long_one(daemon):
    """No word is one chunk; 100,000 characters are many; a million and one are refused."""
    client = daemon.client()
    cond, pooled, *_ = client.clip_encode("", clip_type="tiny")
    assert cond.shape == (1, 77, 64) and pooled.shape == (1, 64) and bool(cond.isfinite().all())
    long = client.clip_encode("cat, " * 20_000, clip_type="tiny")[0]
    assert long.shape[1] > 77 * 400 and long.shape[1] % 77 == 0
    with pytest.raises(LimitExceeded, match="1000001 characters"):
        client.clip_encode("x" * 1_000_001, clip_type="tiny")
    client.unload()


TOKENS = {
    "no such token": {"l": [[(10**6, 1.0)] * 77]},
    "negative": {"l": [[(-1, 1.0)] * 77]},
    "too long a chunk": {"l": [[(1, 1.0)] * 500]},
    "another encoder's": {"g": [[(1, 1.0)] * 77]},
    "no chunk": {"l": []},
    "empty chunk": {"l": [[]]},
    "none": {},
}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_tokens_that_do_not_fit(daemon, tokens):
    """Token lists that no tokenizer made: a conditioning or a typed error, and the worker lives."""
    call = m.ClipEncode(m.ModelRef("clip", name="tiny"), tokens=tokens)
    try:
        assert daemon.client().call(call).tensors[0].isfinite().all()
    except LunaError as error:
        assert isinstance(error, BadRequest), error


def test_text_and_tokens(daemon):
    """Exactly one of them."""
    for fields in ({}, {"text": "a", "tokens": {"l": [[(1, 1.0)]]}}):
        with pytest.raises(BadRequest, match="one of text, tokens and packed"):
            daemon.client().call(m.ClipEncode(m.ModelRef("clip", name="tiny"), **fields))
