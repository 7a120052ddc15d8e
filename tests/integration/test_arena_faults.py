"""Shared memory that is small, full, gone, or used up by one client: TCP takes over, and nobody dies of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from luna_daemon.wire import messages as m
from tests.integration.helpers import RawPeer

MIB = 1 << 20


@pytest.fixture
def tmpfs():
    """``tmpfs("64m")``: a private file system of that size, unmounted afterwards."""
    mounted: list[Path] = []
    if sys.platform != "linux":
        pytest.skip("tmpfs needs Linux")

    def mount(size: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="luna-tmpfs-"))
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            folder.rmdir()
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def echo(client, mib: int) -> torch.Tensor:
    """A result of so many MiB, checked."""
    tensor = client.call(m.Echo(mib * MIB)).tensors[0]
    assert tensor.numel() == mib * MIB // 4 and not tensor.any()
    return tensor


def round_trip(client, mib: int) -> None:
    """Random bytes that the daemon keeps come back as they were."""
    sent = torch.randint(0, 255, (mib * MIB,), dtype=torch.uint8)
    client.lora_cache_put("random", {"a": sent})
    assert torch.equal(client.lora_cache_get("random")["a"], sent)
    client.lora_cache_put("random", {})


def test_a_folder_too_small(tmpfs, start_daemon):
    """The 64 MB of a container's default /dev/shm are not even begun: TCP from the start, and ``info`` says why."""
    folder = tmpfs("64m")
    daemon = start_daemon(arena_dir=folder)
    client = daemon.client()
    info = client.get_daemon_info()
    assert info["transport"] == "tcp" and info["arena"]["folder"] is None
    assert "64 MB free; at least 128 MB" in info["arena"]["why"] and info["transport_why"] == info["arena"]["why"]
    kept = [echo(client, 16) for _ in range(6)]
    round_trip(client, 80)
    assert len(kept) == 6 and daemon.info()["crashes"] == 0


def test_a_folder_that_becomes_full(tmpfs, start_daemon):
    """Somebody fills the file system while results are made: no SIGBUS, the bytes go by TCP; and back afterwards."""
    folder = tmpfs("160m")
    daemon = start_daemon(arena_dir=folder)
    client = daemon.client()
    kept = [echo(client, 1)]
    workers = [worker["pid"] for worker in daemon.info()["workers"]]
    filler = folder / "filler"
    size = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    reserved = daemon.info()["arena"]["reserved"]
    for mib in (20, 40, 70, 12):
        kept.append(echo(client, mib).fill_(mib))
    round_trip(client, 70)
    info = daemon.info()
    assert info["arena"]["reserved"] == reserved and info["crashes"] == 0
    assert [worker["pid"] for worker in info["workers"]] == workers and daemon.process.poll() is None
    assert all(bool((tensor == mib).all()) for tensor, mib in zip(kept[1:], (20, 40, 70, 12)))
    assert daemon.log.read_text().count("tensors travel over the socket") == 1, "said once, not per call"
    filler.unlink()
    kept.clear()
    daemon.wait_for(lambda info: info["arena"]["used"] == 0)
    big = echo(client, 50)
    assert daemon.info()["arena"]["used"] >= 50 * MIB
    del big


def test_switched_off(start_daemon):
    """Without an arena everything works by TCP."""
    daemon = start_daemon(arena="false")
    client = daemon.client()
    assert client.get_daemon_info()["transport"] == "tcp"
    assert "arena = false" in client.link().transport_why
    echo(client, 20)
    round_trip(client, 20)


def test_the_client_switches_it_off(start_daemon):
    """``use_arena=False`` is TCP for this client alone."""
    daemon = start_daemon()
    remote, local = daemon.client(use_arena=False), daemon.client()
    assert (remote.get_daemon_info()["transport"], local.get_daemon_info()["transport"]) == ("tcp", "shared memory")
    round_trip(remote, 5)
    remote.lora_cache_put("of tcp", {"a": torch.arange(MIB)})
    assert torch.equal(local.lora_cache_get("of tcp")["a"], torch.arange(MIB))
    remote.lora_cache_put("of tcp", {})


def test_a_limit_on_the_whole(start_daemon):
    """``arena_mb`` is kept: what does not fit goes by TCP."""
    daemon = start_daemon(arena_mb=64)
    client = daemon.client()
    kept = [echo(client, 20) for _ in range(6)]
    assert daemon.info()["arena"]["reserved"] == 64 * MIB and len(kept) == 6
    assert 40 * MIB <= daemon.info()["arena"]["used"] <= 64 * MIB


def test_a_client_that_keeps_everything(start_daemon):
    """Past its share a client gets copies: it keeps its results, and others keep their shared memory."""
    daemon = start_daemon(arena_client_mb=8)
    client = daemon.client()
    kept = [echo(client, 1).fill_(number) for number in range(20)]
    assert daemon.info()["arena"]["used"] <= 8 * MIB
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(kept))
    round_trip(client, 6)


def test_a_client_that_never_gives_back(start_daemon):
    """One that ignores the rules is held to its share by the daemon: results come inline, slots are refused."""
    daemon = start_daemon(arena_client_mb=8)
    with RawPeer(daemon) as peer:
        peer.prove()
        answers = [peer.ask(m.Echo(3 * MIB), number) for number in range(1, 6)]
        assert [answer.tensors[0].slot > 0 for answer in answers] == [True, True, False, False, False]
        assert "holds 6291456 bytes" in peer.ask(m.Alloc(3 * MIB), 9).message
        for number in range(20, 30):
            peer.channel.send(m.Request(number, m_alloc(MIB // 2)))
        granted = [peer.receive() for _ in range(10)]
        assert sum(isinstance(answer, m.Reply) for answer in granted) == 4, "asked for at once, counted all the same"
    daemon.wait_for(lambda info: info["arena"]["used"] == 0)


def m_alloc(nbytes: int):
    from luna_daemon.wire.frame import encode_call

    return encode_call(m.Alloc(nbytes))


@pytest.mark.skipif(sys.platform == "win32", reason="sections have no files")
def test_its_files_are_swept_away(start_daemon):
    """Logging out may remove a user's files in /dev/shm: those who mapped them go on, the rest goes by TCP."""
    daemon = start_daemon()
    client, late = daemon.client(), daemon.client()
    kept = echo(client, 2).fill_(1)
    late.ping()
    for path in (daemon.arena_dir / f"luna-daemon-{daemon.port}").iterdir():
        path.unlink()
    (daemon.arena_dir / f"luna-daemon-{daemon.port}").rmdir()
    echo(client, 2)
    assert bool((kept == 1).all())
    outcomes = []
    for _ in range(2):  # one that had proved to see it, and has not mapped it yet, learns at its next result
        try:
            outcomes.append(echo(late, 2).numel())
        except ConnectionError as error:
            outcomes.append(type(error).__name__)
    assert outcomes == ["DaemonConnectionError", MIB // 2]
    assert late.link().transport == "tcp"
    echo(daemon.client(), 100)
