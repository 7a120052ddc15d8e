"""The pool with real processes: who goes first, when workers come and go, what is computed once."""

from __future__ import annotations

import os
import threading
import time

import msgspec
import pytest
import torch

from luna_daemon.core import Busy, DeadlineExceeded, Priority
from luna_daemon.wire import messages as m
from tests.integration.helpers import DEMO_TOML, DEMO_VAE, Background, RawPeer, is_busy

ONE = {"max_vae_workers": 1}


def occupied(daemon, seconds: float) -> Background:
    """Keep the daemon's only worker busy for so long."""
    call = Background(lambda: daemon.client().call(m.Echo(0, seconds)))
    daemon.wait_for(is_busy)
    return call


def test_a_full_queue(start_daemon):
    """One request too many is told when to come back; those that wait are served."""
    daemon = start_daemon(queue_limit=2, **ONE)
    calls = [occupied(daemon, 1.0)]
    client = daemon.client()
    for number in (1, 2):
        calls.append(Background(lambda: client.call(m.Echo(0, 0.05))))
        daemon.wait_for(lambda info, number=number: info["queue"]["waiting"] == number)
    with pytest.raises(Busy, match="2 requests wait") as caught:
        client.call(m.Echo())
    assert caught.value.retry_after_s > 0 and "Ask again in" in caught.value.hint
    for call in calls:
        call.value()
    client.call(m.Echo())


def test_clients_take_turns(start_daemon):
    """A client with sixty requests in the queue does not hold up another's single one."""
    daemon = start_daemon(**ONE)
    first = occupied(daemon, 0.5)
    with RawPeer(daemon) as greedy:
        greedy.hello()
        for number in range(1, 61):
            call = m.Echo(0, 0.05)
            greedy.channel.send(m.Request(number, msgspec.Raw(msgspec.msgpack.encode(call))))
        daemon.wait_for(lambda info: info["queue"]["waiting"] == 60, 5)
        modest = Background(lambda: daemon.client().call(m.Echo()))
        first.value()
        modest.value()
        waited = modest.ended - first.ended
        left = daemon.info()["queue"]["waiting"]
    assert left > 45, f"it came after {60 - left} of the other's requests, {waited:.2f} s"


def test_priority(start_daemon):
    """Interactive work overtakes batch work that waits; a priority of one's own invention is not above that."""
    daemon = start_daemon(**ONE)
    first = occupied(daemon, 0.6)
    calls = []
    for number, priority in enumerate([Priority.BATCH, Priority.NORMAL, Priority.INTERACTIVE, -(10**6)]):
        client = daemon.client()
        calls.append(Background(lambda c=client, p=priority: c.call(m.Echo(0, 0.1), priority=p)))
        daemon.wait_for(lambda info, number=number: info["queue"]["waiting"] == number + 1)
    first.value()
    ended = [call.wait().ended for call in calls]
    assert ended[2] < ended[3] < ended[1] < ended[0]


def test_deadline(start_daemon):
    """A request whose deadline passes while it waits is answered at that time, not when its turn comes."""
    daemon = start_daemon(**ONE)
    first = occupied(daemon, 1.5)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="past its deadline"):
        daemon.client().call(m.Echo(), deadline_s=0.2)
    assert time.monotonic() - start < 1.0
    first.value()


def test_another_worker_for_a_queue(start_daemon):
    """A queue that lasts brings a second worker, and no third; a short one brings none."""
    daemon = start_daemon(max_vae_workers=2, scale_up_delay_sec=0.3, queue_threshold=2)
    client = daemon.client()
    client.call(m.Echo())
    [call.value() for call in [Background(lambda: client.call(m.Echo(0, 0.1))) for _ in range(2)]]
    assert len(daemon.info()["workers"]) == 1
    calls = [Background(lambda: client.call(m.Echo(0, 0.4))) for _ in range(8)]
    daemon.wait_for(lambda info: sum(worker["state"] == "busy" for worker in info["workers"]) == 2, 5)
    for call in calls:
        call.value()
    assert len(daemon.info()["workers"]) == 2


def test_idle_stages(start_daemon):
    """Idle, the extra worker ends, the last gives its models back and keeps its process, then ends too; all returns."""
    daemon = start_daemon(
        toml=DEMO_TOML, idle_timeout_sec=0.5, worker_keep_sec=2.5, cpu_threads=1, scale_up_delay_sec=0.1,
        queue_threshold=1,
    )  # fmt: skip
    client = daemon.client()
    latents = torch.randn(2, 16, 24, 24)
    expected = client.vae_decode(latents, "demo")
    pid = daemon.info()["workers"][0]["pid"]
    info = daemon.wait_for(lambda info: not info["models"]["loaded"], 5)
    assert [worker["pid"] for worker in info["workers"]] == [pid], "the process is kept: its imports are dear"
    assert torch.equal(client.vae_decode(latents, "demo"), expected)
    assert daemon.info()["workers"][0]["pid"] == pid
    daemon.wait_for(lambda info: not info["workers"], 8)
    assert torch.equal(client.vae_decode(latents, "demo"), expected)
    info = daemon.info()
    assert info["workers"][0]["pid"] != pid and info["crashes"] == 0


def test_extra_workers_end_first(start_daemon):
    """When it is quiet again, only one worker is left."""
    daemon = start_daemon(idle_timeout_sec=0.5, scale_up_delay_sec=0.1, queue_threshold=1)
    client = daemon.client()
    for call in [Background(lambda: client.call(m.Echo(0, 0.5))) for _ in range(4)]:
        call.value()
    assert len(daemon.info()["workers"]) == 2
    info = daemon.wait_for(lambda info: len(info["workers"]) == 1, 5)
    assert info["crashes"] == 0


def demo_copies(folder) -> str:
    """Two models of different files in ``luna.toml``."""
    toml = ""
    for name in ("one", "two"):
        path = folder / f"{name}.safetensors"
        path.write_bytes(DEMO_VAE.read_bytes())
        toml += f'[models.{name}]\nvae = ["{path.as_posix()}"]\ntype = "sd3"\n'
    return toml


def test_models_share_a_budget(start_daemon, tmp_path):
    """Under a budget for one model the least recently used goes; a pinned one stays, and what does not fit is refused."""
    size = DEMO_VAE.stat().st_size
    budget = 3 * size / (1 << 30)  # float16 on disk, float32 in memory: one loaded, and none beside it
    daemon = start_daemon(toml=demo_copies(tmp_path), model_memory_gb=budget)
    client = daemon.client()
    latents = torch.zeros(1, 16, 4, 4)
    for name in ("one", "two", "one"):
        client.vae_decode(latents, name)
        (loaded,) = daemon.wait_for(lambda info: len(info["models"]["loaded"]) == 1, 5)["models"]["loaded"]
        assert f":{name}:" in loaded
    client.warm(m.ModelRef("vae", name="one"), pin=True)
    with pytest.raises(MemoryError, match="pinned models hold the rest"):
        client.vae_decode(latents, "two")
    assert client.vae_decode(latents, "one").shape == (1, 32, 32, 3)
    client.unload()
    client.vae_decode(latents, "two")


def test_a_pinned_model_is_not_idled_out(start_daemon):
    """``pin`` outlasts both idle limits."""
    daemon = start_daemon(toml=DEMO_TOML, idle_timeout_sec=0.2, worker_keep_sec=0.3)
    client = daemon.client()
    client.warm(m.ModelRef("vae", name="demo"), pin=True)
    time.sleep(1.0)
    assert len(daemon.info()["models"]["loaded"]) == 1
    client.unload()
    daemon.wait_for(lambda info: not info["workers"], 5)


def test_identical_requests_are_computed_once(start_daemon):
    """Two clients that ask for the same at once get one computation's result, each its own to write into."""
    daemon = start_daemon(toml=DEMO_TOML, cpu_threads=1, max_vae_workers=1)
    latents = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(1))
    alone = daemon.client().vae_decode(latents, "demo")
    blocker = Background(lambda: daemon.client().vae_decode(torch.randn(1, 16, 96, 96), "demo"))
    daemon.wait_for(is_busy)
    clients = [daemon.client(use_arena=use) for use in (True, True, False)]
    calls = [Background(lambda c=client: c.vae_decode(latents.clone(), "demo")) for client in clients]
    different = Background(lambda: clients[0].vae_decode(latents + 1, "demo"))
    results = [call.value() for call in calls]
    info = daemon.info()
    assert info["coalesced"] == 2 and info["requests"]["vae.decode"] >= 4
    assert all(torch.equal(result, alone) for result in results)
    for number, result in enumerate(results):
        result.fill_(number)
    assert all(bool((result == number).all()) for number, result in enumerate(results))
    assert not torch.equal(different.value(), alone)
    blocker.value()
    alone = results = None
    calls.clear()
    different.result = blocker.result = None
    daemon.wait_for(lambda info: info["arena"]["used"] == 0, 5)


def test_who_joins_keeps_what_it_asked_for(start_daemon):
    """Joining another's request takes over neither its deadline nor its low priority, nor its cancellation."""
    daemon = start_daemon(toml=DEMO_TOML, cpu_threads=1, max_vae_workers=1)
    latents = torch.randn(1, 16, 16, 16)
    daemon.client().vae_decode(latents, "demo")
    blocker = Background(lambda: daemon.client().vae_decode(torch.randn(2, 16, 128, 128), "demo"))
    daemon.wait_for(is_busy)
    call = m.VaeDecode(m.ModelRef("vae", name="demo"))
    leave = threading.Event()
    hasty = Background(lambda: daemon.client().call(call, [latents], deadline_s=0.3, is_cancelled=leave.is_set))
    daemon.wait_for(lambda info: info["queue"]["waiting"] == 1)
    joined = Background(lambda: daemon.client().call(call, [latents], priority=Priority.INTERACTIVE))
    daemon.wait_for(lambda info: info["coalesced"] == 1)
    assert not blocker.ended, "the machine was too fast for this test"
    time.sleep(0.4)
    leave.set()
    assert joined.value().tensors[0].shape == (1, 128, 128, 3)
    hasty.wait()
    blocker.value()


@pytest.mark.skipif((os.cpu_count() or 1) > 64, reason="threads of one worker do not fill this machine")
def test_no_second_worker_on_busy_cores(start_daemon):
    """A worker that uses every core is not joined by another: both would only be slower."""
    daemon = start_daemon(toml=DEMO_TOML, cpu_threads=0, scale_up_delay_sec=0.1, queue_threshold=1)
    client = daemon.client()
    client.warm(m.ModelRef("vae", name="demo"))
    calls = [
        Background(lambda n=number: client.vae_decode(torch.full((1, 16, 64, 64), n / 4.0), "demo"))
        for number in range(4)
    ]
    for call in calls:
        call.value()
    assert len(daemon.info()["workers"]) == 1


def test_a_second_worker_where_cores_are_free(start_daemon):
    """With one thread each, two workers decode side by side, with the same bits."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    daemon = start_daemon(toml=DEMO_TOML, cpu_threads=1, scale_up_delay_sec=0.1, queue_threshold=1)
    client = daemon.client()
    latents = torch.randn(1, 16, 64, 64)
    expected = client.vae_decode(latents, "demo")
    end = time.monotonic() + 20
    number = 0
    while len(daemon.info()["workers"]) < 2:
        assert time.monotonic() < end, "no second worker came"
        calls = []
        for _ in range(4):
            number += 1
            calls.append(Background(lambda n=number: client.vae_decode(latents + n, "demo")))
        for call in calls:
            call.value()
    same = [Background(lambda: daemon.client().vae_decode(latents, "demo")) for _ in range(3)]
    assert all(torch.equal(call.value(), expected) for call in same)
