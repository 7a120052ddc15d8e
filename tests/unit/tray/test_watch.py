"""The tray's watch with a daemon and a clock that the test holds: when it attaches, starts, restarts and stops."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from luna_daemon.config import load_settings
from luna_daemon.core import ConfigError, DaemonConnectionError
from luna_daemon.tray import watch as tray_watch
from luna_daemon.tray.state import SILENT, TrayState
from luna_daemon.tray.watch import Watch, Wish
from luna_daemon.wire import messages as m

RUNNING = {"status": "running", "ws_port": None}


class Scene:
    """One daemon as the watch sees it: what is started, what answers, how it ends, what time it is."""

    def __init__(self, folder, monkeypatch) -> None:
        self.settings = load_settings({"port": 5, "runtime_dir": folder}, {})
        self.now, self.restarts, self.failure = 1000.0, True, None
        self.answer, self.exit_code = None, None
        self.done, self.shown = [], []
        self.pid = 7
        monkeypatch.setattr(tray_watch, "_client", lambda settings: self)
        self.watch = Watch(self, self.make, lambda: self.restarts, self.shown.append, lambda: self.now)

    def make(self) -> Scene:
        if self.failure is not None:
            raise self.failure
        return self

    def start(self) -> Scene:
        self.done.append("started")
        self.answer, self.exit_code = RUNNING, None
        return self

    def stop(self) -> None:
        self.done.append("stopped")
        self.answer, self.exit_code = None, 0

    def call(self, call, is_cancelled):
        if self.answer is None:
            raise DaemonConnectionError("nobody answers")
        if isinstance(call, m.Shutdown):
            self.done.append("shut down")
            self.answer = None
        return SimpleNamespace(result=self.answer)

    def close(self) -> None:
        pass

    def crash(self) -> None:
        self.answer, self.exit_code = None, 3

    def look(self, wish=None) -> TrayState:
        self.watch._turn(wish)
        return self.watch.view.state

    def seconds_to_restart(self) -> int:
        began, starts = self.now, self.done.count("started")
        while self.done.count("started") == starts and self.now - began < 100:
            self.now += 1
            self.look()
        return int(self.now - began)


@pytest.fixture
def scene(tmp_path, monkeypatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_a_daemon_that_answers_is_attached_to(scene):
    """Nothing is started; stopping it goes by its own connection."""
    scene.answer = RUNNING
    assert scene.look(Wish.START) is TrayState.RUNNING
    assert scene.look(Wish.STOP) is TrayState.STOPPED
    assert scene.done == ["shut down"]


def test_a_daemon_of_the_trays_own(scene):
    """It is started where none answers, and stopped as a process."""
    assert scene.look(Wish.START) is TrayState.RUNNING
    assert TrayState.STARTING in [view.state for view in scene.shown]
    assert scene.look(Wish.STOP) is TrayState.STOPPED
    assert scene.done == ["started", "stopped"]
    assert scene.seconds_to_restart() == 100, "a stopped daemon was started again"


def test_each_crash_waits_longer_and_a_minute_of_health_forgets_them(scene):
    """1 s, 2 s, 4 s; then, after more than a minute, 1 s again."""
    scene.look(Wish.START)
    waits = []
    for health_s in (0, 0, 0, 61):
        scene.now += health_s
        scene.look()
        scene.crash()
        assert scene.look() is TrayState.ERROR
        waits.append(scene.seconds_to_restart())
    assert waits == [1, 2, 4, 1]


def test_a_crash_is_not_followed_by_a_start_that_is_not_wanted(scene):
    """As the menu's tick says."""
    scene.restarts = False
    scene.look(Wish.START)
    scene.crash()
    assert scene.seconds_to_restart() == 100
    assert scene.watch.view.state is TrayState.ERROR and scene.watch.view.crashed


def test_a_start_that_fails_gives_its_reason_and_is_not_repeated(scene):
    """The user has to change something first."""
    scene.failure = ConfigError("setting 'port' is 'x'", "Choose a number")
    assert scene.look(Wish.START) is TrayState.ERROR
    assert scene.watch.view.detail == "setting 'port' is 'x'. Choose a number"
    scene.failure = None
    assert scene.seconds_to_restart() == 100


def test_a_restart_that_fails_is_tried_again_later(scene):
    """The reason may pass, as a port that is still taken."""
    scene.look(Wish.START)
    scene.crash()
    scene.failure = ConfigError("not now")
    scene.look()
    scene.now += 1
    scene.look()
    assert scene.watch.view.detail == "not now"
    scene.failure = None
    assert scene.seconds_to_restart() == 2


def test_a_daemon_that_hangs_is_an_error_only_after_some_silence(scene):
    """A stop of it says that it does not answer, and it is not started a second time."""
    (scene.settings.runtime_dir / "5").mkdir()
    (scene.settings.runtime_dir / "5" / "daemon.json").write_text(f'{{"pid": {os.getpid()}}}')
    scene.answer = RUNNING
    scene.look(Wish.START)
    scene.answer = None
    scene.now += 4
    assert scene.look() is TrayState.RUNNING
    scene.now += 2
    assert scene.look() is TrayState.ERROR and scene.watch.view.detail == SILENT
    assert scene.look(Wish.STOP) is TrayState.ERROR
    assert scene.seconds_to_restart() == 100 and scene.done == []
