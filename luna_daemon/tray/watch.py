"""Attaches the tray to a daemon, or starts a daemon; observes the daemon, and restarts it after a crash.

All waiting for the daemon happens in the thread of the watch.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from ..client import DaemonClient
from ..config import Settings
from ..core import LunaError, logger
from ..daemon_server import LunaDaemon
from ..pool.supervisor import Backoff
from ..system.runtime import has_ended, read_facts, runtime_folder
from ..wire import messages as m
from .state import CLIENT_NAME, SILENT, Sight, TrayState, View, judge

_LOOK_S = 1.0
_ANSWER_S = 5.0
"""Longest wait for an answer of the daemon."""
_STABLE_S = 60.0
"""Uptime after which a daemon that crashes is restarted without delay."""
_FIRST_RESTART_S, _MOST_RESTART_S = 1.0, 60.0


class Wish(Enum):
    """A request of the user."""

    START = "start"
    STOP = "stop"
    EXIT = "exit"
    EXIT_AND_STOP = "exit and stop"


class Watch:
    """Starts and stops the daemon, and reports its state.

    Args:
        first: the daemon to start, whose process has not been started yet.
        make: makes a daemon with the current settings. May raise ``ConfigError``.
        may_restart: returns whether a daemon that crashed is to be started again.
        show: called with the view after each observation, on the thread of ``run``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        first: LunaDaemon,
        make: Callable[[], LunaDaemon],
        may_restart: Callable[[], bool],
        show: Callable[[View], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings: Settings = first.settings
        self.view = View()
        self._make = make
        self._may_restart = may_restart
        self._show_view = show
        self._clock = clock
        self._wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()
        self._client = _client(self.settings)
        self._started: LunaDaemon | None = None
        """The daemon that this tray started, until its end has been observed."""
        self._backoff = Backoff(_FIRST_RESTART_S, _MOST_RESTART_S, clock)
        self._up_since = 0.0
        self._heard = clock()

    def wish(self, wish: Wish) -> None:
        """Queue a request of the user; may be called from any thread."""
        self._wishes.put(wish)

    @property
    def log(self) -> Path:
        """File with the log of the daemon that this tray starts."""
        folder = runtime_folder(self.settings.port, self.settings.runtime_dir)
        return self.settings.log_file or folder.with_suffix(".log")

    def run(self) -> None:
        """Attach to a daemon or start one, then serve requests and observe, until a request to exit."""
        wish: Wish | None = Wish.START
        while wish not in (Wish.EXIT, Wish.EXIT_AND_STOP):
            try:
                self._turn(wish)
            except Exception:  # otherwise the icon would stay as it is while the daemon changes
                logger.exception("the tray could not observe the daemon")
            try:
                wish = self._wishes.get(timeout=_LOOK_S)
            except queue.Empty:
                wish = None
        if wish is Wish.EXIT_AND_STOP and self.view.state in (TrayState.RUNNING, TrayState.STOPPING):
            self._stop()
            self._wait_for_end()
        self._client.close()

    def _turn(self, wish: Wish | None) -> None:
        if wish is Wish.START:
            self._start()
        elif wish is Wish.STOP:
            self._stop()
        else:
            self._look()
            if self.view.crashed and self._may_restart() and self._backoff.wait_s == 0:
                logger.info("starting the daemon again")
                self._start()

    # --- observing ---

    def _look(self) -> None:
        view = judge(self.view, self._sight())
        if self._started is not None and self._started.exit_code is not None:
            self._started = None  # its end has been shown: from now on another daemon is observed
        if view.crashed and not self.view.crashed:
            self._backoff.failed(view.detail)
        if view.state is TrayState.RUNNING and self._backoff.failures and self._clock() - self._up_since > _STABLE_S:
            self._backoff.succeeded()
        self._show(view)

    def _show(self, view: View) -> None:
        if view.state is TrayState.RUNNING and self.view.state is not TrayState.RUNNING:
            self._up_since = self._clock()
        self.view = view
        self._show_view(view)

    def _sight(self) -> Sight:
        info = self._ask(m.Info())
        if info is not None:
            self._heard = self._clock()
            return Sight(info)
        silent_s = self._clock() - self._heard
        exit_code = self._started.exit_code if self._started is not None else None
        if self._started is not None and exit_code is None:
            return Sight(alive=True, silent_s=silent_s)
        pid = read_facts(self.settings.port, self.settings.runtime_dir).get("pid")
        if pid is None:
            return Sight(exit_code=exit_code)
        ended = has_ended(pid, runtime_folder(self.settings.port, self.settings.runtime_dir))
        return Sight(alive=not ended, silent_s=silent_s, exit_code=exit_code, left_behind=ended)

    def _ask(self, call: m.Call) -> Any:
        """Call the daemon; return ``None`` without an answer in time."""
        end = self._clock() + _ANSWER_S
        try:
            return self._client.call(call, is_cancelled=lambda: self._clock() > end).result
        except LunaError:
            self._client.close()
            return None

    # --- starting and stopping ---

    def _start(self) -> None:
        """Attach to the daemon that answers, or start a daemon and wait for its first answer."""
        again = self.view.crashed
        if (info := self._ask(m.Info())) is not None:
            self._show(judge(self.view, Sight(info)))
            return
        self._show(View(TrayState.STARTING))
        try:
            daemon = self._make()
            self._aim(daemon.settings)
            self._started = daemon.start()
        except (LunaError, OSError) as error:
            if again:
                self._backoff.failed(str(error))
            self._show(View(TrayState.ERROR, str(error), crashed=again))
            return
        logger.info("the daemon is process %s, its log is %s", daemon.pid, self.log)
        self._look()

    def _aim(self, settings: Settings) -> None:
        """Connect to the port of these settings, which may have been changed in ``luna.toml``."""
        self.settings = settings
        self._client.close()
        self._client = _client(settings)

    def _stop(self) -> None:
        """Drain the daemon; kill its process if this tray started the process and it does not end in time."""
        self._show(View(TrayState.STOPPING, info=self.view.info))
        if self._started is not None and self._started.exit_code is None:
            self._started.stop()
            self._started = None
        elif self._ask(m.Shutdown()) is None and self._sight().alive:
            self._show(View(TrayState.ERROR, SILENT))
            return
        self._look()

    def _wait_for_end(self) -> None:
        end = self._clock() + self.settings.drain_timeout_sec + 5
        while self.view.state is TrayState.STOPPING and self._clock() < end:
            time.sleep(0.1)
            self._look()


def _client(settings: Settings) -> DaemonClient:
    return DaemonClient(
        settings.host, settings.port, runtime_dir=settings.runtime_dir, use_arena=False, name=CLIENT_NAME
    )
