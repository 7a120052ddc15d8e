"""The proxies: the daemon's answer or the local model's, one warning, and never a crash repeated locally."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from luna_daemon.core import (
    BadRequest,
    Busy,
    DaemonConnectionError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFound,
    OutOfMemory,
    PoisonRequest,
    RequestCancelled,
    ShuttingDown,
)
from luna_daemon.proxy import DaemonCLIP, DaemonVAE
from luna_daemon.wire import messages as m
from tests.unit.fakes import Client, LocalCLIP, LocalVAE, answer

AWAY = DaemonConnectionError("no Luna Daemon answers")
PIXELS = torch.zeros(1, 8, 8, 3)
LATENTS = torch.ones(1, 4, 1, 1)
COND, POOLED = torch.zeros(1, 77, 8), torch.zeros(1, 8)
ENCODED = answer(COND, POOLED, result={"names": ["cond", "pooled_output"]})
TOKENS = {"l": [[(49406, 1.0), (320, 1.3)]]}


@pytest.fixture(autouse=True)
def warnings(caplog):
    """The package's log of this test."""
    caplog.set_level(logging.WARNING, "luna_daemon")
    return caplog


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# --- the daemon answers ------------------------------------------------------------------------------------------


def test_the_daemons_answer_is_returned_as_it_is():
    """Encode and decode send the tensor and give the answer's tensor, without a copy."""
    client = Client(answer(LATENTS))
    vae = DaemonVAE(vae_type="flux", client=client)
    assert vae.encode(PIXELS) is LATENTS and vae.decode(LATENTS) is LATENTS
    assert client.calls == [m.VaeEncode(m.ModelRef("vae", name="flux")), m.VaeDecode(m.ModelRef("vae", name="flux"))]
    assert [tensors[0] for tensors in client.tensors] == [PIXELS, LATENTS]


def test_the_local_model_is_not_touched_while_the_daemon_answers():
    """A callable source is not even called."""
    DaemonVAE(lambda: pytest.fail("loaded for nothing"), client=Client(answer(LATENTS))).encode(PIXELS)


def test_tiles_are_sent_as_given():
    """Sizes that were not given stay ComfyUI's defaults."""
    client = Client(answer(LATENTS))
    vae = DaemonVAE(client=client)
    vae.encode_tiled(PIXELS, 512, 256, overlap=32)
    vae.decode_tiled(LATENTS, tile_t=8, overlap_t=4)
    assert client.calls[0].tiling == m.Tiling(512, 256, 32, None, None)
    assert client.calls[1].tiling == m.Tiling(None, None, None, 8, 4)


def test_notes_become_warnings(warnings):
    """What the daemon had to do differently is told to the user."""
    DaemonVAE(client=Client(answer(LATENTS, notes=["decoded in tiles for lack of memory"]))).decode(LATENTS)
    assert said(warnings) == ["DaemonVAE: decoded in tiles for lack of memory"]


def test_properties_are_asked_for_once():
    """Ratios and channels come from the daemon with one call."""
    client = Client(answer(result={"latent_channels": 16, "downscale_ratio": 8, "upscale_ratio": 8}))
    vae = DaemonVAE(client=client)
    assert (vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio) == (16, 8, 8)
    assert vae.spacial_compression_encode() == vae.spacial_compression_decode() == 8
    assert client.calls == [m.ModelLoad(m.ModelRef("vae", name="sdxl"))]


def test_a_model_by_files(tmp_path):
    """Files travel with their identity, and the type is their family."""
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"12345")
    client = Client(answer(LATENTS))
    DaemonVAE(vae_type="flux", files=[file], client=client).decode(LATENTS)
    (sent,) = client.calls[0].model.files
    assert (sent.path, sent.size, client.calls[0].model.type, client.calls[0].model.name) == (str(file), 5, "flux", "")


def test_callbacks_reach_the_client():
    """Progress and cancelling of a node are passed on with every call."""
    client = Client(answer(LATENTS))
    vae = DaemonVAE(client=client)
    vae.on_progress, vae.is_cancelled = print, lambda: False
    vae.decode(LATENTS)
    assert client.options == [{"on_progress": print, "is_cancelled": vae.is_cancelled}]


def test_old_arguments_are_accepted():
    """``source_vae``, ``vae_type`` and ``use_existing`` by place or name, as the predecessor took them."""
    client = Client(answer(LATENTS))
    assert DaemonVAE(None, "sdxl", True, client=client).decode(LATENTS) is LATENTS
    assert DaemonVAE(source_vae=LocalVAE(), vae_type="sdxl", use_existing=True, client=client).vae_type == "sdxl"
    assert DaemonCLIP(None, "flux", True, client=client).clip_type == "flux"
    assert DaemonCLIP(source_clip=None, clip_type="sdxl", use_existing=False, client=client).layer_idx is None


# --- the daemon is away ------------------------------------------------------------------------------------------


def test_many_calls_one_warning(warnings):
    """Without a daemon every call is answered locally, and the log says so once."""
    client = Client(AWAY)
    vae = DaemonVAE(LocalVAE(), client=client)
    assert [vae.encode(PIXELS) for _ in range(20)] == ["local latents"] * 20
    assert vae.decode(LATENTS) == "local pixels"
    assert said(warnings) == ["DaemonVAE: the local model steps in: no Luna Daemon answers"]
    assert client.fallbacks == 21 and len(client.calls) == 21


def test_back_to_the_daemon_with_a_message(warnings):
    """Once the daemon answers it is used again, says so once, and is told what was done without it."""
    client = Client(AWAY, AWAY, answer(LATENTS), answer(LATENTS), AWAY)
    vae = DaemonVAE(LocalVAE(), client=client)
    results = [vae.encode(PIXELS) for _ in range(5)]
    assert [result if isinstance(result, str) else "daemon" for result in results] == [
        "local latents", "local latents", "daemon", "daemon", "local latents",
    ]  # fmt: skip
    assert [text.split(": ")[1].split(" (")[0] for text in said(warnings)] == [
        "the local model steps in", "the daemon is back and is used again", "the local model steps in",
    ]  # fmt: skip
    assert client.told == 2 and client.fallbacks == 1


@pytest.mark.parametrize(
    "error",
    [AWAY, ShuttingDown("x"), ModelNotFound("x"), ModelMismatchError("x"), ModelLoadError("x")],
    ids=lambda error: error.code,
)
def test_where_the_local_model_steps_in(error):
    """Away, stopping, or without this model: the local model can do it."""
    assert DaemonVAE(LocalVAE(), client=Client(error)).decode(LATENTS) == "local pixels"


@pytest.mark.parametrize(
    "error",
    [PoisonRequest("x"), BadRequest("x"), OutOfMemory("x"), RequestCancelled("x")],
    ids=lambda error: error.code,
)
def test_where_it_never_does(error, warnings):
    """What crashed a worker, is wrong, or was cancelled is raised: the local model would crash or fail as well."""
    vae = DaemonVAE(lambda: pytest.fail("loaded though the daemon refused"), client=Client(error))
    with pytest.raises(type(error)):
        vae.decode(LATENTS)
    assert said(warnings) == [] and vae.client.fallbacks == 0


def test_without_a_local_model_the_error_is_raised():
    """No source: the caller reads what is wrong and what to do."""
    with pytest.raises(DaemonConnectionError, match="no Luna Daemon answers"):
        DaemonVAE(client=Client(AWAY)).decode(LATENTS)


def test_an_error_that_is_not_ours_is_raised():
    """A bug is no reason to compute locally."""

    class Broken(Client):
        def call(self, *args, **options):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        DaemonVAE(LocalVAE(), client=Broken(AWAY)).decode(LATENTS)


def test_a_callable_source_is_called_once():
    """The local model is loaded when it is first needed, and kept."""
    loaded = []

    def load():
        loaded.append(LocalVAE())
        return loaded[-1]

    vae = DaemonVAE(load, client=Client(answer(LATENTS), AWAY))
    vae.decode(LATENTS)
    assert loaded == []
    for _ in range(3):
        vae.decode(LATENTS)
    assert len(loaded) == 1


def test_a_loaded_model_that_can_be_called_is_not_called():
    """A torch module is callable, and is the model itself."""

    class Module(LocalVAE):
        def __call__(self):
            pytest.fail("the model was taken for a loader")

    assert DaemonVAE(Module(), client=Client(AWAY)).decode(LATENTS) == "local pixels"


def test_a_loader_that_fails_is_raised():
    """The local file is missing too: its own error is what the user needs."""

    def load():
        raise FileNotFoundError("vae.safetensors")

    with pytest.raises(FileNotFoundError):
        DaemonVAE(load, client=Client(AWAY)).decode(LATENTS)


def test_the_local_model_gets_only_the_tiles_given():
    """Its own defaults hold for the rest."""
    local = LocalVAE()
    vae = DaemonVAE(local, client=Client(AWAY))
    vae.encode_tiled(PIXELS, tile_x=256)
    vae.decode_tiled(LATENTS)
    assert local.tilings == [{"tile_x": 256}, {}]


# --- a full queue ------------------------------------------------------------------------------------------------


def test_a_full_queue_is_waited_for(warnings):
    """Busy is no reason for a second copy of the model: ask again, quietly."""
    client = Client(Busy("full", retry_after_s=0.01), Busy("full", retry_after_s=0.01), answer(LATENTS))
    vae = DaemonVAE(lambda: pytest.fail("loaded though the daemon lives"), client=client)
    assert vae.decode(LATENTS) is LATENTS
    assert len(client.calls) == 3 and said(warnings) == []


def test_waiting_for_a_full_queue_can_be_cancelled():
    """A user who presses cancel does not wait for other people's queue, however long it stays full."""
    client = Client(Busy("full", retry_after_s=0.001), most_calls=50)
    vae = DaemonVAE(LocalVAE(), client=client)
    vae.is_cancelled = lambda: len(client.calls) >= 2
    with pytest.raises(RequestCancelled):
        vae.decode(LATENTS)


# --- copies ------------------------------------------------------------------------------------------------------


def test_a_deep_copy_is_the_proxy_itself():
    """ComfyUI deep-copies options that hold a VAE: neither connection nor local model are copied."""
    vae = DaemonVAE(LocalVAE(), client=Client(answer(LATENTS)))
    clip = DaemonCLIP(LocalCLIP(), client=Client(ENCODED))
    assert copy.deepcopy({"vae": vae})["vae"] is vae and copy.deepcopy(clip) is clip


@pytest.mark.parametrize("duplicate", [DaemonCLIP.clone, copy.copy], ids=["clone", "copy"])
def test_a_clone_has_its_own_clip_skip(duplicate):
    """Setting the layer of a clone does not touch the original; model and client are shared."""
    clip = DaemonCLIP(LocalCLIP(), "flux", client=Client(ENCODED))
    clip.clip_layer(-2)
    other = duplicate(clip)
    assert type(other) is DaemonCLIP and other.layer_idx == -2
    other.clip_layer(-3)
    assert (clip.layer_idx, other.layer_idx) == (-2, -3)
    assert other.client is clip.client and other.model == clip.model


def test_a_clone_of_a_subclass_is_one():
    """The ComfyUI shells are subclasses: a LoRA loader's clone stays one."""

    class Shell(DaemonCLIP):
        pass

    assert type(Shell(client=Client(ENCODED)).clone()) is Shell


def test_clones_load_the_local_model_once(warnings):
    """Every LoRA loader clones: they share one local model, loaded after the cloning or before, and one warning."""
    loaded = []

    def load():
        loaded.append(LocalCLIP())
        return loaded[-1]

    clip = DaemonCLIP(load, client=Client(AWAY))
    for proxy in (clip, clip.clone(), copy.copy(clip)):
        proxy.encode_from_tokens(TOKENS)
    assert len(loaded) == 1 and len(said(warnings)) == 1


# --- text encoders -----------------------------------------------------------------------------------------------


def test_tokens_are_plain_data():
    """Lists of the wire become the tuples that ComfyUI's code unpacks."""
    clip = DaemonCLIP(client=Client(answer(result={"tokens": {"l": [[[49406, 1.0], [320, 1.3]]]}})))
    assert clip.tokenize("a (cat:1.3)") == TOKENS
    assert clip.client.calls == [m.ClipTokenize(m.ModelRef("clip", name="sdxl"), "a (cat:1.3)")]


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, "cond"), ({"return_pooled": True}, "pair"), ({"return_pooled": "unprojected"}, "pair"),
        ({"return_dict": True}, "dict"), ({"return_dict": True, "return_pooled": True}, "dict"),
    ],
)  # fmt: skip
def test_the_three_forms_of_an_answer(options, shape):
    """Conditioning alone, with pooled output, or as a dictionary."""
    clip = DaemonCLIP(client=Client(ENCODED))
    result = clip.encode_from_tokens(TOKENS, **options)
    if shape == "dict":
        assert list(result) == ["cond", "pooled_output"]
        result = tuple(result.values())
    cond, *pooled = result if shape != "cond" else [result]
    assert cond is COND and [part is POOLED for part in pooled] == [True] * (shape != "cond")
    assert clip.client.calls[0].unprojected is (options.get("return_pooled") == "unprojected")


def test_conditioning_for_a_sampler():
    """``[[cond, {"pooled_output": ..., and what was added}]]``, with pooled output in any case."""
    clip = DaemonCLIP(client=Client(ENCODED))
    [[cond, rest]] = clip.encode_from_tokens_scheduled(TOKENS, add_dict={"guidance": 3.5})
    assert cond is COND and rest == {"pooled_output": POOLED, "guidance": 3.5}


def test_clip_skip_is_sent():
    """The layer of the proxy goes with every call; none is the family's own."""
    clip = DaemonCLIP(client=Client(ENCODED))
    clip.encode_from_tokens(TOKENS)
    clip.clip_layer(-2)
    clip.encode_from_tokens(TOKENS)
    assert [call.layer for call in clip.client.calls] == [None, -2]


def test_clip_skip_is_applied_locally_to_a_clone():
    """The local model is cloned first: other users of it keep their own layer."""
    local = LocalCLIP()
    clip = DaemonCLIP(local, client=Client(AWAY))
    clip.clip_layer(-2)
    assert clip.encode_from_tokens(TOKENS)["cond"] == "local, layer -2"
    assert local.layer is None
    assert clip.clone().encode_from_tokens(TOKENS)["cond"] == "local, layer -2"


def test_word_ids_are_not_sent():
    """Tokens with word ids encode like those without: the ids stay here, and the local model gets them all."""
    clip = DaemonCLIP(client=Client(ENCODED))
    clip.encode_from_tokens({"l": [[(49406, 1.0, 0), (320, 1.3, 1)]]})
    assert clip.client.calls[0].tokens == TOKENS


@pytest.mark.parametrize(
    "tokens",
    [{"l": [[(torch.zeros(768), 1.0)]]}, {"l": [[("cat", 1.0)]]}, {"l": [[5]]}, {"l": 5}, {"l": [[()]]}],
)
def test_what_is_no_token_is_refused_before_sending(tokens):
    """An embedding among the tokens, words, or other shapes are a typed error, and nothing is sent."""
    clip = DaemonCLIP(client=Client(ENCODED))
    with pytest.raises(BadRequest, match="tokens"):
        clip.encode_from_tokens(tokens)
    assert clip.client.calls == []


def test_word_ids_come_from_a_local_tokenizer():
    """The daemon does not make them: the local model does, and without one the error says what to give."""
    clip = DaemonCLIP(LocalCLIP(), client=Client(ENCODED))
    assert clip.tokenize("cat", return_word_ids=True) == {"l": [[(7, 1.0, 1)]]}
    with pytest.raises(BadRequest, match=r"return_word_ids.*Give source_clip"):
        DaemonCLIP(client=Client(ENCODED)).tokenize("cat", return_word_ids=True)


def test_a_local_tokenizer_is_no_outage(warnings):
    """Word ids from the local tokenizer are not reported as a daemon that went away and came back."""
    clip = DaemonCLIP(LocalCLIP(), client=Client(ENCODED))
    for _ in range(3):
        clip.encode_from_tokens(clip.tokenize("cat", return_word_ids=True))
    assert len(said(warnings)) <= 1


def test_encoding_text():
    """``encode`` is one call of the daemon, which a cache can answer; without the daemon it is done locally."""
    client = Client(ENCODED)
    assert DaemonCLIP(client=client).encode("cat") is COND
    assert [(type(call), call.text) for call in client.calls] == [(m.ClipEncode, "cat")]
    assert DaemonCLIP(LocalCLIP(), client=Client(AWAY)).encode("cat")["cond"] == "local, layer None"
