"""The figures for Prometheus, from the daemon's state: names, labels, values, and that labels stay few and quiet."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from luna_daemon.config import load_settings
from luna_daemon.control.access import Access
from luna_daemon.control.state import State
from luna_daemon.files.resolver import ModelResolver
from luna_daemon.pool.process import WorkerKey, WorkerProcess
from luna_daemon.status.metrics import render
from luna_daemon.wire.shared_memory import SharedMemory
from luna_daemon.workers import WorkerPool

GPU = {"index": 1, "name": 'RTX "6000"', "uuid": "GPU-1", "total": 48 << 30, "used": 12 << 30, "free": 36 << 30}


@pytest.fixture
def state(tmp_path) -> State:
    """The state of a daemon that nobody has connected to, without shared memory."""
    settings = load_settings({}, {})
    pool = WorkerPool(settings, tmp_path)
    access = Access("token", "nowhere", lambda: "token")
    return State(
        settings, pool, ModelResolver(settings), SharedMemory(None, "off"), access, lambda state: {}, lambda: None, dict
    )


def figures(state: State, accept: str = "") -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, in the order of their names."""
    text, _ = asyncio.run(render(state, WATCHERS, accept))
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


class Watching:
    """Three WebSockets."""

    dropped = 2

    def __len__(self) -> int:
        return 3


WATCHERS = Watching()


def test_a_daemon_that_has_done_nothing(state):
    """Every plain figure is there from the start, so that rates do not begin with a gap."""
    found = figures(state)
    for name in ("luna_queue_depth", "luna_client_fallbacks_total", "luna_arena_used_bytes", "luna_requests_in_flight"):
        assert found[(name,)] == 0
    assert found["luna_queue_wait_seconds_count",] == 0 and found["luna_ready",] == 1
    assert found["luna_workers", "busy"] == 0 and found["luna_clients", "tcp"] == 0
    assert (found["luna_watchers",], found["luna_watchers_dropped_total",]) == (3, 2)


def test_gpus(state):
    """By number, name and UUID, whatever the name holds."""
    state.gpus = [GPU, {**GPU, "index": 0, "uuid": "GPU-0", "used": 0}]
    found = figures(state)
    assert found["luna_gpu_memory_used_bytes", "1", 'RTX "6000"', "GPU-1"] == 12 << 30
    assert found["luna_gpu_memory_used_bytes", "0", 'RTX "6000"', "GPU-0"] == 0
    assert found["luna_gpu_memory_total_bytes", "1", 'RTX "6000"', "GPU-1"] == 48 << 30


def test_workers_and_their_models(state, tmp_path):
    """Models of one name in one worker are summed: two files of one name are no error of the scrape."""
    worker = WorkerProcess(4, WorkerKey("diffusers", "cpu"), "cpu", 1, {}, tmp_path / "log")
    worker.models = {"vae:ae:01": 100, "vae:ae:02": 50, "clip:ae:03": 7}
    worker.rss = 1000
    state.pool.workers.append(worker)
    found = figures(state)
    assert found["luna_model_bytes", "vae", "ae", "4"] == 150 and found["luna_model_bytes", "clip", "ae", "4"] == 7
    assert found["luna_workers", "starting"] == 1
    assert found["luna_worker_resident_memory_bytes", "cpu", "4"] == 1000


def test_events_become_counters(state):
    """Results by op, restarts and crashes by key, events by name."""
    events = state.events
    events.request("vae.decode", "ae", 0.3)
    events.request("vae.decode", "ae", 700.0, "worker_crashed")
    events.scaling("worker_started", 1, "diffusers@cpu")
    events.worker_crashed(1, "diffusers@cpu", "killed")
    events.scaling("worker_started", 2, "diffusers@cpu")
    events.waits.add(2.0)
    found = figures(state)
    assert found["luna_requests_total", "vae.decode", "ok"] == 1
    assert found["luna_requests_total", "vae.decode", "worker_crashed"] == 1
    assert found["luna_request_duration_seconds_count", "ae", "vae.decode"] == 1
    assert found["luna_worker_crashes_total", "diffusers@cpu"] == 1
    assert found["luna_worker_restarts_total", "diffusers@cpu"] == 1
    assert found["luna_scale_events_total", "worker_started"] == 2
    assert found["luna_queue_wait_seconds_sum",] == 2.0


def test_loras_without_their_folders(state, monkeypatch):
    """A LoRA that was named by its path is shown by its name; figures that its cache does not have are left out."""
    loras = {
        "/home/me/style.safetensors": {"bytes": 5, "hits": 1, "last_used": 9.0, "load_s": 0.5, "pinned": True},
        "ink/wash": {"bytes": 6, "hits": 2, "last_used": 8.0},
    }
    stats = {"entries": 2, "bytes": 11, "max_bytes": 100, "hits": 3, "misses": 2, "loras": loras}
    monkeypatch.setattr(state, "loras", SimpleNamespace(stats=lambda: stats))
    found = figures(state)
    assert found["luna_lora_hits_total", "style.safetensors"] == 1 and found["luna_lora_bytes", "ink/wash"] == 6
    assert found["luna_lora_load_seconds", "style.safetensors"] == 0.5
    assert found["luna_lora_pinned", "style.safetensors"] == 1
    assert ("luna_lora_load_seconds", "ink/wash") not in found
    assert found["luna_cache_bytes", "lora"] == 11 and found["luna_cache_misses_total", "lora"] == 2
