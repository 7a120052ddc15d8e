"""DaemonClient: the predecessor's calls as messages, and what it refuses to pretend. No socket is opened."""

from __future__ import annotations

import inspect

import pytest
import torch

from luna_daemon import client as module
from luna_daemon.client import Answer, DaemonClient
from luna_daemon.core import BadRequest, DaemonConnectionError, LunaError
from luna_daemon.wire import messages as m
from tests.unit.fakes import answer

COND, POOLED = torch.zeros(1, 77, 8), torch.zeros(1, 8)
SDXL = m.ModelRef("vae", name="sdxl")
ENCODED = answer(COND, POOLED, result={"names": ["cond", "pooled_output"]})


class Recording(DaemonClient):
    """A client whose calls end here."""

    def __init__(self, reply: Answer | LunaError) -> None:
        super().__init__("127.0.0.1", 1, runtime_dir="/nowhere", name="test")
        self.reply = reply
        self.calls: list[m.Call] = []
        self.tensors: list[torch.Tensor] = []

    def call(self, call, tensors=(), **options):
        self.calls.append(call)
        self.tensors += tensors
        if isinstance(self.reply, LunaError):
            raise self.reply
        return self.reply


@pytest.mark.parametrize(
    "method, arguments, sent",
    [
        ("vae_encode", (COND,), m.VaeEncode(SDXL)),
        ("vae_encode", (COND, "sdxl", True, 256, 32), m.VaeEncode(SDXL, m.Tiling(256, 256, 32))),
        ("vae_decode", (COND, "flux"), m.VaeDecode(m.ModelRef("vae", name="flux"))),
        ("vae_decode", (COND, "sdxl", True), m.VaeDecode(SDXL, m.Tiling(64, 64, 16))),
    ],
)
def test_vae_calls(method, arguments, sent):
    """Model name and tiles travel; the answer's tensor is returned as it is."""
    client = Recording(answer(COND))
    assert getattr(client, method)(*arguments) is COND
    assert client.calls == [sent] and client.tensors[0] is COND


def test_both_prompts_in_four_tensors():
    """``cond, pooled, uncond, pooled_negative``, in the predecessor's order."""
    client = Recording(ENCODED)
    assert [part is COND for part in client.clip_encode("a cat", "ugly")] == [True, False, True, False]
    assert [call.text for call in client.calls] == ["a cat", "ugly"]


def test_sdxl_sizes_are_added():
    """The conditioning carries every size, for both prompts."""
    positive, negative = Recording(ENCODED).clip_encode_sdxl("a", "b", width=832, crop_h=4)
    for [[cond, rest]] in (positive, negative):
        assert cond is COND and rest.pop("pooled_output") is POOLED
        assert rest == {
            "width": 832, "height": 1024, "crop_w": 0, "crop_h": 4, "target_width": 1024, "target_height": 1024,
        }  # fmt: skip


@pytest.mark.parametrize("call", ["clip_encode", "clip_encode_sdxl", "clip_encode_from_tokens"])
def test_a_lora_stack_is_refused(call):
    """Encoding without the LoRAs that were asked for would be a silent lie."""
    client = Recording(ENCODED)
    with pytest.raises(BadRequest, match="lora_stack with 1 entries"):
        getattr(client, call)("x", lora_stack=[("a", 1.0, 1.0)])
    assert client.calls == []


def test_word_ids_are_refused():
    """The daemon's tokenizer does not make them."""
    with pytest.raises(BadRequest, match="return_word_ids"):
        Recording(ENCODED).clip_tokenize("cat", return_word_ids=True)


def test_encode_from_tokens_has_three_forms():
    """Conditioning, with pooled output, or as a dictionary."""
    client = Recording(ENCODED)
    tokens = {"l": [[(1, 1.0)]]}
    assert client.clip_encode_from_tokens(tokens) is COND
    assert client.clip_encode_from_tokens(tokens, return_pooled=True) == (COND, POOLED)
    assert client.clip_encode_from_tokens(tokens, return_dict=True) == {"cond": COND, "pooled_output": POOLED}


def test_a_lora_that_is_not_there_is_none():
    """A miss is ``None``, as the predecessor had it; a hit is a state dict."""
    assert Recording(answer(result={"keys": None})).lora_cache_get("x") is None
    assert Recording(answer(COND, result={"keys": ["a"]})).lora_cache_get("x") == {"a": COND}


def test_a_lora_is_sent_with_its_keys():
    """Keys and tensors travel in the same order; the legacy name says success."""
    client = Recording(answer())
    assert client.upload_lora("x", {"b": COND, "a": POOLED}) == {"success": True}
    assert client.calls == [m.LoraPut("x", ["b", "a"])]
    assert client.tensors[0] is COND and client.tensors[1] is POOLED


@pytest.mark.parametrize("error", [DaemonConnectionError("away"), BadRequest("no")])
def test_is_running_never_raises(error):
    """Whatever is wrong, the answer is no."""
    assert Recording(error).is_running() is False
    assert Recording(answer()).is_running() is True


def test_fallbacks_are_told_once():
    """The daemon hears the number once, and nothing when there is nothing to tell."""
    client = Recording(answer())
    client.fallbacks = 3
    client.report_pending()
    client.report_pending()
    assert client.calls == [m.Report(fallbacks=3)] and client.fallbacks == 0
    client.count_materialised()
    client.report_pending()
    assert client.calls[1:] == [m.Report(materialised=1)]


def test_fallbacks_that_could_not_be_told_are_told_later():
    """A report that fails neither raises nor loses the number."""
    client = Recording(DaemonConnectionError("away"))
    client.fallbacks = 3
    client.report_pending()
    client.count_materialised()
    assert client.fallbacks == 3
    client.reply = answer()
    client.report_pending()
    assert client.calls[-1] == m.Report(3, 1)


def test_nothing_is_connected_before_the_first_call():
    """Making a client needs no daemon; the first call says that there is none."""
    client = DaemonClient("127.0.0.1", 1, runtime_dir="/nowhere")
    with client, pytest.raises(DaemonConnectionError, match="luna-daemon serve"):
        client.ping()


def test_the_functions_share_one_client(monkeypatch):
    """The predecessor's functions use one default client, until it is reset."""
    monkeypatch.setenv("LUNA_PORT", "1")
    module.reset_clients()
    try:
        assert module.get_client() is module.get_client() and module.get_client().port == 1
        first = module.get_client()
        assert module.is_daemon_running() is False
        module.reset_clients()
        assert module.get_client() is not first
    finally:
        module.reset_clients()


def test_every_method_has_its_function():
    """Each function of the module that names a method of the client calls it with the same arguments."""
    names = {"vae_encode", "vae_decode", "clip_encode", "clip_encode_sdxl", "clip_tokenize", "clip_encode_from_tokens",
             "lora_cache_get", "lora_cache_put", "lora_cache_check", "lora_cache_stats", "has_lora", "upload_lora",
             "register_vae", "register_clip", "get_daemon_info", "get_info"}  # fmt: skip
    assert names <= set(module.__all__)
    assert all(callable(getattr(DaemonClient, name)) for name in names)


def test_functions_have_the_methods_signature(monkeypatch):
    """An editor shows a function's own parameters and text; the call reaches the default client as it was made."""
    client = Recording(answer(COND))
    monkeypatch.setattr(module, "_default", client)
    assert str(inspect.signature(module.vae_decode)).startswith("(latents: 'torch.Tensor', vae_type: 'str' = 'sdxl'")
    assert module.vae_decode.__doc__ == DaemonClient.vae_decode.__doc__
    assert module.vae_decode(COND, tiled=True, overlap=8) is COND
    assert client.calls == [m.VaeDecode(SDXL, m.Tiling(64, 64, 8))] and module.is_daemon_running()
