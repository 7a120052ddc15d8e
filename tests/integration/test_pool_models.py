"""The pool with real models: one computation for many callers, a memory budget, and when a second worker pays."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

from luna_daemon.core import ModelLoadError, Priority
from luna_daemon.wire import messages as m
from tests.integration.helpers import DEMO_VAE, Background

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals hold the worker")

ONE, TWO = m.VaeDecode(m.ModelRef("vae", name="one")), m.VaeDecode(m.ModelRef("vae", name="two"))


@pytest.fixture(scope="module")
def daemon(start_module_daemon, tmp_path_factory):
    """One worker with one thread, two models of different files, and a budget that holds one of them."""
    folder = tmp_path_factory.mktemp("copies")
    toml = ""
    for name in ("one", "two"):
        path = folder / f"{name}.safetensors"
        path.write_bytes(DEMO_VAE.read_bytes())
        toml += f'[models.{name}]\nvae = ["{path.as_posix()}"]\ntype = "sd3"\n'
    # float16 on disk, float32 in memory: one is two of the file, and the next would be counted as one more.
    budget = 2.5 * DEMO_VAE.stat().st_size / (1 << 30)
    daemon = start_module_daemon(toml=toml, cpu_threads=1, max_vae_workers=1, model_memory_gb=budget)
    daemon.client().call(ONE, [noise()])
    return daemon


def noise(size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, size, size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def held(daemon):
    """The daemon's only worker stands still in the middle of a request, so that others wait."""
    pid = daemon.info()["workers"][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        blocker = Background(lambda: daemon.client().call(ONE, [noise(2, 99)]))
        daemon.wait_for(lambda info: info["in_flight"] == 1, 5)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    blocker.value()


def waiting(daemon, count: int) -> None:
    daemon.wait_for(lambda info: info["queue"]["waiting"] == count, 5)


def test_identical_requests_are_computed_once(daemon):
    """Three clients that ask for the same at once get one computation's result, each its own to write into."""
    latents = noise(8)
    alone = daemon.client().call(ONE, [latents]).tensors[0]
    served, before = daemon.info()["workers"][0]["requests"], daemon.info()["coalesced"]
    with held(daemon):
        clients = [daemon.client(use_arena=use) for use in (True, True, False)]
        calls = [Background(lambda c=client: c.call(ONE, [latents.clone()]).tensors[0]) for client in clients]
        different = Background(lambda: clients[0].call(ONE, [latents + 1]).tensors[0])
        waiting(daemon, 2)
        daemon.wait_for(lambda info: info["coalesced"] == before + 2, 5)
    results = [call.value() for call in calls]
    assert not torch.equal(different.value(), alone)
    assert daemon.info()["workers"][0]["requests"] == served + 3, "the one that held, the same, the different"
    assert all(torch.equal(result, alone) for result in results)
    for number, result in enumerate(results):
        result.fill_(number)
    assert all(bool((result == number).all()) for number, result in enumerate(results))
    del alone, result, results, calls, different
    daemon.wait_for(lambda info: info["arena"]["used"] == 0, 5)


def test_who_joins_keeps_what_it_asked_for(daemon):
    """Joining another's request takes over neither its deadline, nor its low priority, nor its cancellation."""
    leave = threading.Event()
    with held(daemon):
        hasty = Background(
            lambda: daemon.client().call(
                ONE, [noise()], deadline_s=0.2, priority=Priority.BATCH, is_cancelled=leave.is_set
            )
        )
        waiting(daemon, 1)
        before = daemon.info()["coalesced"]
        joined = Background(lambda: daemon.client().call(ONE, [noise()], priority=Priority.INTERACTIVE))
        daemon.wait_for(lambda info: info["coalesced"] == before + 1)
        normal = Background(lambda: daemon.client().call(ONE, [noise(4, 1)]))
        waiting(daemon, 2)
        daemon.wait_for(lambda info: info["queue"]["oldest_s"] > 0.3)  # past the first one's deadline
        leave.set()
        hasty.wait()
    assert joined.value().tensors[0].shape == (1, 32, 32, 3)
    normal.value()
    assert joined.ended < normal.ended


def test_models_share_a_budget(daemon):
    """The least recently used goes; a pinned one stays, and what does not fit beside it is refused."""
    client = daemon.client()
    for call in (ONE, TWO, ONE):
        client.call(call, [noise()])
        info = daemon.wait_for(lambda info: len(info["models"]["loaded"]) == 1, 5)
        assert f":{call.model.name}:" in info["models"]["loaded"][0]
    client.warm(ONE.model, pin=True)
    with pytest.raises(MemoryError, match="pinned models hold the rest"):
        client.call(TWO, [noise()])
    assert client.call(ONE, [noise()]).tensors[0].shape == (1, 32, 32, 3)
    client.unload()
    client.call(TWO, [noise()])
    client.call(ONE, [noise()])


@pytest.mark.parametrize("threads, workers", [(0, 1), (1, 2)])
def test_a_second_worker_only_where_cores_are_free(start_daemon, tmp_path, threads, workers):
    """One that uses every core is not joined by another, since both would be slower; with a thread each it is."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for path in files:
        path.touch()  # empty: workers are real ones, yet have only torch to import
    daemon = start_daemon(model_dirs=tmp_path, cpu_threads=threads, scale_up_delay_sec=0.1, queue_threshold=1)

    def load(path):
        with pytest.raises(ModelLoadError, match="is empty"):
            daemon.client().warm(m.ModelRef("vae", files=(m.FileId(str(path)),)))

    load(files[0])
    pid = daemon.info()["workers"][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        calls = [Background(lambda path=path: load(path)) for path in files[1:]]
        if workers == 2:
            daemon.wait_for(lambda info: len(info["workers"]) == 2, 5)
            daemon.wait_for(lambda info: info["in_flight"] == 1, 30)  # the second has answered what the first did not
        else:
            waiting(daemon, 2)
            daemon.wait_for(lambda info: info["queue"]["oldest_s"] > 0.8)
            assert len(daemon.info()["workers"]) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    for call in calls:
        call.value()
