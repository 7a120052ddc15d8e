"""Processes that die, hang or are stopped: the request is answered or fails with its type, and nothing is left over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from luna_daemon.backends.local import LocalVAE
from luna_daemon.core import DaemonConnectionError, ModelLoadError, PoisonRequest, ShuttingDown, WorkerCrashed
from luna_daemon.proxy import DaemonVAE
from luna_daemon.wire import messages as m
from tests.integration.helpers import DEMO_TOML, DEMO_VAE, Background, busy_pid, occupied

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

CLIENT = """
import sys
from pathlib import Path
from luna_daemon.client import DaemonClient
from luna_daemon.wire import messages as m
client = DaemonClient("127.0.0.1", int(sys.argv[1]), runtime_dir=Path(sys.argv[2]), name="victim")
for _ in range(3):
    assert client.link()._reserve(1 << 20) is not None
print("holds", flush=True)
client.call(m.Echo(1 << 20, 60.0))
"""


def log_count(daemon) -> int:
    """How many worker processes were ever started."""
    return len(list((daemon.runtime_dir / str(daemon.port)).glob("worker-*.log")))


def test_a_client_is_killed(start_daemon):
    """Its shared memory comes back, what was computed for it is cancelled, and the worker is free for others."""
    daemon = start_daemon()
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(daemon.port), str(daemon.runtime_dir)], stdout=subprocess.PIPE
    )
    assert client.stdout is not None and client.stdout.readline() == b"holds\n"
    pid = busy_pid(daemon)
    assert daemon.info()["arena"]["used"] >= 3 << 20
    client.kill()
    info = daemon.wait_for(lambda info: info["in_flight"] == 0 and info["arena"]["used"] == 0, 5)
    client.stdout.close()
    client.wait()
    assert [worker["pid"] for worker in info["workers"]] == [pid] and info["crashes"] == 0
    daemon.client().call(m.Echo(), deadline_s=20)


def test_a_client_that_is_killed_while_it_waits(start_daemon):
    """A request that only waited is dropped: nobody computes it later."""
    daemon = start_daemon(max_vae_workers=1)
    with occupied(daemon) as first:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(daemon.port), str(daemon.runtime_dir)], stdout=subprocess.DEVNULL
        )
        daemon.wait_for(lambda info: info["queue"]["waiting"] == 1)
        client.kill()
        client.wait()
        daemon.wait_for(lambda info: info["queue"]["waiting"] == 0)
        assert not first.ended
    daemon.wait_for(lambda info: info["in_flight"] == 0)


def test_a_worker_is_killed(start_daemon):
    """The request is answered after one retry on another worker; the counters tell."""
    daemon = start_daemon()
    call = Background(lambda: daemon.client().call(m.Echo(1 << 20, 0.7), deadline_s=10.0))
    os.kill(busy_pid(daemon), signal.SIGKILL)
    assert call.value().tensors[0].numel() == 1 << 18
    info = daemon.info()
    assert (info["crashes"], info["retries"]) == (1, 1)
    assert "died" in daemon.log.read_text()


def test_a_request_that_kills_two_workers(start_daemon):
    """It is refused with an error that names it and is not tried a third time; other requests are served."""
    daemon = start_daemon()
    call = Background(lambda: daemon.client().call(m.Echo(0, 30.0)))
    first = busy_pid(daemon)
    os.kill(first, signal.SIGKILL)
    second = busy_pid(daemon, (first,))
    os.kill(second, signal.SIGKILL)
    call.wait()
    assert isinstance(call.error, PoisonRequest) and not call.error.local_ok
    assert "echo" in call.error.message and "two workers" in call.error.message and str(second) in call.error.message
    daemon.client().call(m.Echo())
    info = daemon.info()
    assert (info["crashes"], info["retries"], log_count(daemon)) == (2, 1, 3)


def test_nobody_waits_for_it_any_more(start_daemon):
    """A request whose caller has left is not tried again when its worker dies."""
    daemon = start_daemon()
    caller = subprocess.Popen([sys.executable, "-c", CLIENT, str(daemon.port), str(daemon.runtime_dir)], stdout=-3)
    pid = busy_pid(daemon)
    os.kill(pid, signal.SIGSTOP)
    caller.kill()
    caller.wait()
    daemon.wait_for(lambda info: len(info["clients"]) == 1)
    os.kill(pid, signal.SIGKILL)
    info = daemon.wait_for(lambda info: not info["workers"] and info["arena"]["used"] == 0, 5)
    assert (info["crashes"], info["retries"], info["in_flight"]) == (1, 0, 0)


def test_an_idle_worker_is_killed(start_daemon):
    """The next request starts another; nobody notices."""
    daemon = start_daemon()
    client = daemon.client()
    client.call(m.Echo())
    os.kill(daemon.info()["workers"][0]["pid"], signal.SIGKILL)
    daemon.wait_for(lambda info: not info["workers"], 5)
    client.call(m.Echo())
    assert daemon.info()["errors"] == {}


def test_a_worker_that_cannot_start(start_daemon, tmp_path, monkeypatch):
    """Callers get its last words; starts back off; once the cause is gone it serves, without a restart."""
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('libcudart is missing')\n")
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    (tmp_path / "empty.safetensors").touch()
    daemon = start_daemon(model_dirs=tmp_path)
    client = daemon.client()
    model = m.ModelRef("vae", files=(m.FileId("empty.safetensors"),))
    asked = 30
    for _ in range(asked):
        with pytest.raises(WorkerCrashed, match=r"no worker can be started.*libcudart is missing") as caught:
            client.warm(model)
        assert "next try is in" in caught.value.hint
    assert log_count(daemon) <= asked / 6, "a start that failed is not tried again for every caller"
    client.call(m.Echo())
    for path in [fake / "__init__.py", *fake.glob("__pycache__/*")]:
        path.unlink()
    with contextlib.suppress(OSError):
        (fake / "__pycache__").rmdir()
    fake.rmdir()
    end = time.monotonic() + 20
    while True:
        try:
            client.warm(model)
        except ModelLoadError:  # said by a worker: the file is empty
            break
        except WorkerCrashed:
            assert time.monotonic() < end
            time.sleep(0.2)


def test_the_daemon_is_killed_and_started_again(start_daemon):
    """Callers learn at once; workers end by themselves; the next daemon sweeps, and clients find it by themselves."""
    daemon = start_daemon()
    idle, client = daemon.client(), daemon.client()
    kept = idle.call(m.Echo(4 << 20)).tensors[0].fill_(5)
    seconds = 30.0
    call = Background(lambda: client.call(m.Echo(0, seconds)))
    busy_pid(daemon)
    workers = daemon.workers()
    arena = daemon.arena_dir / f"luna-daemon-{daemon.port}"
    stale = {path.name for path in arena.glob("seg-*")}
    daemon.expected_to_die = True
    daemon.process.kill()
    killed = time.monotonic()
    call.wait()
    assert isinstance(call.error, DaemonConnectionError) and call.error.local_ok
    assert call.ended - killed < seconds / 6, "callers learn it at once, not when the answer would have come"
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive, "workers outlived the daemon"
    with pytest.raises(DaemonConnectionError):
        client.ping()
    assert arena.exists() and (daemon.runtime_dir / str(daemon.port) / "token").exists()
    again = start_daemon(port=daemon.port, arena_dir=daemon.arena_dir)
    assert idle.ping() > 0, "an idle client sees by itself that its connection is of the past"
    assert client.call(m.Echo(4 << 20)).tensors[0].numel() == 1 << 20
    assert client.get_daemon_info()["transport"] == "shared memory"
    assert not stale & {path.name for path in arena.glob("seg-*")} and again.info()["pid"] == again.process.pid
    assert bool((kept == 5).all()), "a tensor of the dead daemon's memory is still the caller's"


def test_the_local_model_finishes_what_a_killed_daemon_began(start_daemon, caplog):
    """A decode in flight when the daemon is killed returns what the local model computes, bit for bit."""
    daemon = start_daemon(toml=DEMO_TOML)
    local, used = LocalVAE(DEMO_VAE), []

    def load():
        used.append(1)
        return local

    client = daemon.client()
    vae = DaemonVAE(load, vae_type="demo", client=client)
    latents = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    vae.decode(latents)
    assert not used and client.fallbacks == 0
    (worker,) = daemon.workers()
    worker.suspend()  # so that the request is surely in flight
    try:
        call = Background(lambda: vae.decode(latents))
        busy_pid(daemon)
        daemon.expected_to_die = True
        daemon.process.kill()
        result = call.value()
    finally:
        worker.kill()
    assert used and client.fallbacks == 1 and "local model steps in" in caplog.text
    assert torch.equal(result, local.decode(latents))


def test_stop_while_requests_run(start_daemon):
    """What runs is finished, by shared memory and by TCP; what waits and what comes is refused; exit code 0."""
    daemon = start_daemon(max_vae_workers=2, scale_up_delay_sec=0.0, queue_threshold=1)
    late = daemon.client()
    late.ping()
    running = [
        Background(lambda use=use: daemon.client(use_arena=use).call(m.Echo(8 << 20, 1.5))) for use in (True, False)
    ]
    daemon.wait_for(lambda info: sum(worker["state"] == "busy" for worker in info["workers"]) == 2)
    waiting = Background(lambda: daemon.client().call(m.Echo(0, 1.0)))
    daemon.wait_for(lambda info: info["queue"]["waiting"] == 1)
    daemon.process.send_signal(signal.SIGTERM)
    assert isinstance(waiting.wait().error, ShuttingDown)
    with pytest.raises(ShuttingDown) as caught:
        late.call(m.Echo())
    assert caught.value.local_ok
    with pytest.raises(DaemonConnectionError):
        daemon.client().ping()
    for call in running:
        assert call.value().tensors[0].numel() == 2 << 20
        assert waiting.ended < call.ended
    assert daemon.process.wait(20) == 0
    daemon.stop()


def test_stop_does_not_wait_for_ever(start_daemon):
    """Past the drain limit the request that runs gets a typed error, and the daemon ends all the same."""
    daemon = start_daemon(drain_timeout_sec=0.5)
    call = Background(lambda: daemon.client().call(m.Echo(0, 60.0)))
    busy_pid(daemon)
    workers = daemon.workers()
    daemon.process.send_signal(signal.SIGTERM)
    assert isinstance(call.wait(10).error, ShuttingDown)
    assert daemon.process.wait(20) == 0
    assert not psutil.wait_procs(workers, timeout=10)[1]
    daemon.stop()


def test_a_worker_dies_while_the_daemon_stops(start_daemon):
    """No other worker can be started then: the caller is told at once that its local model may step in."""
    daemon = start_daemon()
    call = Background(lambda: daemon.client().call(m.Echo(1 << 20, 20.0)))
    pid, watcher = busy_pid(daemon), daemon.client()
    watcher.ping()
    daemon.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 20
    while watcher.get_daemon_info()["status"] != "draining":  # a new client would not be let in
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    call.wait(10)
    assert isinstance(call.error, ShuttingDown) and call.error.local_ok and "worker died" in call.error.message
    assert daemon.process.wait(20) == 0
    daemon.stop()


def test_a_worker_stands_still(start_daemon):
    """A worker that is stopped for three seconds (swap, suspend) only delays; it is not taken for dead."""
    daemon = start_daemon()
    call = Background(lambda: daemon.client().call(m.Echo(0, 0.5)))
    pid = busy_pid(daemon)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    assert daemon.client().ping() > 0 and not call.ended
    os.kill(pid, signal.SIGCONT)
    call.value()
    assert daemon.info()["crashes"] == 0
