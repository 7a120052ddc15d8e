"""What the tray shows, decided from what was seen of the daemon: state, words, menu, notifications. Nothing is drawn.

Everything here is a function of its arguments. ``tray_watch`` looks at the daemon and asks ``judge`` what to make of
it; ``tray_app`` shows the answer.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from ..core import logger
from ..system.units import count

CLIENT_NAME = "luna-daemon tray"
"""How the tray's own connection is called in the daemon's list of clients."""
SILENT = "its process lives but does not answer"
_PATIENCE_S = 5.0
"""One that is about to end closes its connections a moment before."""
_TITLE_LETTERS = 120
"""Windows takes 127 for a tooltip."""


class TrayState(str, Enum):
    """What the icon tells by its colour and shape."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ERROR = "error"


class Action(str, Enum):
    """What a menu entry does."""

    STATUS = "status"
    START = "start"
    STOP = "stop"
    OPEN_PAGE = "open page"
    OPEN_LOG = "open log"
    STOP_ON_EXIT = "stop on exit"
    RESTART = "restart after a crash"
    EXIT = "exit"


@dataclass(frozen=True)
class Sight:
    """What one look at the daemon found."""

    info: Mapping[str, Any] | None = None
    """Its ``info``, if it answered."""
    alive: bool = False
    """Its process is there."""
    silent_s: float = 0.0
    """For how long nothing was heard of it."""
    exit_code: int | None = None
    """How it ended, if it was started by this tray."""
    left_behind: bool = False
    """It ended without tidying its runtime folder, as only one that crashed does."""


@dataclass(frozen=True)
class View:
    """What is shown."""

    state: TrayState = TrayState.STOPPED
    detail: str = ""
    """Why, for an error."""
    info: Mapping[str, Any] | None = None
    crashed: bool = False
    """The daemon ended by itself: another start may mend it."""

    @property
    def page_port(self) -> int | None:
        """The port of the daemon's page, once it has one."""
        port = self.info.get("ws_port") if self.info is not None else None
        return int(port) if port else None


def judge(before: View, sight: Sight) -> View:
    """What to show after a look at the daemon, given what was shown before it."""
    if sight.info is not None:
        running = sight.info["status"] == "running"
        return View(TrayState.RUNNING if running else TrayState.STOPPING, info=sight.info)
    if sight.alive:
        if before.state in (TrayState.STARTING, TrayState.STOPPING):
            return replace(before, info=None)
        if before.state is TrayState.RUNNING and sight.silent_s < _PATIENCE_S:
            return before
        return View(TrayState.STARTING) if before.state is TrayState.STOPPED else View(TrayState.ERROR, SILENT)
    known = before.state is TrayState.STOPPED or (before.state is TrayState.ERROR and before.detail != SILENT)
    if known:
        return before
    if sight.exit_code or sight.left_behind:
        # One that dies while it stops need not be started again: it was to end.
        return View(TrayState.ERROR, _ending(sight.exit_code), crashed=before.state is not TrayState.STOPPING)
    return View(TrayState.STOPPED)


def _ending(exit_code: int | None) -> str:
    if not exit_code:
        return "the daemon ended without tidying up after itself"
    if exit_code < 0:
        name = str(-exit_code)
        with suppress(ValueError):
            name = signal.Signals(-exit_code).name
        return f"the daemon was killed by signal {name}"
    return f"the daemon crashed with exit code {exit_code}"


def figures(info: Mapping[str, Any]) -> str:
    """One line about a daemon that answers. Nothing in it changes while nothing happens."""
    sizes: dict[str, int] = {}
    for worker in info["workers"]:
        for key, nbytes in worker["models"].items():
            sizes[key] = sizes.get(key, 0) + nbytes
    busy = sum(worker["state"] == "busy" for worker in info["workers"])
    clients = sum(client["name"] != CLIENT_NAME for client in info["clients"])
    parts = [
        count(len(info["workers"]), "worker") + (f" ({busy} busy)" if busy else ""),
        count(len(sizes), "model") + (f" of {sum(sizes.values()) / (1 << 30):.1f} GB" if sizes else ""),
        count(clients, "client"),
    ]
    waiting = info["queue"]["waiting"]
    return ", ".join([*parts, f"{waiting} waiting"] if waiting else parts)


def title(view: View) -> str:
    """The tooltip: ASCII, for X11 takes nothing else, and short, for Windows takes no more."""
    more = figures(view.info) if view.info is not None else view.detail
    text = f"Luna Daemon: {view.state.value}" + (f" ({more})" if more else "")
    text = text.encode("ascii", "replace").decode()
    return text if len(text) <= _TITLE_LETTERS else text[: _TITLE_LETTERS - 3] + "..."


def notice(before: View, after: View, restarts: bool) -> str:
    """What the user is told when what is shown changes; empty for nothing."""
    if after.state is before.state:
        return ""
    if after.state is TrayState.ERROR:
        return f"{after.detail}. It is started again" if after.crashed and restarts else after.detail
    if after.state is TrayState.STOPPED:
        return "The daemon has stopped"
    if after.state is TrayState.RUNNING and before.state is TrayState.ERROR:
        return "The daemon answers again"
    return ""


# --- the menu ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preferences:
    """What the user ticked in the menu, kept in a file."""

    stop_on_exit: bool = False
    restart: bool = True

    @classmethod
    def load(cls, path: Path) -> Preferences:
        """As saved; the defaults where there is no file, or one that cannot be understood."""
        try:
            saved = dict(json.loads(path.read_text("utf-8")))
            return cls(**{field.name: bool(saved[field.name]) for field in fields(cls) if field.name in saved})
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): the menu's ticks are the usual ones", path, error)
            return cls()

    def save(self, path: Path) -> None:
        """Replace the file, whole or not at all."""
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(self)) + "\n", "utf-8")
        os.replace(beside, path)

    def toggled(self, action: Action) -> Preferences:
        """With the tick of one entry changed."""
        if action is Action.STOP_ON_EXIT:
            return replace(self, stop_on_exit=not self.stop_on_exit)
        return replace(self, restart=not self.restart)


@dataclass(frozen=True)
class Entry:
    """A line of the menu; one without words is a separator."""

    text: str = ""
    action: Action | None = None
    enabled: bool = True
    checked: bool | None = None
    default: bool = False
    """What a click on the icon itself does; the only thing where the desktop gives the icon no menu."""


def menu(view: View, preferences: Preferences, has_log: bool) -> list[Entry]:
    """The menu's lines, from top to bottom. A click on the icon opens the page, or starts a daemon that is away."""
    idle = view.state is TrayState.STOPPED or (view.state is TrayState.ERROR and view.detail != SILENT)
    stoppable = view.state is TrayState.RUNNING or view.detail == SILENT
    page = view.page_port is not None
    status = figures(view.info) if view.info is not None else view.detail
    return [
        Entry(f"Luna Daemon: {view.state.value}", enabled=False),
        Entry(_short(status or "Nothing to tell"), Action.STATUS, enabled=bool(status)),
        Entry(),
        Entry("Start", Action.START, enabled=idle, default=idle),
        Entry("Stop (running requests finish)", Action.STOP, enabled=stoppable),
        Entry(),
        Entry("Open page", Action.OPEN_PAGE, enabled=page, default=page and not idle),
        Entry("Open log", Action.OPEN_LOG, enabled=has_log),
        Entry(),
        Entry("Stop daemon on exit", Action.STOP_ON_EXIT, checked=preferences.stop_on_exit),
        Entry("Restart after a crash", Action.RESTART, checked=preferences.restart),
        Entry(),
        Entry("Exit", Action.EXIT),
    ]


def _short(text: str, letters: int = 60) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."
