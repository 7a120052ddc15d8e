"""Another user of the machine: reads no tensor, no weight and no token, makes no call, and is told why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.helpers import DEMO_TOML

pytestmark = pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="only root can become another user")

ROOT = Path(__file__).resolve().parents[2]


BECOME = """
import os, sys, encodings.idna
import luna_daemon.client, luna_daemon.wire.link, luna_daemon.wire.arena
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
"""
"""Imports come first: the interpreter may lie in a home folder that others cannot read."""


def as_nobody(script: str, *arguments: str) -> str:
    """What a Python script prints that goes on as another user."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("LUNA_")}
    done = subprocess.run(
        [sys.executable, "-c", BECOME + script, *arguments],
        env={**environ, "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"},
        capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def daemon(start_module_daemon):
    """A daemon that computes for its user: tensors of theirs lie in its shared memory."""
    running = start_module_daemon(toml=DEMO_TOML)
    client = running.client()
    running.kept = client.vae_decode(torch.zeros(1, 16, 64, 64), "demo")
    assert running.kept.nbytes > 1 << 20
    return running


CALL = """
import sys
from luna_daemon.client import DaemonClient
from luna_daemon.core import LunaError
try:
    DaemonClient("127.0.0.1", int(sys.argv[1]), runtime_dir=sys.argv[2] or None).ping()
    print("let in")
except LunaError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("named", [True, False], ids=["the daemon's folder", "their own folder"])
def test_no_call(daemon, named):
    """Neither with the daemon's runtime folder named nor without; the refusal says whose daemon it is."""
    said = as_nobody(CALL, str(daemon.port), str(daemon.runtime_dir) if named else "")
    assert said.startswith("AuthenticationError") and "the token is missing" in said
    assert f"uid {os.getuid()}" in said and "LUNA_TOKEN" in said


READ = """
import os, sys
readable = []
for top in sys.argv[1:]:
    for folder, folders, files in os.walk(top, onerror=lambda error: None):
        for name in files:
            path = os.path.join(folder, name)
            try:
                os.close(os.open(path, os.O_RDONLY))
                readable.append(path)
            except OSError:
                pass
    try:
        os.listdir(top)
        readable.append(top)
    except OSError:
        pass
print("\\n".join(readable))
"""


def test_nothing_can_be_read(daemon):
    """Runtime folder and arena are the user's alone, by their own modes, whatever the folders above allow."""
    runtime, arena = daemon.runtime_dir / str(daemon.port), daemon.arena_dir
    inside = [path for path in [*runtime.rglob("*"), *arena.rglob("*")] if path.is_file()]
    assert any(path.stat().st_size > 1 << 20 for path in inside), "no tensor lies in shared memory"
    for above in {*runtime.parents, arena, *arena.parents}:
        if "luna-test" in str(above) or "pytest" in str(above):  # folders of this test, not of the machine
            above.chmod(above.stat().st_mode | 0o055)
    assert as_nobody("import os,sys; print(os.listdir(sys.argv[1]))", str(arena)).strip() != "[]"  # that far they get
    tops = [str(path) for path in [runtime, *(path for path in arena.iterdir() if path.is_dir())]]
    assert as_nobody(READ, *tops).strip() == ""
    assert as_nobody(READ, *map(str, inside)).strip() == ""


def test_no_memory_of_a_process(daemon):
    """The daemon's and the workers' memory is not theirs to read."""
    pids = [str(daemon.process.pid), *(str(worker.pid) for worker in daemon.workers())]
    script = """
import sys
for pid in sys.argv[1:]:
    try:
        open(f"/proc/{pid}/mem", "rb")
        print("opened", pid)
    except OSError:
        pass
"""
    assert as_nobody(script, *pids) == ""


def test_no_token_in_a_command_line(daemon):
    """What everybody sees of a process, its command line, holds no token."""
    token = (daemon.runtime_dir / str(daemon.port) / "token").read_text()
    for pid in [daemon.process.pid, *(worker.pid for worker in daemon.workers())]:
        assert token not in Path(f"/proc/{pid}/cmdline").read_text()
