"""Who may talk to the daemon, which files it opens, and what a forked child may touch."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from luna_daemon.client import DaemonClient
from luna_daemon.core import AuthenticationError, BadRequest, Busy, ModelMismatchError, ModelNotFound
from luna_daemon.files.identity import file_id
from luna_daemon.wire import messages as m
from tests.integration.helpers import DEMO_VAE, RawPeer

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


@pytest.fixture(scope="module")
def daemon(start_module_daemon, tmp_path_factory):
    """One daemon whose only model folder holds a link out of it."""
    folder = tmp_path_factory.mktemp("models")
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.safetensors"
    secret.write_bytes(DEMO_VAE.read_bytes())
    (folder / "vae").mkdir()
    (folder / "vae" / "good.safetensors").write_bytes(DEMO_VAE.read_bytes())
    if sys.platform != "win32":
        (folder / "vae" / "link.safetensors").symlink_to(secret)
        (folder / "linked").symlink_to(secret.parent)
        os.mkfifo(folder / "vae" / "pipe.safetensors")
    running = start_module_daemon(model_dirs=folder, max_clients=8)
    running.models = folder
    running.secret = secret
    return running


@pytest.mark.parametrize("token, what", [("", "missing"), ("wrong", "wrong"), ("ключ", "wrong")])
def test_no_token_no_entry(daemon, token, what):
    """The refusal says whose daemon it is, where the token lies, and what to do."""
    with RawPeer(daemon) as peer:
        failure = peer.hello(token)
        assert (failure.id, failure.code) == (0, "authentication")
        assert f"the token is {what}" in failure.message
        assert str(daemon.runtime_dir / str(daemon.port) / "token") in failure.message
        assert not hasattr(os, "getuid") or f"uid {os.getuid()}" in failure.message
        assert "LUNA_TOKEN" in failure.hint


def test_the_client_raises_the_refusal(daemon, tmp_path, monkeypatch):
    """A client without a token gets AuthenticationError; LUNA_TOKEN and LUNA_TOKEN_FILE are the cure."""
    monkeypatch.delenv("LUNA_TOKEN", raising=False)
    stranger = DaemonClient("127.0.0.1", daemon.port, runtime_dir=tmp_path)
    with pytest.raises(AuthenticationError, match="missing"):
        stranger.ping()
    token = daemon.runtime_dir / str(daemon.port) / "token"
    monkeypatch.setenv("LUNA_TOKEN_FILE", str(token))
    assert stranger.ping() > 0
    stranger.close()
    monkeypatch.delenv("LUNA_TOKEN_FILE")
    monkeypatch.setenv("LUNA_TOKEN", token.read_text())
    assert stranger.ping() > 0
    stranger.close()


def test_a_token_file_that_cannot_be_read_is_named(daemon, tmp_path, monkeypatch):
    """A slip in LUNA_TOKEN_FILE is not mistaken for a daemon that is away."""
    monkeypatch.setenv("LUNA_TOKEN_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(AuthenticationError, match="nowhere"):
        daemon.client().ping()


def test_a_workers_token_is_not_guessed(daemon):
    """Nobody becomes a worker, who is sent other people's tensors, with a client's token."""
    with RawPeer(daemon) as peer:
        failure = peer.hello(role="worker")
        assert failure.code == "authentication"


@pytest.mark.parametrize("protocol", [0, 2, 99])
def test_another_protocol_version(daemon, protocol):
    """Version skew names both versions."""
    with RawPeer(daemon) as peer:
        failure = peer.hello(protocol=protocol)
        assert failure.code == "version"
        assert f"LDP/{protocol}" in failure.message and "LDP/1" in failure.message and "0.0.1" in failure.message


@posix
def test_token_and_memory_are_the_owners_alone(daemon):
    """Nobody else on the machine can read the token or the tensors."""
    runtime = daemon.runtime_dir / str(daemon.port)
    arena = daemon.arena_dir / f"luna-daemon-{daemon.port}"
    daemon.client().call(m.Echo(1 << 20))
    for path in [runtime, arena, *runtime.glob("token"), *arena.iterdir()]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_most_clients(daemon):
    """One connection too many is told to come back, and those there are go on."""
    peers = [RawPeer(daemon) for _ in range(12)]
    try:
        answers = [peer.hello() for peer in peers]
        refused = [answer for answer in answers if isinstance(answer, m.Failure)]
        assert refused and all(answer.code == "busy" and answer.retry_after_s > 0 for answer in refused)
        assert isinstance(peers[0].ask(m.Ping()), m.Reply)
        with pytest.raises(Busy, match="clients are connected"):
            DaemonClient("127.0.0.1", daemon.port, runtime_dir=daemon.runtime_dir).ping()
    finally:
        for peer in peers:
            peer.channel.close()


def load(daemon, path, **identity):
    with daemon.client() as client:
        return client.warm(m.ModelRef("vae", files=(m.FileId(str(path), **identity),), type="sd3"))


def outside(daemon):
    return {
        "dots": daemon.models / "vae" / ".." / ".." / daemon.secret.parent.name / daemon.secret.name,
        "relative dots": f"../../{daemon.secret.parent.name}/{daemon.secret.name}",
        "absolute": daemon.secret,
        "link": daemon.models / "vae" / "link.safetensors",
        "link by name": "link.safetensors",
        "linked folder": daemon.models / "linked" / daemon.secret.name,
        "system": "/etc/passwd",
    }


@posix
@pytest.mark.parametrize(
    "how", ["dots", "relative dots", "absolute", "link", "link by name", "linked folder", "system"]
)
def test_no_file_outside_the_model_folders(daemon, how):
    """However a path leads out of the folders, no worker opens it."""
    before = daemon.info()["workers"]
    with pytest.raises(ModelNotFound, match="outside the model folders"):
        load(daemon, outside(daemon)[how])
    assert [w["number"] for w in daemon.info()["workers"]] == [w["number"] for w in before]


@pytest.mark.parametrize("path", ["", "a\0b", "nothing.safetensors", "/nowhere/x.safetensors", "x" * 5000])
def test_a_path_that_is_none(daemon, path):
    """An empty, impossible or missing path is refused by name."""
    with pytest.raises((BadRequest, ModelNotFound)):
        load(daemon, path)


@posix
def test_a_pipe_is_no_model(daemon):
    """A named pipe would block whoever opens it."""
    with pytest.raises(ModelNotFound, match="neither a file nor a folder"):
        load(daemon, "pipe.safetensors")


@pytest.mark.parametrize("change", ["size", "mtime_ns"])
def test_another_file_of_the_same_name(daemon, change):
    """A client that means another file than the daemon has is refused, never answered with other weights."""
    path = daemon.models / "vae" / "good.safetensors"
    known = file_id(path)
    identity = {"size": known.size, "mtime_ns": known.mtime_ns}
    with pytest.raises(ModelMismatchError, match=change):
        load(daemon, path, **{**identity, change: identity[change] + 1})


@posix
def test_a_forked_child_has_a_connection_of_its_own(daemon):
    """The child's calls do not mix with the parent's, and its end takes nothing from the parent."""
    client = daemon.client(name="forking")
    kept = client.call(m.Echo(1 << 20)).tensors[0].fill_(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            del kept  # the parent's slot: not the child's to give back
            ok = client.call(m.Echo(1 << 20)).tensors[0].numel() == 1 << 18
            sessions = [c["pid"] for c in client.get_daemon_info()["clients"] if c["name"] == "forking"]
            ok = ok and sorted(sessions) == sorted([os.getppid(), os.getpid()])
            client.close()
            os.write(write, b"1" if ok else b"0")
        finally:
            os._exit(0)
    assert os.read(read, 1) == b"1"
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert client.link().broken is None, "the child broke its parent's connection"
    others = [client.call(m.Echo(1 << 20)).tensors[0].fill_(9) for _ in range(4)]
    assert len(others) == 4 and bool((kept == 3).all()), "the parent's tensor was given to somebody else"


@posix
def test_a_forked_child_that_closes_the_client(daemon):
    """``close()`` in a child lets go of the socket without a word to the daemon."""
    client = daemon.client()
    client.ping()
    link = client.link()
    child = os.fork()
    if child == 0:
        link.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert client.ping() > 0 and client.link() is link


def test_tensors_outlive_their_client(daemon):
    """A result stays the caller's own after ``close()``: its memory is not handed to others, and comes back later."""
    client = daemon.client()
    mine = client.call(m.Echo(4 << 20)).tensors[0].fill_(5)
    client.close()
    other = daemon.client()
    theirs = [other.call(m.Echo(4 << 20)).tensors[0].fill_(7) for _ in range(3)]
    assert bool((mine == 5).all()) and all(bool((tensor == 7).all()) for tensor in theirs)
    del mine, theirs
    daemon.wait_for(lambda info: info["arena"]["used"] == 0)


def test_tensors_survive_a_broken_connection(daemon):
    """The daemon cuts a client off that holds results: what the process still uses is given to nobody else."""
    client = daemon.client()
    mine = client.call(m.Echo(4 << 20)).tensors[0].fill_(5)
    client.link().channel._sock.sendall(b"no LDP at all, and the end of this connection")
    daemon.wait_for(lambda info: all(c["leased_bytes"] == 0 for c in info["clients"]))
    other = daemon.client()
    theirs = [other.call(m.Echo(4 << 20)).tensors[0].fill_(7) for _ in range(3)]
    assert bool((mine == 5).all()) and len(theirs) == 3


def test_the_control_process_has_no_torch(daemon):
    """The daemon's own process never imports torch, so that a device's crash cannot take it down."""
    maps = f"/proc/{daemon.process.pid}/maps"
    if not os.path.exists(maps):
        pytest.skip("needs /proc")
    with open(maps) as file:
        assert "libtorch" not in file.read()
