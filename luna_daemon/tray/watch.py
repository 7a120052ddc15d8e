"""The tray's watch over the daemon, in a thread of its own: whatever has to wait for the daemon waits here.

It attaches to a daemon that answers or starts one as a process of its own, looks at it every second, and starts it
again after a crash.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
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
"""A daemon that takes longer to say how it is does not answer."""
_STABLE_S = 60.0
"""After so long a crash counts as the first again."""
_FIRST_RESTART_S, _MOST_RESTART_S = 1.0, 60.0


class Wish(Enum):
    """What the user asks for."""

    START = "start"
    STOP = "stop"
    EXIT = "exit"
    EXIT_AND_STOP = "exit and stop"


class Watch:
    """Brings the daemon up and keeps what is shown true.

    Args:
        first: the daemon as it is to be started; nothing of it has been opened yet.
        make: the same, made anew with the settings as they are then. May raise ``ConfigError``.
        may_restart: whether a daemon that crashed is to be started again.
        show: told what is to be shown, on the thread that is in ``run``, after each look.
    """

    def __init__(
        self,
        first: LunaDaemon,
        make: Callable[[], LunaDaemon],
        may_restart: Callable[[], bool],
        show: Callable[[View], None],
    ) -> None:
        self.settings: Settings = first.settings
        self.view = View()
        self._make = make
        self._may_restart = may_restart
        self._show_view = show
        self._wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()
        self._client = _client(self.settings)
        self._ours: LunaDaemon | None = None
        self._backoff = Backoff(_FIRST_RESTART_S, _MOST_RESTART_S)
        self._up_since = 0.0
        self._heard = time.monotonic()

    def wish(self, wish: Wish) -> None:
        """Ask for something, from any thread; it is done in its turn."""
        self._wishes.put(wish)

    @property
    def log(self) -> Path:
        """Where the output of a daemon that was started here goes."""
        return self.settings.log_file or runtime_folder(self.settings.port, self.settings.runtime_dir).with_suffix(
            ".log"
        )

    def run(self) -> None:
        """Attach or start, then serve wishes and look, until one of them is to exit."""
        wish: Wish | None = Wish.START
        while wish not in (Wish.EXIT, Wish.EXIT_AND_STOP):
            try:
                self._turn(wish)
            except Exception:  # an icon that stands still would be a lie: say it, and look again
                logger.exception("the tray's look at the daemon failed")
            try:
                wish = self._wishes.get(timeout=_LOOK_S)
            except queue.Empty:
                wish = None
        if wish is Wish.EXIT_AND_STOP and self.view.state in (TrayState.RUNNING, TrayState.STOPPING):
            self._stop()
            self._wait_until_gone()
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

    # --- looking ---

    def _look(self) -> None:
        view = judge(self.view, self._sight())
        if self._ours is not None and self._ours.exit_code is not None:
            self._ours = None  # it has been judged: what comes now is another's
        if view.crashed and not self.view.crashed:
            self._backoff.failed(view.detail)
        if view.state is TrayState.RUNNING and self._backoff.failures and time.monotonic() - self._up_since > _STABLE_S:
            self._backoff.succeeded()
        self._show(view)

    def _show(self, view: View) -> None:
        if view.state is TrayState.RUNNING and self.view.state is not TrayState.RUNNING:
            self._up_since = time.monotonic()
        self.view = view
        self._show_view(view)

    def _sight(self) -> Sight:
        info = self._info()
        if info is not None:
            self._heard = time.monotonic()
            return Sight(info)
        silent_s = time.monotonic() - self._heard
        exit_code = self._ours.exit_code if self._ours is not None else None
        if self._ours is not None and exit_code is None:
            return Sight(alive=True, silent_s=silent_s)
        pid = read_facts(self.settings.port, self.settings.runtime_dir).get("pid")
        if pid is None:
            return Sight(exit_code=exit_code)
        gone = has_ended(pid, runtime_folder(self.settings.port, self.settings.runtime_dir))
        return Sight(alive=not gone, silent_s=silent_s, exit_code=exit_code, left_behind=gone)

    def _info(self) -> Mapping[str, Any] | None:
        info: Mapping[str, Any] | None = self._ask(m.Info())
        return info

    def _ask(self, call: m.Call) -> Any:
        """The answer to a call; ``None`` where there is none in time."""
        end = time.monotonic() + _ANSWER_S
        try:
            return self._client.call(call, is_cancelled=lambda: time.monotonic() > end).result
        except LunaError:
            self._client.close()
            return None

    # --- starting and stopping ---

    def _start(self) -> None:
        """Attach to the daemon that answers, or start one and wait until it does."""
        again = self.view.crashed
        if (info := self._info()) is not None:
            self._show(judge(self.view, Sight(info)))
            return
        self._show(View(TrayState.STARTING))
        try:
            daemon = self._make()
            self._aim(daemon.settings)
            self._ours = daemon.start()
        except (LunaError, OSError) as error:
            if again:
                self._backoff.failed(str(error))
            self._show(View(TrayState.ERROR, str(error), crashed=again))
            return
        logger.info("the daemon is process %s, its log is %s", daemon.pid, self.log)
        self._look()

    def _aim(self, settings: Settings) -> None:
        """Talk to where the daemon will be: its port may have been changed in ``luna.toml``."""
        self.settings = settings
        self._client.close()
        self._client = _client(settings)

    def _stop(self) -> None:
        """Drain the daemon; one of ours that does not end in time is ended."""
        self._show(View(TrayState.STOPPING, info=self.view.info))
        if self._ours is not None and self._ours.exit_code is None:
            self._ours.stop()
            self._ours = None
        elif self._ask(m.Shutdown()) is None and self._sight().alive:
            self._show(View(TrayState.ERROR, SILENT))
            return
        self._look()

    def _wait_until_gone(self) -> None:
        end = time.monotonic() + self.settings.drain_timeout_sec + 5
        while self.view.state is TrayState.STOPPING and time.monotonic() < end:
            time.sleep(0.1)
            self._look()


def _client(settings: Settings) -> DaemonClient:
    return DaemonClient(
        settings.host, settings.port, runtime_dir=settings.runtime_dir, use_arena=False, name=CLIENT_NAME
    )
