"""The tray on a virtual screen: a real X server, a real panel, a real daemon, and what a user sees and clicks."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from luna_daemon.client import DaemonClient
from luna_daemon.config import load_settings
from luna_daemon.core import LunaError
from luna_daemon.system.runtime import has_ended, read_facts
from luna_daemon.tray.icon import COLOURS
from luna_daemon.tray.state import Action, Preferences, TrayState, View, menu
from luna_daemon.wire import messages as m
from tests.integration.conftest import ROOT, free_port
from tests.integration.helpers import Background, make_certificate

TRAY = ROOT / "luna_daemon" / "tray_app.py"
PICTURES = ROOT / "build" / "tray"
GI = Path("/usr/lib/python3/dist-packages/gi")
"""Debian's bindings to GTK, which the icon needs; they fit an interpreter of the same version."""

_TOOLS = ("Xvfb", "trayer", "xdotool", "xwininfo", "import", "dbus-daemon")
_MISSING = [tool for tool in _TOOLS if shutil.which(tool) is None]
if not (GI / f"_gi{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
    _MISSING.append("python3-gi for this Python")

screen_needed = pytest.mark.skipif(bool(_MISSING), reason=f"no virtual desktop: {', '.join(_MISSING)} not installed")
posix = pytest.mark.skipif(os.name != "posix", reason="X11 is POSIX")


@contextmanager
def process(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone afterwards."""
    started = subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, **options)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
            try:
                started.wait(5)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
        if started.stdout is not None:
            started.stdout.close()


@contextmanager
def virtual_screen() -> Iterator[str]:
    """An X server of our own, which does not begin anew when a client was the last for a moment; yields its display."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "480x360x24", "-nolisten", "tcp", "-noreset"]
    with process(*command, pass_fds=[write], stderr=subprocess.DEVNULL):
        os.close(write)
        with os.fdopen(read) as answer:
            yield f":{answer.readline().strip()}"


@pytest.fixture(scope="module")
def panel() -> Iterator[str]:
    """A screen whose panel shows tray icons."""
    look = ["--edge", "bottom", "--align", "right", "--widthtype", "request", "--height", "24", "--tint", "0x282a2e"]
    with ExitStack() as stack:
        display = stack.enter_context(virtual_screen())
        environ = {**os.environ, "DISPLAY": display}
        shown = stack.enter_context(process("trayer", *look, env=environ, stderr=subprocess.DEVNULL))
        wait_for(lambda: '"panel"' in windows(display) or shown.poll() is not None)
        assert shown.poll() is None, "the panel ended"
        yield display


@pytest.fixture(scope="module")
def bus() -> Iterator[str]:
    """A session bus: notifications go there."""
    command = ["dbus-daemon", "--session", "--nofork", "--print-address=1"]
    with process(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as started:
        assert started.stdout is not None
        yield started.stdout.readline().strip()


def windows(display: str) -> str:
    """What is on a screen."""
    return subprocess.run(["xwininfo", "-display", display, "-root", "-tree"], capture_output=True, text=True).stdout


def wait_for(holds: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The first true answer of ``holds``."""
    end = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
    return found


class Desk:
    """A user's surroundings on a display: his trays, what he sees and clicks."""

    def __init__(self, folder: Path, display: str | None) -> None:
        self.folder = folder
        self.runtime_dir = folder / "run"
        self.runtime_dir.mkdir()
        self.port, self.ws_port = free_port(), free_port()
        self.display = display
        self.output = folder / "tray.out"
        self.opened = folder / "opened"
        self.stack = ExitStack()
        private = ("LUNA_", "COMFYUI_", "DISPLAY", "WAYLAND", "DBUS_", "XDG_", "PYSTRAY_")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(private)} | {
            "LUNA_PORT": str(self.port), "LUNA_WS_PORT": str(self.ws_port), "LUNA_RUNTIME_DIR": str(self.runtime_dir),
            "LUNA_ARENA_MB": "64", "NO_AT_BRIDGE": "1", "HOME": str(folder), "BROWSER": str(self._opener("browser")),
            "PATH": f"{self._opener('xdg-open').parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        if display is not None:
            self.environ["DISPLAY"] = display

    def _opener(self, name: str) -> Path:
        """A program that writes down what it was to open."""
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.opened}"\n')
        path.chmod(0o755)
        return path

    def give_gtk(self) -> None:
        """GTK's bindings, as in an environment with ``--system-site-packages``."""
        (self.folder / "gi").mkdir()
        (self.folder / "gi" / "gi").symlink_to(GI)
        self.environ["PYTHONPATH"] = str(self.folder / "gi")

    def prefer(self, **ticks: bool) -> None:
        (self.runtime_dir / "tray.json").write_text(json.dumps(ticks))

    def start(self, *options: str, shown: bool = True) -> subprocess.Popen[str]:
        """A tray, once its icon is in the panel."""
        output = self.stack.enter_context(self.output.open("w"))
        command = [sys.executable, str(TRAY), *options]
        started = self.stack.enter_context(
            process(*command, cwd=self.folder, env=self.environ, stdout=output, stderr=output)
        )
        if shown:
            wait_for(lambda: self.icon() is not None or started.poll() is not None)
        return started

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=60
        )

    # --- looking and clicking ---

    def icon(self) -> tuple[int, int, int, int] | None:
        """Left, top, width and height of the icon on the screen."""
        assert self.display is not None
        for line in windows(self.display).splitlines():
            if '"Luna Daemon' in line:
                size, place = line.split()[-2:]
                width, height = size.split("+")[0].split("x")
                _, left, top = place.split("+")
                if int(width) > 1:
                    return int(left), int(top), int(width), int(height)
        return None

    def picture(self, name: str) -> Any:
        """A picture of the screen, kept to be looked at."""
        from PIL import Image

        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}.png"
        subprocess.run(["import", "-display", str(self.display), "-window", "root", str(path)], check=True)
        with Image.open(path) as image:
            return image.convert("RGB")

    def seen(self, name: str = "now") -> TrayState | None:
        """The state whose colour the icon has; none between two. Both ambers are ``STARTING``."""
        place = self.icon()
        if place is None:
            return None
        left, top, width, height = place
        pixels = np.asarray(self.picture(name), dtype=int)[top : top + height, left : left + width]
        for state in (TrayState.RUNNING, TrayState.STARTING, TrayState.STOPPED, TrayState.ERROR):
            close = np.abs(pixels - COLOURS[state]).sum(axis=-1) < 24
            if close.sum() > close.size / 6 > 0:
                return state
        return None

    def wait_until(self, state: TrayState, name: str, timeout_s: float = 20.0) -> None:
        """Until the icon shows a state; the picture of that moment is kept under ``name``."""
        try:
            wait_for(lambda: self.seen(name) is state, timeout_s)
        except AssertionError:
            raise AssertionError(f"the icon never was {state.value}: {self.output.read_text()}") from None

    def said(self, words: str) -> bool:
        return words in self.output.read_text()

    def xdotool(self, *command: str) -> None:
        subprocess.run(["xdotool", *command], env=self.environ, check=True, capture_output=True)

    def click(self, button: int = 1) -> None:
        """Click on the icon."""
        left, top, width, height = self.icon() or (0, 0, 0, 0)
        self.xdotool("mousemove", str(left + width // 2), str(top + height // 2), "click", str(button))

    def choose(self, action: Action, picture: str = "") -> None:
        """Open the menu and walk down to an entry by the keyboard."""
        alive = self.info()
        preferences = Preferences.load(self.runtime_dir / "tray.json")
        view = View(TrayState.RUNNING, info=alive) if alive else View()
        reachable = [entry.action for entry in menu(view, preferences, True) if entry.enabled and entry.text]
        before = len(windows(str(self.display)).splitlines())
        self.click(3)
        wait_for(lambda: len(windows(str(self.display)).splitlines()) > before)
        time.sleep(0.3)  # the menu takes the keyboard some time after its window is there, and shows no sign of it
        self.xdotool("mousemove", "1", "1")
        for _ in range(reachable.index(action) + 1):
            self.xdotool("key", "Down")
        time.sleep(0.2)
        if picture:
            self.picture(picture)
        self.xdotool("key", "Return")

    # --- the daemon ---

    def client(self) -> DaemonClient:
        return DaemonClient("127.0.0.1", self.port, runtime_dir=self.runtime_dir, name="a user")

    def info(self) -> dict[str, Any] | None:
        try:
            with self.client() as client:
                return client.get_daemon_info()
        except LunaError:
            return None

    def pid(self) -> int:
        return int(read_facts(self.port, self.runtime_dir)["pid"])

    def end(self) -> None:
        """Trays first: they would start the daemon again."""
        self.stack.close()
        pid = read_facts(self.port, self.runtime_dir).get("pid")
        if pid is not None and psutil.pid_exists(pid):
            daemon = psutil.Process(pid)
            family = [daemon, *daemon.children(recursive=True)]
            for one in family:
                one.kill()
            # No children of ours: who has adopted them need not be quick to collect them.
            wait_for(lambda: all(has_ended(one.pid, self.folder) for one in family))


@pytest.fixture
def desk(tmp_path: Path, panel: str, bus: str) -> Iterator[Desk]:
    """A desk with a panel, GTK and a session bus."""
    user = Desk(tmp_path, panel)
    user.give_gtk()
    user.environ["DBUS_SESSION_BUS_ADDRESS"] = bus
    yield user
    user.end()


@screen_needed
def test_the_icon_follows_the_daemon(desk: Desk) -> None:
    """Green when it runs, grey when it was stopped elsewhere, red when it crashed; a click starts it again."""
    desk.prefer(restart=False)
    tray = desk.start()
    desk.wait_until(TrayState.RUNNING, "running")
    assert desk.run("-m", "luna_daemon", "stop").returncode == 0
    desk.wait_until(TrayState.STOPPED, "stopped")
    desk.click()
    desk.wait_until(TrayState.RUNNING, "running again")
    os.kill(desk.pid(), signal.SIGKILL)
    desk.wait_until(TrayState.ERROR, "error")
    assert desk.said("notified the user: the daemon was killed by signal SIGKILL\n")
    time.sleep(3)  # the time is what is tested: a restart would come within it
    assert desk.seen() is TrayState.ERROR, "it was started again, though that is not wanted"
    assert tray.poll() is None


@screen_needed
def test_a_crashed_daemon_is_started_again(desk: Desk) -> None:
    """As the menu's tick says, which is set from the start: twice, the second time later."""
    desk.start()
    waits = []
    for _ in range(2):
        desk.wait_until(TrayState.RUNNING, "now")
        before, began = desk.pid(), time.monotonic()
        os.kill(before, signal.SIGKILL)
        wait_for(lambda before=before: (desk.info() or {"pid": before})["pid"] != before)
        waits.append(time.monotonic() - began)
    assert desk.said("killed by signal SIGKILL. It will be restarted")
    assert waits[1] > 1.5, "the second restart did not wait longer"


@screen_needed
def test_a_daemon_that_hangs_is_told_from_one_that_ended(desk: Desk) -> None:
    """Stopped in its tracks it is red, not started a second time; it runs on and is green."""
    desk.start()
    desk.wait_until(TrayState.RUNNING, "now")
    daemon = psutil.Process(desk.pid())
    daemon.suspend()
    try:
        desk.wait_until(TrayState.ERROR, "silent", 30)
        assert desk.said("notified the user: the daemon's process is alive but does not answer")
    finally:
        daemon.resume()
    desk.wait_until(TrayState.RUNNING, "now")
    assert desk.pid() == daemon.pid


@screen_needed
def test_a_click_opens_the_page(desk: Desk) -> None:
    """The browser gets the address of the daemon's page."""
    desk.start()
    wait_for(lambda: (desk.info() or {}).get("ws_port"))
    wait_for(lambda: desk.click() or time.sleep(0.5) or desk.opened.exists())
    assert set(desk.opened.read_text().splitlines()) == {f"browser http://127.0.0.1:{desk.ws_port}/"}


@screen_needed
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_the_page_of_a_daemon_with_tls_is_https(desk: Desk) -> None:
    cert, key = make_certificate(desk.folder, "desk")
    desk.environ |= {"LUNA_TLS_CERT": str(cert), "LUNA_TLS_KEY": str(key)}
    desk.start()
    wait_for(lambda: (desk.info() or {}).get("ws_port"))
    wait_for(lambda: desk.click() or time.sleep(0.5) or desk.opened.exists())
    assert set(desk.opened.read_text().splitlines()) == {f"browser https://127.0.0.1:{desk.ws_port}/"}


@screen_needed
def test_the_daemon_outlives_the_tray(desk: Desk) -> None:
    """SIGTERM is Exit: code 0, the daemon runs on, and the next tray attaches to it instead of starting another."""
    tray = desk.start()
    desk.wait_until(TrayState.RUNNING, "now")
    pid = desk.pid()
    tray.send_signal(signal.SIGTERM)
    assert tray.wait(10) == 0
    assert (desk.info() or {})["pid"] == pid
    desk.start()
    desk.wait_until(TrayState.RUNNING, "attached")
    assert (desk.info() or {})["pid"] == pid
    assert not desk.said("starting")


@screen_needed
def test_a_daemon_of_others_making_is_attached_to(desk: Desk, start_daemon) -> None:
    """One that was started in a terminal is shown, and its crash is seen, though it is no child of the tray."""
    theirs = start_daemon(port=desk.port, runtime_dir=str(desk.runtime_dir))
    theirs.expected_to_die = True
    desk.prefer(restart=False)
    desk.start()
    desk.wait_until(TrayState.RUNNING, "now")
    theirs.process.kill()
    theirs.process.wait()
    desk.wait_until(TrayState.ERROR, "now")
    assert desk.said("the daemon ended without cleaning up")


@screen_needed
def test_a_daemon_that_cannot_start_is_an_error_with_its_reason(desk: Desk) -> None:
    """The port is somebody else's: red, with the words that serve would use; a click tries again."""
    import socket

    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", desk.port))
        other.listen()
        desk.start()
        desk.wait_until(TrayState.ERROR, "port taken", 40)
        assert desk.said(f"port {desk.port} on 127.0.0.1 is in use by")
    desk.click()
    desk.wait_until(TrayState.RUNNING, "now")


@screen_needed
def test_one_tray_per_user(desk: Desk) -> None:
    """The second says so in one line and ends with 1; once the first is gone there may be another."""
    tray = desk.start()
    second = desk.run(str(TRAY))
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("luna-daemon: this user's tray icon is shown already. ")
    assert len(second.stderr.splitlines()) == 1
    tray.kill()
    tray.wait()
    assert desk.start().poll() is None


@screen_needed
def test_the_predecessors_arguments_reach_the_daemon(desk: Desk) -> None:
    """Device, precisions and service type are the daemon's; what is not given is left to its configuration."""
    (desk.folder / "luna.toml").write_text("queue_limit = 7\n")
    desk.start("--device", "cpu", "--vae-precision", "fp32", "--clip-precision", "bf16", "--service-type", "vae_only")
    info = wait_for(desk.info)
    assert (info["service_type"], info["queue"]["limit"]) == ("vae", 7)
    settings = load_settings({}, psutil.Process(info["pid"]).environ())
    assert (settings.vae_device, settings.clip_device) == ("cpu", "cpu")
    assert (settings.vae_precision, settings.clip_precision) == ("fp32", "bf16")


# --- with a menu ---


@screen_needed
def test_the_menu(desk: Desk) -> None:
    """Every entry does what it says: stop drains, start starts, the log opens, the tick is kept, exit obeys it."""
    tray = desk.start()
    desk.wait_until(TrayState.RUNNING, "now")
    wait_for(lambda: (desk.info() or {}).get("ws_port"))
    time.sleep(2)  # the menu knows of the page by then
    with desk.client() as client:
        running = Background(lambda: client.call(m.Echo(4, 4.0)))
        wait_for(lambda: (desk.info() or {})["in_flight"])
        desk.choose(Action.STOP, "menu")
        desk.wait_until(TrayState.STARTING, "stopping")
        assert running.value().tensors[0].numel() == 1, "the request that ran was not finished"
    desk.wait_until(TrayState.STOPPED, "stopped")
    assert desk.info() is None
    time.sleep(0.5)
    desk.choose(Action.OPEN_LOG, "menu stopped")
    wait_for(desk.opened.exists)
    assert desk.opened.read_text() == f"xdg-open {desk.runtime_dir / str(desk.port)}.log\n"
    desk.choose(Action.START)
    desk.wait_until(TrayState.RUNNING, "now")
    wait_for(lambda: (desk.info() or {}).get("ws_port"))
    time.sleep(2)
    desk.choose(Action.STOP_ON_EXIT)
    wait_for(lambda: Preferences.load(desk.runtime_dir / "tray.json").stop_on_exit)
    desk.choose(Action.EXIT, "menu ticked")
    assert tray.wait(20) == 0, desk.output.read_text()
    assert desk.info() is None
    assert not (desk.runtime_dir / str(desk.port)).exists()
    assert not desk.said("Traceback")


@screen_needed
@pytest.mark.skipif(shutil.which("dbus-monitor") is None, reason="no dbus-monitor to see notifications with")
def test_a_crash_is_notified(desk: Desk, bus: str) -> None:
    """The desktop is asked to show what happened."""
    seen = desk.folder / "notified"
    with seen.open("w") as output:
        watch = ["dbus-monitor", "--address", bus, "interface='org.freedesktop.Notifications',member='Notify'"]
        desk.stack.enter_context(process(*watch, stdout=output, stderr=subprocess.DEVNULL))
        desk.start()
        desk.wait_until(TrayState.RUNNING, "now")
        os.kill(desk.pid(), signal.SIGKILL)
        wait_for(lambda: "the daemon was killed by signal SIGKILL. It will be restarted" in seen.read_text())


# --- where there can be no icon ---


@posix
@pytest.mark.parametrize(
    "how", [[str(TRAY)], ["-I", str(TRAY)], ["-m", "luna_daemon", "tray"]], ids=["file", "-I", "command"]
)
def test_without_a_display(tmp_path: Path, how: list[str]) -> None:
    """One line, exit code 2, from any folder; nothing was started."""
    user = Desk(tmp_path, None)
    user.environ["PYTHONPATH"] = str(ROOT)
    done = user.run(*how)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "luna-daemon: a tray icon needs a display (neither DISPLAY nor WAYLAND_DISPLAY is set)"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not list(user.runtime_dir.iterdir())


@posix
@pytest.mark.skipif(importlib.util.find_spec("pystray") is None, reason="pystray is not installed")
def test_without_gtk(tmp_path: Path) -> None:
    """One line says what to install, and how an environment finds it; exit code 2, and nothing was started."""
    user = Desk(tmp_path, ":917")
    (tmp_path / "gi.py").write_text("raise ModuleNotFoundError(\"No module named 'gi'\")")
    user.environ["PYTHONPATH"] = str(tmp_path)
    done = user.run(str(TRAY))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "luna-daemon: the tray icon needs GTK 3 with its Python bindings (No module named 'gi'). Install python3-gi"
    )
    assert "--system-site-packages" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (user.runtime_dir / "tray.lock").exists() and not (user.runtime_dir / str(user.port)).exists()


@screen_needed
def test_with_a_display_that_is_not_there(tmp_path: Path) -> None:
    """The same for a display that cannot be opened."""
    user = Desk(tmp_path, ":917")
    user.give_gtk()
    done = user.run(str(TRAY))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("luna-daemon: the tray icon needs GTK 3 with its Python bindings (Gtk could not be")
    assert len(done.stderr.splitlines()) == 1


@screen_needed
def test_without_a_session_bus(tmp_path: Path, panel: str) -> None:
    """GTK alone is not enough: notifications and menus need the bus."""
    user = Desk(tmp_path, panel)
    user.give_gtk()
    done = user.run(str(TRAY))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("luna-daemon: the tray icon cannot be shown (")
    assert "session bus" in done.stderr and len(done.stderr.splitlines()) == 1
