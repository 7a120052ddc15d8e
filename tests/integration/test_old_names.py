"""Every name of the predecessor still works, each with a real daemon and real models."""

from __future__ import annotations

import inspect

import pytest
import torch

from luna_daemon import client as old
from luna_daemon.core import DaemonConnectionError, LunaError, ModelMismatchError, ServiceType
from luna_daemon.daemon_server import LunaDaemon
from luna_daemon.proxy import DaemonCLIP, DaemonVAE
from tests.integration.conftest import DEMO_VAE


@pytest.fixture(scope="module")
def daemon(start_module_daemon, clip_l):
    return start_module_daemon(toml=f'[models.tiny]\nvae = ["{DEMO_VAE}"]\nclip = ["{clip_l}"]\ntype = "sd15"\n')


@pytest.fixture(autouse=True)
def default_client(daemon, monkeypatch):
    """The module's functions find the daemon as a user's do: by the settings."""
    monkeypatch.setenv("LUNA_PORT", str(daemon.port))
    monkeypatch.setenv("LUNA_RUNTIME_DIR", str(daemon.runtime_dir))
    yield
    old.reset_clients()


@pytest.fixture
def pixels():
    return torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(0))


def test_get_client():
    """``get_client`` is one client for all functions."""
    assert old.get_client() is old.get_client()


def test_is_daemon_running(monkeypatch):
    """``is_daemon_running`` tells a daemon from none."""
    assert old.is_daemon_running()
    old.reset_clients()
    monkeypatch.setenv("LUNA_PORT", "1")
    assert not old.is_daemon_running()


@pytest.mark.parametrize("name", ["get_daemon_info", "get_info"])
def test_info(name):
    """``get_daemon_info`` and ``get_info`` return the full statistics, with the shapes that scripts rely on."""
    info = getattr(old, name)()
    assert {"uptime_s", "version", "queue", "workers", "models", "caches", "gpus", "limits", "transport"} <= set(info)
    assert all(isinstance(count, int) for count in info["requests"].values())
    assert all(isinstance(info[name], int) for name in ("in_flight", "fallbacks", "materialised"))


def test_vae_encode_and_decode(pixels):
    """``vae_encode`` and ``vae_decode`` keep ComfyUI's shapes and range."""
    latents = old.vae_encode(pixels, "tiny")
    assert latents.shape == (1, 16, 8, 6)
    decoded = old.vae_decode(latents, vae_type="tiny")
    assert decoded.shape == pixels.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


def test_vae_tiled(pixels):
    """``tiled``, ``tile_size`` and ``overlap`` of both VAE functions cut the work into tiles."""
    whole = old.vae_encode(pixels, "tiny")
    tiled = old.vae_encode(pixels, "tiny", tiled=True, tile_size=32, overlap=8)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert old.vae_decode(whole, "tiny", tiled=True, tile_size=4, overlap=1).shape == pixels.shape


def test_clip_encode():
    """``clip_encode`` gives four tensors: cond, pooled, uncond, negative pooled."""
    cond, pooled, uncond, negative = old.clip_encode("a cat", "a dog", "tiny")
    assert cond.shape == uncond.shape == (1, 77, 768)
    assert pooled.shape == negative.shape == (1, 768)
    assert not torch.equal(cond, uncond)
    with pytest.raises(LunaError, match="lora_stack"):
        old.clip_encode("a cat", "", "tiny", lora_stack=[{"hash": "x", "strength": 1.0}])


def test_clip_encode_sdxl():
    """``clip_encode_sdxl`` gives conditioning with SDXL's sizes."""
    positive, negative = old.clip_encode_sdxl("a cat", "a dog", "tiny", width=832, target_height=1216)
    assert positive[0][1]["width"] == 832
    assert negative[0][1]["target_height"] == 1216
    assert positive[0][1]["pooled_output"].shape == (1, 768)


def test_clip_tokenize_and_encode_from_tokens():
    """``clip_tokenize`` and ``clip_encode_from_tokens`` together equal ``clip_encode``."""
    tokens = old.clip_tokenize("a (cat:1.3)", "tiny")
    assert [len(chunk) for chunk in tokens["l"]] == [77]
    assert {weight for _, weight in tokens["l"][0]} == {1.0, 1.3}
    cond, pooled = old.clip_encode_from_tokens(tokens, "tiny", return_pooled=True)
    assert torch.equal(cond, old.clip_encode("a (cat:1.3)", "", "tiny")[0])
    assert torch.equal(old.clip_encode_from_tokens(tokens, "tiny", return_dict=True)["pooled_output"], pooled)


def test_lora_cache():
    """``lora_cache_put``, ``_get``, ``_check`` and ``_stats``: what comes back is equal and the caller's own."""
    weights = {"up": torch.rand(300, 400), "alpha": torch.tensor(4.0), "down": torch.rand(4, 8).to(torch.bfloat16)}
    assert not old.lora_cache_check("style")
    assert old.lora_cache_get("style") is None
    assert old.lora_cache_put("style", weights)
    assert old.lora_cache_check("style")
    mine = old.lora_cache_get("style")
    assert all(torch.equal(mine[key], weights[key]) for key in weights)
    mine["up"].zero_()
    assert torch.equal(old.lora_cache_get("style")["up"], weights["up"])
    assert old.lora_cache_stats()["entries"] >= 1


def test_has_and_upload_lora():
    """``upload_lora`` and ``has_lora`` are the same cache under its older names."""
    assert not old.has_lora("ab12")
    assert old.upload_lora("ab12", {"w": torch.zeros(3)})["success"]
    assert old.has_lora("ab12")


@pytest.mark.parametrize("name", ["register_vae", "register_clip"])
def test_registration(name):
    """``register_vae`` and ``register_clip`` answer success and load nothing."""
    before = old.get_info()["models"]["loaded"]
    assert getattr(old, name)(object(), "tiny")["success"]
    assert old.get_info()["models"]["loaded"] == before


def test_proxies_take_use_existing(pixels):
    """``DaemonVAE(use_existing=)`` and ``DaemonCLIP(use_existing=)`` work without a source."""
    assert DaemonVAE(None, vae_type="tiny", use_existing=True).encode(pixels).shape == (1, 16, 8, 6)
    assert DaemonCLIP(None, clip_type="tiny", use_existing=True).encode("a cat").shape == (1, 77, 768)


def test_exceptions():
    """``DaemonConnectionError`` and ``ModelMismatchError`` are importable from the client."""
    assert old.DaemonConnectionError is DaemonConnectionError
    assert old.ModelMismatchError is ModelMismatchError


def test_daemon_arguments():
    """``LunaDaemon`` takes the predecessor's arguments, and ``run`` is there."""
    daemon = LunaDaemon(device="cpu", clip_precision="fp32", vae_precision="bf16", service_type="vae_only")
    assert (daemon.settings.vae_device, daemon.settings.clip_device) == ("cpu", "cpu")
    assert (daemon.settings.clip_precision, daemon.settings.vae_precision) == ("fp32", "bf16")
    assert daemon.settings.service_type is ServiceType.VAE_ONLY
    assert callable(daemon.run)


def test_server_module_reexports():
    """``luna_daemon.server`` still has the daemon."""
    from luna_daemon import server

    assert server.LunaDaemon is LunaDaemon


def test_client_methods_match_the_functions():
    """Every function is a method too, with the same first arguments."""
    for name in ("vae_encode", "vae_decode", "clip_encode", "clip_tokenize", "lora_cache_get", "register_vae"):
        function = list(inspect.signature(getattr(old, name)).parameters)
        method = list(inspect.signature(getattr(old.DaemonClient, name)).parameters)
        assert method[1:] == function
