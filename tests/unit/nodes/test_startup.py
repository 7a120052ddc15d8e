"""Starting the daemon with ComfyUI, as a real process; and warnings as toasts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from luna_daemon.client import DaemonClient
from luna_daemon.core import LunaError
from tests.integration.conftest import free_port

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def startup(part):
    return part("startup")


@pytest.mark.parametrize(
    ("variable", "window", "found"),
    [
        ("", None, "off"), ("off", "independent", "off"), ("with_comfyui", None, "with_comfyui"),
        ("", "independent", "independent"), ("", "", "off"), ("yes", None, "off"), ("", 3, "off"),
    ],
)  # fmt: skip
def test_what_is_set(startup, tmp_path, caplog, variable, window, found):
    """The environment, then ComfyUI's window; a slip is warned of and starts nothing."""
    file = tmp_path / "comfy.settings.json"
    file.write_text(json.dumps({} if window is None else {startup.SETTING: window}))
    assert startup.chosen({startup.VARIABLE: variable}, file) == found
    assert ("must be one of" in caplog.text) == (variable == "yes" or window == 3)


@pytest.mark.parametrize("text", ["", "[]", "{", None])
def test_a_broken_settings_file_is_off(startup, tmp_path, text):
    """Or one that is not there."""
    file = tmp_path / "comfy.settings.json"
    if text is not None:
        file.write_text(text)
    assert startup.chosen({}, file) == startup.chosen({}, None) == "off"


def test_the_daemon_gets_this_comfyuis_folders(startup, comfyui):
    """Its code, its interpreter, and each model folder that exists, after those that the user named."""
    found = startup.daemon_settings(comfyui.paths, [Path("/mine")])
    assert found["comfyui_path"] == comfyui.root and found["comfyui_python"] == Path(sys.executable)
    assert found["model_dirs"] == [
        Path("/mine"),
        *(comfyui.models / name for name in ("checkpoints", "text_encoders", "vae", "vae_approx", "loras")),
    ]  # fmt: skip


def test_nothing_is_started_unasked(startup, comfyui, monkeypatch):
    """Off is the default."""
    monkeypatch.delenv(startup.VARIABLE, raising=False)
    monkeypatch.setattr(startup, "show_warnings", lambda: None)
    assert startup.begin() is None


HOST = """
import sys, time, types, importlib.util as u
paths = types.ModuleType("folder_paths"); paths.__file__ = {root!r} + "/folder_paths.py"
paths.get_folder_paths = lambda kind: [{root!r}]; paths.get_user_directory = lambda: {root!r}
sys.modules["folder_paths"] = paths
spec = u.spec_from_file_location("/packs/luna-daemon", {pack!r})
module = u.module_from_spec(spec); sys.modules["/packs/luna-daemon"] = module; spec.loader.exec_module(module)
import threading
[thread.join() for thread in threading.enumerate() if thread.name == "luna-start"]
print("ready", flush=True)
{then}
"""


@pytest.fixture
def host(tmp_path):
    """Starts a process that loads the pack as ComfyUI would; what is left over is ended."""
    port, started = free_port(), []

    def start(choice, then="time.sleep(100)"):
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("LUNA_", "COMFYUI_"))}
        environ |= {
            "LUNA_START_FROM_COMFYUI": choice, "LUNA_PORT": str(port), "LUNA_WS_PORT": str(free_port()),
            "LUNA_RUNTIME_DIR": str(tmp_path / "run"), "LUNA_BACKEND": "diffusers",
        }  # fmt: skip
        code = HOST.format(root=str(tmp_path), pack=str(ROOT / "__init__.py"), then=then)
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        line = process.stdout.readline()
        assert line == b"ready\n", process.stderr.read().decode()
        return process

    def ask():
        with DaemonClient("127.0.0.1", port, runtime_dir=tmp_path / "run", name="test") as client:
            try:
                return client.get_daemon_info()["pid"]
            except LunaError:
                return None

    yield SimpleNamespace(start=start, ask=ask)
    pid = ask()
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    if pid is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).terminate()


def eventually(holds, timeout_s=15.0):
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="ends processes by signals")
@pytest.mark.parametrize("how", ["exit", "SIGTERM", "SIGKILL"])
def test_with_comfyui_the_daemon_ends_when_comfyui_does(host, how):
    """However that ends."""
    process = host.start("with_comfyui", "" if how == "exit" else "time.sleep(100)")
    if how == "exit":
        process.wait(15)
    else:
        pid = host.ask()
        assert pid not in (None, process.pid)
        process.send_signal(signal.Signals[how])
        process.wait(15)
    eventually(lambda: host.ask() is None)


def test_an_independent_daemon_stays_and_is_found_by_the_next(host):
    """And is not started twice."""
    first = host.start("independent", "")
    first.wait(15)
    pid = host.ask()
    assert pid is not None
    host.start("with_comfyui", "").wait(15)
    time.sleep(1.0)
    assert host.ask() == pid


def test_off_starts_nothing(host):
    """Not even if nobody answers."""
    host.start("off", "").wait(15)
    assert host.ask() is None


# --- toasts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def window(monkeypatch):
    """A server that notes what it sends."""
    sent = []
    server = SimpleNamespace(
        PromptServer=SimpleNamespace(instance=SimpleNamespace(send_sync=lambda *a: sent.append(a)))
    )
    monkeypatch.setitem(sys.modules, "server", server)
    return sent


def test_warnings_are_toasts(part, window):
    """Once, however often it was set up; what is no warning is not."""
    logger = logging.getLogger("luna_daemon")
    before = list(logger.handlers)
    try:
        part("toast").show_warnings()
        part("toast").show_warnings()
        logger.warning("the local model steps in: %s", "away")
        logger.info("not shown")
        logger.error("broken")
    finally:
        logger.handlers[:] = before
    assert window == [
        ("luna.toast", {"severity": "warn", "summary": "Luna Daemon", "detail": "the local model steps in: away"}),
        ("luna.toast", {"severity": "error", "summary": "Luna Daemon", "detail": "broken"}),
    ]


def test_without_a_server_nothing_is_sent(part, monkeypatch):
    """In a script, or before ComfyUI's server is made."""
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace()))
    assert part("toast").toast("hello") is False
