"""The sidebar panel in a real ComfyUI with its own frontend, in a real browser, on a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luna_daemon.wire import messages as m
from tests.browser import Browser, browsing
from tests.comfy.test_two_servers import Server, start_server
from tests.integration.conftest import daemons_below
from tests.integration.helpers import DEMO_TOML, Background

pytestmark = pytest.mark.timeout(240)

SHADOW = "const root = document.querySelector('.luna-host').shadowRoot;"
MODEL = {"kind": "vae", "name": "demo"}


class Panel:
    """The panel in ComfyUI's window, by what people see of it."""

    def __init__(self, browser: Browser, server: Server) -> None:
        self.browser, self.server = browser, server
        self.url = f"http://127.0.0.1:{server.port}/"

    def open(self) -> Panel:
        """ComfyUI's window, with the tab open and wide enough to be read."""
        self.browser.errors()  # of the test before
        self.browser.open(self.url, 1400, 1000)
        self.browser.wait(lambda: self.browser.run("return document.querySelector('.luna-tab-button')"), 60, "the tab")
        self.browser.run("document.querySelector('.luna-tab-button').click()")
        self.browser.wait(lambda: self.browser.run("return document.querySelector('.luna-host')"), 5, "the panel")
        self.browser.run("document.querySelector('.side-bar-panel').style.flexBasis = '33%'")
        return self

    def field(self, name: str) -> str:
        return self.browser.run(SHADOW + f"return root.querySelector('[data-field={name}]').textContent")

    def press(self, button: str) -> None:
        self.browser.run(
            SHADOW + "[...root.querySelectorAll('button')].find((one) => one.textContent === arguments[0]).click()",
            button,
        )

    def settle(self) -> None:
        """Wait until nothing fades or grows any more: colours in between are nobody's."""
        fading = "return root.getAnimations().some((one) => one instanceof CSSTransition)"
        self.browser.wait(lambda: not self.browser.run(SHADOW + fading), 10, "the panel has settled")

    def badge(self) -> str:
        return self.browser.run(
            "return document.querySelector('.luna-tab-button .sidebar-icon-badge, .luna-tab-button .p-badge')"
            "?.textContent ?? ''"
        )

    def toasts(self) -> str:
        toasts = "return [...document.querySelectorAll('.p-toast-message')].map((one) => one.innerText).join()"
        return self.browser.run(toasts)

    def ours(self) -> list[str]:
        """Errors on the console that come from our files."""
        return [text for text in self.browser.errors() if "luna" in text and "workflow_templates" not in text]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def start(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        python = os.environ.get("COMFYUI_PYTHON") or sys.executable
        yield lambda **settings: start(
            toml=DEMO_TOML, backend="comfy", comfyui_path=os.environ["COMFYUI_PATH"], comfyui_python=python,
            cpu_threads=1, **settings,
        )  # fmt: skip


@pytest.fixture(scope="module")
def daemon(start: Any) -> Any:
    return start()


@pytest.fixture(scope="module")
def server(daemon: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "models").mkdir()
    (folder / "server").mkdir()
    with contextlib.ExitStack() as ends:
        running = start_server(folder / "server", daemon, folder / "models", ends, frontend=True)
        running.wait_until_it_answers()
        setting(running, "Comfy.TutorialCompleted", True)
        yield running


@pytest.fixture
def panel(browser: Browser, server: Server) -> Panel:
    return Panel(browser, server).open()


def setting(server: Server, name: str, value: Any) -> None:
    """As ComfyUI's window saves one."""
    post(server, f"/settings/{name}", value)


def post(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def loaded(daemon: Any) -> list[str]:
    return daemon.info()["models"]["loaded"]


def test_the_tab_shows_the_daemons_figures(panel, daemon):
    """State, requests and workers, second by second; what runs is on the badge."""
    import torch

    client = daemon.client(name="panel test")
    client.call(m.VaeDecode(m.ModelRef("vae", "demo")), [torch.zeros(1, 16, 8, 8)])
    client.lora_cache_put("ink.safetensors", {"weight": torch.zeros(1000, 1000)})
    panel.browser.wait(lambda: panel.field("status") == "running", 5, "the daemon is shown")
    ops = ("vae", "clip", "lora", "models.load")
    work = sum(n for op, n in daemon.info()["requests"].items() if op.startswith(ops))
    panel.browser.wait(lambda: panel.field("requests") == str(work), 3, "its requests")
    assert panel.browser.run(SHADOW + "return root.querySelectorAll('.worker').length") == len(daemon.info()["workers"])
    assert "luna_demo_vae" in panel.field("models")
    panel.browser.shot("comfyui", whole=False)
    client.call(m.VaeDecode(m.ModelRef("vae", "demo")), [torch.zeros(1, 16, 8, 8)])
    assert panel.badge() == ""
    assert panel.ours() == []


def test_the_badge_counts_what_runs(panel, daemon):
    """While requests are in flight, and not after."""
    import torch

    seen = threading.Event()

    def work() -> None:
        client = daemon.client()
        while not seen.is_set():
            client.call(m.VaeDecode(m.ModelRef("vae", "demo")), [torch.zeros(1, 16, 48, 48)])

    background = Background(work)
    try:
        panel.browser.wait(lambda: panel.badge() == "1", 20, "the badge")
    finally:
        seen.set()
    background.wait()
    panel.browser.wait(lambda: panel.badge() == "", 20, "no badge")


def test_the_theme_is_comfyuis(panel, server):
    setting(server, "Comfy.ColorPalette", "light")
    try:
        panel.open()
        assert panel.browser.run(SHADOW + "return root.querySelector('.luna').dataset.theme") == "light"
        panel.browser.wait(lambda: panel.field("status") == "running", 5)
        panel.settle()
        panel.browser.shot("comfyui-light", whole=False)
        assert panel.browser.faint(".luna *", ".luna-host") == []
    finally:
        setting(server, "Comfy.ColorPalette", "dark")
    panel.open()
    assert panel.browser.run(SHADOW + "return root.querySelector('.luna').dataset.theme") == "dark"
    panel.browser.wait(lambda: panel.field("status") == "running", 5)
    panel.settle()
    assert panel.browser.faint(".luna *", ".luna-host") == []


def test_buttons_do_what_the_setting_allows(panel, server, daemon):
    """On ComfyUI's own machine by default; nobody, if that is set: the server refuses it, whatever the page shows."""
    post(server, "/luna/call", {"op": "models.unload"})
    assert not loaded(daemon)
    panel.press("Warm")
    panel.browser.wait(lambda: loaded(daemon), 30, "the model is loaded")
    panel.browser.wait(lambda: "demo (VAE) is loaded" in panel.toasts(), 5, "and a toast says so")

    setting(server, "Luna.AllowChanges", "off")
    try:
        panel.press("Unload")
        panel.browser.wait(lambda: "does not let the panel change anything" in panel.toasts(), 5, "the refusal")
        assert loaded(daemon)
    finally:
        setting(server, "Luna.AllowChanges", "local")


@pytest.mark.parametrize(
    ("choice", "headers", "body", "status"),
    [
        ("local", {}, {"op": "models.load", "model": MODEL}, 200),
        ("local", {"X-Forwarded-For": "10.0.0.7"}, {"op": "models.load", "model": MODEL}, 403),
        ("all", {"X-Forwarded-For": "10.0.0.7"}, {"op": "models.load", "model": MODEL}, 200),
        ("off", {}, {"op": "models.load", "model": MODEL}, 403), ("all", {}, {"op": "shutdown"}, 400),
        ("all", {}, ["op"], 400), ("all", {}, {"op": ["drain"]}, 400), ("all", {}, {"op": "lora.pin"}, 400),
        ("all", {"Content-Type": "text/plain"}, {"op": "models.load", "model": MODEL}, 400),
        ("local", {"Origin": "http://evil.example"}, {"op": "models.load", "model": MODEL}, 403),
    ],
)  # fmt: skip
def test_what_may_be_called(server, choice, headers, body, status):
    """By whom, and with what."""
    setting(server, "Luna.AllowChanges", choice)
    try:
        assert post(server, "/luna/call", body, headers)[0] == status
    finally:
        setting(server, "Luna.AllowChanges", "local")


def test_free_memory_is_forwarded_if_that_is_set(server, daemon):
    """ComfyUI's own button frees the daemon's memory too, for those who ask for it."""
    before = daemon.info()["requests"].get("models.unload", 0)
    for forward in (False, True):
        setting(server, "Luna.ForwardFreeMemory", forward)
        post(server, "/luna/call", {"op": "models.load", "model": MODEL})
        assert loaded(daemon)
        assert post(server, "/free", {"unload_models": False})[0] == 200
        assert post(server, "/api/free", {"unload_models": True, "free_memory": True})[0] == 200
    daemon.wait_for(lambda info: not info["models"]["loaded"])
    assert daemon.info()["requests"]["models.unload"] == before + 1, "only the second time"


def test_the_settings_are_in_comfyuis_window(panel):
    known = panel.browser.run(
        "const { app } = await import('/scripts/app.js');"
        "return Object.keys(app.extensionManager.setting.settings).filter((id) => id.startsWith('Luna.')).sort()"
    )
    assert known == ["Luna.AllowChanges", "Luna.ForwardFreeMemory", "Luna.ShowErrors", "Luna.StartFromComfyUI"]


def test_away_and_back_and_a_toast_for_what_was_made_locally(panel, server, daemon, start):
    """The daemon goes: panel and badge say so; a prompt still runs, and a toast says how; the daemon comes back."""
    panel.browser.wait(lambda: panel.field("status") == "running", 5)
    daemon.stop()
    panel.browser.wait(lambda: panel.field("status") == "away", 10, "the panel says that it is away")
    panel.browser.wait(lambda: "No Luna Daemon answers." in panel.field("why"), 5, "and why")
    panel.browser.wait(lambda: panel.badge() == "!", 3, "the badge warns")
    panel.browser.wait(lambda: not panel.toasts(), 15, "old toasts are gone")
    (Path(server.folder) / "models" / "vae").mkdir(exist_ok=True)
    server.post(encode_workflow(server))
    panel.browser.wait(lambda: "steps in" in panel.toasts() or "loaded here" in panel.toasts(), 60, "the toast")
    panel.browser.shot("comfyui-away", whole=False)
    assert panel.ours() == [], "the panel's own connection to ComfyUI stays"

    panel.open()
    panel.browser.wait(lambda: panel.field("status") == "away", 5, "a window that opens meanwhile says it too")
    assert panel.browser.run(SHADOW + "return root.querySelector('main').hidden") and panel.badge() == ""
    panel.browser.shot("comfyui-never-there", whole=False)

    again = start(port=daemon.port, ws_port=daemon.ws_port)
    panel.browser.wait(lambda: panel.field("status") == "running", 15, "it is found again")
    assert again.info()["status"] == "running"
    panel.browser.wait(lambda: panel.badge() != "!", 3)


def encode_workflow(server: Server) -> dict[str, Any]:
    """A picture through the VAE of a Luna node and back."""
    import shutil

    from tests.integration.conftest import DEMO_VAE

    shutil.copy(DEMO_VAE, Path(server.folder) / "models" / "vae" / "demo_vae.safetensors")
    picture = {"width": 64, "height": 64, "batch_size": 1, "color": 0x336699}
    return {
        "vae": {"class_type": "LunaLoadVAE", "inputs": {"vae_name": "demo_vae.safetensors"}},
        "picture": {"class_type": "EmptyImage", "inputs": picture},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["vae", 0]}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["encode", 0], "vae": ["vae", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "panel"}},
    }
