"""``luna-daemon top``: what it draws of an ``info``, at any width."""

from __future__ import annotations

import io
import os
import time
from typing import Any

import pytest
from rich.console import Console

from luna_daemon.commands.top import render, render_away

WORKER = {
    "number": 2, "pid": 7, "key": "diffusers@cpu", "device": "cpu", "state": "idle", "rss": 450 << 20, "requests": 12,
    "models": {"vae:sdxl_vae:0123": 160 << 20, "clip:clip_l:4567": 240 << 20}, "idle_s": 65.0, "threads": 2,
    "versions": {}, "last_error": "out of memory", "last_error_at": 1.0, "crashes": 1, "restarts": 1,
}  # fmt: skip


def info(**changes: Any) -> dict[str, Any]:
    """A document as ``info`` answers it."""
    cache = {"entries": 3, "bytes": 5 << 20, "max_bytes": 512 << 20, "hits": 9, "misses": 4}
    loras = {f"style {n}": {"bytes": n << 20, "hits": n, "last_used": float(n)} for n in range(1, 12)}
    client = {"name": "ComfyUI", "pid": 99, "shared_memory": True, "leased_bytes": 4096, "in_flight": 1}
    return {
        "version": "1.2.3", "status": "running", "pid": 42, "rss": 60 << 20, "uptime_s": 3700.0, "backend": "diffusers",
        "throughput_per_s": 2.5, "in_flight": 1, "requests": {"vae.decode": 700}, "errors": {"busy": 2}, "crashes": 1,
        "fallbacks": 0, "queue": {"waiting": 3, "oldest_s": 1.5, "average_wait_s": 0.02, "limit": 256},
        "workers": [WORKER], "caches": {"conditioning": cache, "lora": {**cache, "loras": loras}},
        "latency": {"vae.decode": {"count": 512, "p50_ms": 80.25, "p95_ms": 120.0, "mean_ms": 85.0}},
        "arena": {"folder": "/dev/shm/x", "used": 1 << 20, "max_bytes": 1 << 30},
        "clients": [client, {**client, "name": "top itself", "pid": os.getpid()}],
        "gpus": [{"index": 0, "name": "NVIDIA H100", "total": 80 << 30, "used": 20 << 30, "free": 60 << 30}],
        "scaling": [{"event": "model_loaded", "worker": 2, "key": "diffusers@cpu", "model": "sdxl_vae", "at": 0.0}],
        **changes,
    }  # fmt: skip


def drawn(document: Any, width: int) -> str:
    """As a terminal of this width shows it."""
    console = Console(file=io.StringIO(), width=width, height=80, markup=False, highlight=False)
    console.print(document)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [60, 80, 130, 200])
def test_everything_is_there_at_any_width(width):
    """State, load, workers, latency, caches, LoRA, GPUs, clients, events."""
    text = " ".join(drawn(render(info(), "127.0.0.1:19283", width), width).split())
    for words in (
        "Luna Daemon 1.2.3 running", "127.0.0.1:19283", "up 1 h 1 min", "2.5 requests/s", "queue 3 of 256", "20 ms",
        "crashes 1", "errors 2", "fallbacks 0", "450 MB", "80.2", "120.0", "700", "conditioning", "512 MB",
        "LoRAs: 8 of 11", "ComfyUI", "shared memory", "20.0 GB", "80.0 GB", "model loaded", "out of memory",
    ):  # fmt: skip
        assert words in text, words
    assert "top itself" not in text and "sdxl_vae" in text.replace(" ", "")


def test_loras_used_last_come_first():
    """Eight of them; the rest is counted in the title."""
    text = drawn(render(info(), "x", 80), 80)
    assert text.index("style 11") < text.index("style 10") < text.index("style 4")
    assert "style 3" not in text


def test_a_daemon_that_has_done_nothing_yet():
    """Says so instead of empty tables."""
    caches = info()["caches"]
    caches["lora"]["loras"] = {}
    bare = info(workers=[], latency={}, gpus=[], clients=[], scaling=[], caches=caches)
    bare["arena"] = {"folder": None, "why": "off", "used": 0, "max_bytes": 0}
    text = drawn(render(bare, "x", 80), 80)
    assert "No workers" in text and "No clients" in text
    assert "GPUs" not in text and "Latency" not in text and "LoRAs" not in text and "Recent events" not in text


def test_a_daemon_that_is_render_away():
    """Why, since when, and that it is asked again."""
    text = drawn(render_away("127.0.0.1:19283", "no Luna Daemon answers", None), 60)
    assert "away" in text and "no Luna Daemon answers" in text and "Last seen" not in text
    assert time.strftime("%H:%M:%S", time.localtime(0)) in drawn(render_away("x", "gone", 0.0), 60)
