"""What the tray shows, decided without a screen and without a daemon."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from luna_daemon import tray_app
from luna_daemon.commands import cli
from luna_daemon.tray import icon as tray_icon
from luna_daemon.tray.state import (
    CLIENT_NAME,
    SILENT,
    Action,
    Preferences,
    Sight,
    TrayState,
    View,
    judge,
    menu,
    notice,
    statistics,
    title,
)

ROOT = Path(__file__).resolve().parents[3]
STOPPED, STARTING, RUNNING = View(), View(TrayState.STARTING), View(TrayState.RUNNING)
STOPPING, FAILED, HANGS = View(TrayState.STOPPING), View(TrayState.ERROR, "no"), View(TrayState.ERROR, SILENT)
CRASHED = View(TrayState.ERROR, "the daemon crashed with exit code 3", crashed=True)


def info(**changes):
    """As a daemon answers, in short."""
    worker = {"state": "busy", "models": {"vae:a": 1 << 30, "clip:b": 1 << 29}}
    idle = {"state": "idle", "models": {"vae:a": 1 << 30}}
    return {
        "status": "running", "ws_port": 5, "workers": [worker, idle], "queue": {"waiting": 0},
        "clients": [{"name": "ComfyUI"}, {"name": CLIENT_NAME}], **changes,
    }  # fmt: skip


# --- which state ---


@pytest.mark.parametrize("before", [STOPPED, STARTING, RUNNING, STOPPING, FAILED, HANGS, CRASHED])
def test_a_daemon_that_answers_is_believed(before):
    """Whatever was shown before: it runs, or it drains."""
    assert judge(before, Sight(info())).state is TrayState.RUNNING
    assert judge(before, Sight(info(status="draining"))).state is TrayState.STOPPING


@pytest.mark.parametrize(
    ("before", "sight", "after"),
    [
        (STARTING, Sight(alive=True), STARTING),
        (STOPPING, Sight(alive=True), STOPPING),
        (STOPPED, Sight(alive=True), STARTING),  # somebody else starts one
        (RUNNING, Sight(alive=True, silent_s=1), RUNNING),
        (RUNNING, Sight(alive=True, silent_s=9), HANGS),
        (HANGS, Sight(), STOPPED),
        (RUNNING, Sight(exit_code=0), STOPPED),
        (RUNNING, Sight(), STOPPED),
        (STOPPING, Sight(exit_code=0), STOPPED),
        (RUNNING, Sight(exit_code=3), CRASHED),
        (STARTING, Sight(exit_code=3), CRASHED),
        (STOPPED, Sight(), STOPPED),
        (STOPPED, Sight(left_behind=True), STOPPED),  # of a daemon that we never saw
        (FAILED, Sight(), FAILED),
        (CRASHED, Sight(left_behind=True), CRASHED),
    ],
)
def test_a_daemon_that_does_not_answer(before, sight, after):
    """What is shown depends on its process, how it ended, and what was shown before."""
    assert judge(before, sight) == after


def test_how_a_crash_is_told():
    """By exit code, by signal, and of a daemon that is no child of ours; one that was to stop is not started again."""
    assert judge(RUNNING, Sight(exit_code=1)).detail == "the daemon crashed with exit code 1"
    assert judge(RUNNING, Sight(exit_code=-9)).detail.endswith("9" if sys.platform == "win32" else "SIGKILL")
    assert judge(RUNNING, Sight(exit_code=-200)).detail.endswith("signal 200")
    assert "without cleaning up" in judge(RUNNING, Sight(left_behind=True)).detail
    dying = judge(STOPPING, Sight(exit_code=1))
    assert (dying.state, dying.crashed) == (TrayState.ERROR, False)


# --- which words ---


def test_statistics():
    """Each model counts once, its memory wherever it is held, the tray's own connection not at all."""
    assert statistics(info()) == "2 workers (1 busy), 2 models of 2.5 GB, 1 client"
    assert statistics(info(workers=[], clients=[], queue={"waiting": 3})) == "0 workers, 0 models, 0 clients, 3 waiting"


def test_tooltips_suit_every_desktop():
    """ASCII, at most what Windows takes, and the reason of an error."""
    assert title(View(TrayState.RUNNING, info=info())).startswith("Luna Daemon: running (2 workers")
    assert title(STOPPED) == "Luna Daemon: stopped"
    long = title(View(TrayState.ERROR, "/home/mül/模型 " * 30))
    assert long.isascii() and len(long) == 120 and long.endswith("...")


def test_notices():
    """Errors and ends are told, once; what was asked for and the figures are not."""
    assert notice(RUNNING, RUNNING, True) == notice(STOPPED, STARTING, True) == notice(STARTING, RUNNING, True) == ""
    assert notice(RUNNING, CRASHED, False) == CRASHED.detail
    assert notice(RUNNING, CRASHED, True) == f"{CRASHED.detail}. It will be restarted"
    assert notice(STARTING, FAILED, True) == "no"
    assert notice(STOPPING, STOPPED, True) == "The daemon has stopped"
    assert notice(HANGS, RUNNING, True) == "The daemon answers again"


# --- the menu ---


def by_action(view, **options):
    return {entry.action: entry for entry in menu(view, Preferences(**options), True) if entry.action}


@pytest.mark.parametrize(
    ("view", "start", "stop", "page"),
    [
        (STOPPED, True, False, False),
        (STARTING, False, False, False),
        (View(TrayState.RUNNING, info=info()), False, True, True),
        (View(TrayState.RUNNING, info=info(ws_port=None)), False, True, False),
        (STOPPING, False, False, False),
        (FAILED, True, False, False),
        (HANGS, False, True, False),
    ],
)
def test_what_can_be_chosen(view, start, stop, page):
    """Only what makes sense; a click on the icon is one of the things that do, or nothing."""
    entries = by_action(view)
    assert set(entries) == set(Action)
    assert [entries[a].enabled for a in (Action.START, Action.STOP, Action.OPEN_PAGE)] == [start, stop, page]
    defaults = [action for action, entry in entries.items() if entry.default]
    assert defaults == ([Action.START] if start else [Action.OPEN_PAGE] if page else [])
    assert entries[Action.EXIT].enabled


def test_the_menu_tells_the_reason_of_an_error_in_short():
    """Its second line; a menu as wide as the screen helps nobody."""
    entry = by_action(View(TrayState.ERROR, "because " * 30))[Action.STATUS]
    assert entry.enabled and entry.text.startswith("because because") and len(entry.text) == 60


def test_ticks_are_kept(tmp_path, caplog):
    """What was ticked is ticked the next time; a broken file is no reason not to start."""
    path = tmp_path / "tray.json"
    assert Preferences.load(path) == Preferences(stop_on_exit=False, restart=True)
    ticked = Preferences().toggled(Action.STOP_ON_EXIT).toggled(Action.RESTART)
    ticked.save(path)
    assert Preferences.load(path) == ticked == Preferences(stop_on_exit=True, restart=False)
    assert by_action(STOPPED, stop_on_exit=True)[Action.STOP_ON_EXIT].checked is True
    assert [file.name for file in tmp_path.iterdir()] == ["tray.json"]
    for broken in ("{", "[1]", "\xff"):
        path.write_text(broken, "latin-1")
        with caplog.at_level(logging.WARNING):
            assert Preferences.load(path) == Preferences()
    assert len(caplog.messages) == 3


# --- the icon ---


def test_every_state_is_told_without_colour():
    """In grey on a dark panel, and as small as panels are, no two icons look alike."""
    pytest.importorskip("PIL")
    import numpy as np
    from PIL import Image

    def on_a_panel(state):
        drawn = tray_icon.draw_icon(state)
        return Image.alpha_composite(Image.new("RGBA", drawn.size, (40, 42, 46, 255)), drawn)

    small = {s: on_a_panel(s).convert("L").resize((16, 16)) for s in TrayState}
    for one, other in itertools.combinations(TrayState, 2):
        apart = np.abs(np.asarray(small[one], float) - np.asarray(small[other], float)).mean()
        assert apart > 8, (one, other)
    corner = tray_icon.draw_icon(TrayState.RUNNING).getpixel((0, 0))
    assert corner == (0, 0, 0, 0)


# --- the command ---


def test_options_reach_the_daemon(clean, monkeypatch, tmp_path):
    """Each option is an argument of the daemon's constructor; device is for both kinds of work, as it was."""
    made = []
    monkeypatch.setattr(tray_app, "run_tray", lambda make: made.append(make().settings))
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["tray", "--host", "127.0.0.2", "--port", "1", "--ws-port", "2", "--comfyui", "/c", "--model-dir", "/a",
             "--device", "cuda:1", "--vae-precision", "fp32", "--clip-precision", "fp16", "--service-type", "clip_only",
             "--comfyui-python", "/p", "--runtime-dir", str(tmp_path)]
        )  # fmt: skip
    (settings,) = made
    assert not ended.value.code
    assert (settings.host, settings.port, settings.ws_port) == ("127.0.0.2", 1, 2)
    assert (settings.vae_device, settings.clip_device) == ("cuda:1", "cuda:1")
    assert (settings.vae_precision, settings.clip_precision, settings.service_type.value) == ("fp32", "fp16", "clip")
    assert (settings.comfyui_path, settings.comfyui_python) == (Path("/c"), Path("/p"))
    assert (settings.model_dirs, settings.runtime_dir) == ([Path("/a")], tmp_path)


def test_without_pystray_one_line_says_what_to_install(clean, monkeypatch, tmp_path, capsys):
    """Exit code 2, and the extra by its name."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pystray" else real(name, *rest)
    )
    monkeypatch.setenv("DISPLAY", ":1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["tray", "--runtime-dir", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err == "luna-daemon: the tray icon needs pystray and Pillow. pip install luna-daemon[tray]\n"


@pytest.mark.parametrize("module", ["tray_app", "tray.icon", "tray.state", "tray.watch"])
def test_neither_torch_nor_a_screen_is_needed_to_import_it(module):
    """torch is not imported, and pystray, which opens the display, only when an icon is to be shown."""
    code = f"import sys, luna_daemon.{module}; print({{'torch', 'pystray', 'PIL', 'gi'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
