"""A client names a ComfyUI: it is run where only the daemon's user could have changed it, and else nothing is."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from luna_daemon.core import BadRequest, ComfyRefused, LunaError, WorkerCrashed
from luna_daemon.files.identity import file_id
from luna_daemon.wire import messages as m
from tests.integration.conftest import DEMO_VAE
from tests.integration.helpers import RawPeer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes of POSIX")
LATENT = torch.zeros(1, 16, 4, 4)


class Trap:
    """A ComfyUI and an interpreter that leave a trace where they are run."""

    def __init__(self, folder: Path) -> None:
        self.root, self.env = folder / "ComfyUI", folder / "env"
        self.traces = folder / "traces"
        for path in (self.root / "comfy", self.env / "bin", self.traces):
            path.mkdir(parents=True)
        (self.root / "comfy" / "__init__.py").write_text("")
        (self.root / "comfy" / "sd.py").write_text("raise SystemExit('it was imported')\n")
        self.python = self.env / "bin" / "python"
        self.python.write_text(f'#!/bin/sh\necho "$@" > {self.traces}/python\nexit 3\n')
        self.python.chmod(0o755)

    def call(self, flags: tuple[str, ...] = ()) -> m.VaeDecode:
        comfy = m.ComfyId(str(self.root), str(self.python), "1", "2", flags)
        return m.VaeDecode(m.ModelRef("vae", files=(file_id(DEMO_VAE),), comfy=comfy))

    @property
    def ran(self) -> bool:
        return any(self.traces.iterdir())


@pytest.fixture
def trap(tmp_path) -> Trap:
    return Trap(tmp_path / "trap")


def refused(daemon, trap: Trap, why: str, kind: type[LunaError] = ComfyRefused, flags: tuple[str, ...] = ()) -> None:
    """Answered with the typed error, and no process was started."""
    with pytest.raises(kind, match=why) as caught, daemon.client() as client:
        client.call(trap.call(flags), [LATENT])
    assert caught.value.hint and caught.value.local_ok is (kind is ComfyRefused)
    assert not trap.ran and daemon.info()["workers"] == [] and not daemon.workers()


def test_a_trusted_one_is_run(start_daemon, trap):
    """The trap works: where nothing is wrong with its owner and modes, its interpreter is started."""
    daemon = start_daemon()
    with pytest.raises(WorkerCrashed), daemon.client() as client:
        client.call(trap.call(), [LATENT])
    assert trap.ran and (trap.traces / "python").read_text().endswith("child.py\n")


def test_who_could_have_changed_it_is_not_trusted(start_daemon, trap):
    """A folder, code or an interpreter that others may write: refused each time, until it is mended."""
    daemon = start_daemon()
    for path in (trap.root, trap.root / "comfy" / "sd.py", trap.python, trap.env / "bin"):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(0o777)
        refused(daemon, trap, f"{path} is writable by everybody")
        path.chmod(mode)
    with pytest.raises(WorkerCrashed), daemon.client() as client:
        client.call(trap.call(), [LATENT])
    assert trap.ran


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="needs root, to give files away")
def test_another_users_is_not_trusted(start_daemon, trap):
    daemon = start_daemon()
    for path in (trap.root, trap.root / "comfy" / "sd.py", trap.env, trap.python):
        os.chown(path, 65534, 65534)
        refused(daemon, trap, f"{path} belongs to user 65534")
        os.chown(path, 0, 0)


def test_settings_decide(start_daemon, trap):
    """client_roots switches it off; comfyui_roots takes what is refused otherwise."""
    refused(start_daemon(client_roots="false"), trap, "client_roots is off")
    trap.root.chmod(0o777)
    daemon = start_daemon(client_roots="false", comfyui_roots=os.pathsep.join(map(str, (trap.root, trap.env))))
    with pytest.raises(WorkerCrashed), daemon.client() as client:
        client.call(trap.call(), [LATENT])
    assert trap.ran


@pytest.mark.parametrize("flags", [("--base-directory", "/tmp"), ("--fast", "../../x"), ("-c", "print()")])
def test_no_free_arguments(start_daemon, trap, flags):
    """Only flags that decide bits come from a client, wherever its ComfyUI lies."""
    refused(start_daemon(), trap, "is not taken from clients", BadRequest, flags)


def test_another_backend_needs_none(start_daemon, trap):
    """Where the settings name another backend, what the client runs does not matter, and is not run."""
    daemon = start_daemon(backend="diffusers")
    with daemon.client() as client:
        assert client.call(trap.call(), [LATENT]).tensors[0].shape == (1, 32, 32, 3)
    assert not trap.ran and daemon.info()["workers"][0]["comfyui"] is None


def test_nonsense(start_daemon):
    """Bad values are answered and cost nothing; the daemon goes on."""
    daemon = start_daemon()
    with RawPeer(daemon) as peer:
        peer.hello()
        for number, comfy in enumerate([7, {}, {"root": 1, "python": "x"}, {"root": "x" * 70000, "python": "y"}], 1):
            ref = {"kind": "vae", "files": [{"path": str(DEMO_VAE)}], "comfy": comfy}
            call = msgspec.Raw(msgspec.msgpack.encode({"op": "models.load", "model": ref}))
            peer.channel.send(m.Request(number, call))
            answer = peer.channel.receive(10)[0]
            assert isinstance(answer, m.Failure) and answer.code in ("bad_request", "comfyui_refused"), answer
    with daemon.client() as client:
        client.ping()
