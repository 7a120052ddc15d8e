"""Real models through a real daemon: the same bits as locally, caches, fallback, shared weights."""

from __future__ import annotations

import logging
import threading

import psutil
import pytest
import torch

from luna_daemon.backends.local import LocalCLIP, LocalVAE
from luna_daemon.core import ModelNotFound
from luna_daemon.proxy import DaemonCLIP, DaemonVAE
from luna_daemon.wire import messages as m
from tests.integration.conftest import DEMO_VAE


def config(clip_l) -> str:
    return f'[models.tiny]\nvae = ["{DEMO_VAE}"]\nclip = ["{clip_l}"]\ntype = "sd15"\n'


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The same number here and in the workers: it decides bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def daemon(start_module_daemon, clip_l, threads):
    return start_module_daemon(toml=config(clip_l), cpu_threads=threads)


@pytest.fixture(scope="module")
def local_vae():
    return LocalVAE(DEMO_VAE)


@pytest.fixture(scope="module")
def local_clip(clip_l):
    return LocalCLIP(clip_l, type="sd15")


@pytest.fixture
def pixels():
    return torch.rand(2, 72, 64, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("use_arena", [True, False])
def test_vae_gives_the_same_bits(daemon, local_vae, pixels, use_arena):
    """Encode and decode, whole and in tiles, equal the local model bit for bit, by shared memory and by TCP."""
    vae = DaemonVAE(vae_type="tiny", client=daemon.client(use_arena=use_arena))
    latents = local_vae.encode(pixels)
    assert torch.equal(vae.encode(pixels), latents)
    assert torch.equal(vae.decode(latents), local_vae.decode(latents))
    assert torch.equal(
        vae.encode_tiled(pixels, tile_x=32, tile_y=32, overlap=8),
        local_vae.encode_tiled(pixels, tile_x=32, tile_y=32, overlap=8),
    )
    assert torch.equal(
        vae.decode_tiled(latents, tile_x=4, tile_y=6, overlap=1),
        local_vae.decode_tiled(latents, tile_x=4, tile_y=6, overlap=1),
    )
    assert daemon.info()["fallbacks"] == 0


def test_inputs_of_any_layout(daemon, local_vae, pixels):
    """Inputs that are transposed, channels-first in memory, cropped or expanded give the same bits."""
    vae = DaemonVAE(vae_type="tiny", client=daemon.client())
    layouts = [
        pixels.transpose(1, 2),
        pixels.movedim(-1, 1).contiguous().movedim(1, -1),
        pixels[:, 4:60, 8:48],
        pixels.transpose(1, 2)[:, 3:59],
        pixels[:1].expand(3, -1, -1, -1),
        pixels.flip(2),
    ]
    for number, odd in enumerate(layouts):
        assert torch.equal(vae.encode(odd), local_vae.encode(odd)), number
    latents = local_vae.encode(pixels)
    assert torch.equal(vae.decode(latents.transpose(2, 3)), local_vae.decode(latents.transpose(2, 3)))


@pytest.mark.parametrize("text", ["", "a cat", "a (cat:1.4) and [a dog]", "word " * 200, "x" * 100_000])
def test_prompts_give_the_same_bits(daemon, local_clip, text):
    """Empty, weighted, long and absurdly long prompts equal the local encoder bit for bit."""
    clip = DaemonCLIP(clip_type="tiny", client=daemon.client())
    tokens = clip.tokenize(text)
    assert tokens == local_clip.tokenize(text)
    if len(text) < 10_000:
        cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
        mine, mine_pooled = local_clip.encode_from_tokens(tokens, return_pooled=True)
        assert torch.equal(cond, mine)
        assert torch.equal(pooled, mine_pooled)


def test_clip_skip(daemon, local_clip):
    """``clip_layer(-2)`` gives the penultimate layer, on the clone alone."""
    clip = DaemonCLIP(clip_type="tiny", client=daemon.client())
    skipped, mine = clip.clone(), local_clip.clone()
    skipped.clip_layer(-2)
    mine.clip_layer(-2)
    assert torch.equal(skipped.encode("a cat"), mine.encode("a cat"))
    assert not torch.equal(skipped.encode("a cat"), clip.encode("a cat"))


def test_scheduled_conditioning(daemon):
    """The form that samplers take: a list of a list, with the pooled output and what was added."""
    clip = DaemonCLIP(clip_type="tiny", client=daemon.client())
    ((cond, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"), add_dict={"guidance": 3.5})
    assert cond.shape == (1, 77, 768)
    assert extra["pooled_output"].shape == (1, 768)
    assert extra["guidance"] == 3.5


def test_repeated_prompts_come_from_the_cache(daemon):
    """A repeated prompt is a hit, equal, and the caller's own; another layer or weight is another prompt."""
    clip = DaemonCLIP(clip_type="tiny", client=daemon.client())
    first = clip.encode("a heron at dawn")
    kept = first.clone()
    hits = daemon.info()["caches"]["conditioning"]["hits"]
    first.zero_()
    assert torch.equal(clip.encode("a heron at dawn"), kept)
    assert daemon.info()["caches"]["conditioning"]["hits"] == hits + 1
    clip.clip_layer(-2)
    assert not torch.equal(clip.encode("a heron at dawn"), kept)
    assert daemon.info()["caches"]["conditioning"]["hits"] == hits + 1


def test_the_cache_answers_without_a_worker(start_daemon, clip_l):
    """A prompt that is kept is answered while the model is not even loaded; the setting turns that off."""
    daemon = start_daemon(toml=config(clip_l))
    clip = DaemonCLIP(clip_type="tiny", client=daemon.client())
    tokens = clip.tokenize("a cat")
    clip.encode_from_tokens(tokens)
    clip.encode("a dog")
    daemon.wait_for(lambda info: info["workers"])
    for worker in daemon.workers():
        worker.kill()
    daemon.wait_for(lambda info: not info["workers"])
    clip.encode_from_tokens(tokens)
    assert clip.tokenize("a cat") == tokens
    clip.encode("a dog")
    assert daemon.info()["workers"] == []


def test_fallback_and_return(start_daemon, clip_l, pixels, caplog):
    """Daemon away: the local model answers with one warning; daemon back: it is used again and knows of it."""
    daemon = start_daemon(toml=config(clip_l), cpu_threads=2)
    loads = []

    def load():
        loads.append(1)
        return LocalVAE(DEMO_VAE)

    vae = DaemonVAE(load, vae_type="tiny", client=daemon.client())
    expected = vae.encode(pixels)
    assert not loads
    daemon.stop()
    with caplog.at_level(logging.WARNING, "luna_daemon"):
        assert torch.equal(vae.encode(pixels), expected)
        assert torch.equal(vae.encode(pixels), expected)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "local model steps in" in caplog.text
        again = start_daemon(toml=config(clip_l), port=daemon.port, cpu_threads=2)
        assert torch.equal(vae.encode(pixels), expected)
        assert "is back" in caplog.text
    info = again.info()
    assert info["fallbacks"] == 2
    assert info["requests"]["vae.encode"] == 1
    assert loads == [1]


def test_no_fallback_without_a_source(start_daemon, pixels):
    """Without a local model the error comes through, and says what to do."""
    vae = DaemonVAE(vae_type="nope", client=start_daemon().client())
    with pytest.raises(ModelNotFound, match="'nope'"):
        vae.encode(pixels)


def test_warm_pin_unload(daemon):
    """A model can be loaded ahead and pinned; unloading gives it back and unpins it."""
    client = daemon.client()
    reference = m.ModelRef("vae", name="tiny")
    assert client.warm(reference, pin=True)["latent_channels"] == 16
    assert any(key.startswith("vae:luna_demo_vae") for key in client.models()["pinned"])
    client.unload(reference)
    info = daemon.wait_for(
        lambda info: not any(key.startswith("vae:luna_demo_vae") for key in info["models"]["loaded"]), 5
    )
    assert not info["models"]["pinned"]


def test_two_cpu_workers_share_the_weights(start_daemon, clip_l):
    """A second worker of one text encoder costs little more than its process: both map the same file."""
    daemon = start_daemon(
        toml=config(clip_l), cpu_threads=1, max_clip_workers=2, queue_threshold=1, scale_up_delay_sec=0.05,
        conditioning_cache_mb=0,
    )  # fmt: skip
    clip = DaemonCLIP(clip_type="tiny", client=daemon.client())
    tokens = clip.tokenize("a cat " * 150)

    def encode(number):
        mine = DaemonCLIP(clip_type="tiny", client=daemon.client())
        mine.encode_from_tokens({"l": [[(number, 1.0), *chunk[1:]] for chunk in tokens["l"]]})

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    workers = [worker for worker in daemon.info()["workers"] if worker["models"]]
    assert len(workers) == 2
    weights = clip_l.stat().st_size
    shared = [_mapped(worker["pid"], clip_l.name) for worker in workers]
    # The embedding table is a third of the file, and only the rows of used tokens are ever read.
    assert all(rss > 0.5 * weights for rss, _, _ in shared), shared
    assert all(pss < 0.6 * rss for rss, pss, _ in shared), shared
    assert all(private < 0.05 * weights for _, _, private in shared), shared


def _mapped(pid: int, name: str) -> tuple[int, int, int]:
    """Resident, proportional and private-dirty bytes of a mapped file in a process."""
    maps = [part for part in psutil.Process(pid).memory_maps() if part.path.endswith(name)]
    return tuple(sum(getattr(part, field) for part in maps) for field in ("rss", "pss", "private_dirty"))
