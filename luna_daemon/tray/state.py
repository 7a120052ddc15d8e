"""Decides what the tray shows: state, texts, menu, notifications.

Pure functions: ``tray.watch`` observes the daemon and calls ``judge`` with the observation; ``tray_app`` shows the
resulting view.
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
"""Name of the tray's own connection in the daemon's list of clients."""
SILENT = "the daemon's process is alive but does not answer"
_PATIENCE_S = 5.0
"""Time that a running daemon may be silent: a daemon that ends closes its connections a moment before its end."""
_TITLE_LETTERS = 120
"""Windows shows at most 127 characters of a tooltip."""


class TrayState(str, Enum):
    """State that the icon shows by its colour and shape."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ERROR = "error"


class Action(str, Enum):
    """Action of a menu entry."""

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
    """One observation of the daemon."""

    info: Mapping[str, Any] | None = None
    """The daemon's ``info``, if the daemon answered."""
    alive: bool = False
    """Whether the daemon's process runs."""
    silent_s: float = 0.0
    """Seconds since the daemon's last answer."""
    exit_code: int | None = None
    """Exit code of the daemon, if this tray started the daemon and it has ended."""
    left_behind: bool = False
    """Whether the daemon crashed: its process has ended, and its runtime folder still exists."""


@dataclass(frozen=True)
class View:
    """State and details that the tray shows."""

    state: TrayState = TrayState.STOPPED
    detail: str = ""
    """The reason of an error."""
    info: Mapping[str, Any] | None = None
    crashed: bool = False
    """Whether the daemon crashed, so that a restart may help."""

    @property
    def page_port(self) -> int | None:
        """Port of the daemon's status page; ``None`` without a page."""
        port = self.info.get("ws_port") if self.info is not None else None
        return int(port) if port else None


def judge(before: View, sight: Sight) -> View:
    """Decide what to show after an observation; ``before`` is the view until now."""
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
        # A daemon that crashes while it stops is not started again: the user wanted it to end.
        return View(TrayState.ERROR, _ending(sight.exit_code), crashed=before.state is not TrayState.STOPPING)
    return View(TrayState.STOPPED)


def _ending(exit_code: int | None) -> str:
    if not exit_code:
        return "the daemon ended without cleaning up"
    if exit_code < 0:
        name = str(-exit_code)
        with suppress(ValueError):
            name = signal.Signals(-exit_code).name
        return f"the daemon was killed by signal {name}"
    return f"the daemon crashed with exit code {exit_code}"


def statistics(info: Mapping[str, Any]) -> str:
    """Sum up an ``info`` in one line, which is the same while the daemon is idle."""
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
    """Make the tooltip, short and in ASCII, which every desktop can show."""
    more = statistics(view.info) if view.info is not None else view.detail
    text = f"Luna Daemon: {view.state.value}" + (f" ({more})" if more else "")
    return _short(text.encode("ascii", "replace").decode(), _TITLE_LETTERS)


def notice(before: View, after: View, restarts: bool) -> str:
    """Make the notification after a change of the view; empty if the user need not know.

    Args:
        restarts: whether a daemon that crashed is started again.
    """
    if after.state is before.state:
        return ""
    if after.state is TrayState.ERROR:
        return f"{after.detail}. It will be restarted" if after.crashed and restarts else after.detail
    if after.state is TrayState.STOPPED:
        return "The daemon has stopped"
    if after.state is TrayState.RUNNING and before.state is TrayState.ERROR:
        return "The daemon answers again"
    return ""


# --- the menu ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preferences:
    """The ticks of the menu, saved in a file."""

    stop_on_exit: bool = False
    restart: bool = True

    @classmethod
    def load(cls, path: Path) -> Preferences:
        """Read the file; return the defaults if the file is missing or damaged."""
        try:
            saved = dict(json.loads(path.read_text("utf-8")))
            return cls(**{field.name: bool(saved[field.name]) for field in fields(cls) if field.name in saved})
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): the ticks of the menu are reset", path, error)
            return cls()

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)) + "\n", "utf-8")
        os.replace(new, path)

    def toggled(self, action: Action) -> Preferences:
        """Copy the preferences with the tick of one entry changed."""
        if action is Action.STOP_ON_EXIT:
            return replace(self, stop_on_exit=not self.stop_on_exit)
        return replace(self, restart=not self.restart)


@dataclass(frozen=True)
class Entry:
    """A line of the menu; a line without text is a separator."""

    text: str = ""
    action: Action | None = None
    enabled: bool = True
    checked: bool | None = None
    default: bool = False
    """Whether a click on the icon does the same."""


def menu(view: View, preferences: Preferences, has_log: bool) -> list[Entry]:
    """List the lines of the menu. A click on the icon opens the status page, or starts a stopped daemon."""
    idle = view.state is TrayState.STOPPED or (view.state is TrayState.ERROR and view.detail != SILENT)
    stoppable = view.state is TrayState.RUNNING or view.detail == SILENT
    page = view.page_port is not None
    status = statistics(view.info) if view.info is not None else view.detail
    return [
        Entry(f"Luna Daemon: {view.state.value}", enabled=False),
        Entry(_short(status or "No status"), Action.STATUS, enabled=bool(status)),
        Entry(),
        Entry("Start", Action.START, enabled=idle, default=idle),
        Entry("Stop (running requests finish)", Action.STOP, enabled=stoppable),
        Entry(),
        Entry("Open status page", Action.OPEN_PAGE, enabled=page, default=page and not idle),
        Entry("Open log", Action.OPEN_LOG, enabled=has_log),
        Entry(),
        Entry("Stop daemon on exit", Action.STOP_ON_EXIT, checked=preferences.stop_on_exit),
        Entry("Restart after a crash", Action.RESTART, checked=preferences.restart),
        Entry(),
        Entry("Exit", Action.EXIT),
    ]


def _short(text: str, letters: int = 60) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."
