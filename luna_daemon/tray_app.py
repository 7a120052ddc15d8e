"""The tray icon: ``luna-daemon tray``, or ``python luna_daemon/tray_app.py`` from any folder.

The daemon is a separate process: ``tray.watch`` starts and observes the process, ``tray.state`` decides what to show,
``tray.icon`` draws the image, and this module passes both to pystray. On Linux pystray needs GTK.
"""

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from luna_daemon.system.script import run_as_module

    run_as_module("luna_daemon.tray_app")

import importlib.util
import logging
import logging.handlers
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .core import LunaError, logger
from .daemon_server import LunaDaemon
from .system.runtime import dial_host, page_address, state_folder
from .system.script import run_command
from .tray.icon import draw_icon
from .tray.state import Action, Entry, Preferences, View, menu, notice, statistics, title
from .tray.watch import Watch, Wish

__all__ = ["Tray", "TrayRunning", "TrayUnavailable", "run_tray"]

_NAME = "Luna Daemon"
_NOTICE_LETTERS = 250
"""Windows shows at most 255 characters of a notification."""
_STATISTICS_S = 5.0
"""Least time between two updates of statistics in the menu: some desktops close an open menu that is replaced."""
_ON_LINUX = sys.platform not in ("win32", "darwin")
_GTK_BACKENDS = ("appindicator", "gtk")
"""pystray's backends on Linux, the better one first, without its third, plain X11, which has no menu."""
_INSTALL_GTK = (
    "Install python3-gi and gir1.2-gtk-3.0, which an environment made with 'python -m venv --system-site-packages' "
    "finds; or pip install PyGObject"
)


class TrayUnavailable(LunaError):
    """This machine cannot show an icon."""

    code = "tray"
    exit_code = 2


class TrayRunning(LunaError):
    """This user has a tray icon already."""

    code = "tray"


def run_tray(make: Callable[[], LunaDaemon]) -> None:
    """Show the icon until the user chooses Exit.

    Args:
        make: makes the daemon to start, with the current settings.

    Raises:
        TrayUnavailable: a display, pystray, GTK or a session bus is missing.
        TrayRunning: this user has a tray icon already.
        ConfigError: a setting is wrong.
    """
    first = make()
    pystray = _load_pystray()
    folder = state_folder(first.settings.port, first.settings.runtime_dir)
    with _only_one(folder), _log_into(folder / "tray.log"):
        Tray(pystray, first, make, folder).run()


class Tray:
    """The icon and the actions of its menu; work that takes time is done in the thread of the watch.

    Args:
        pystray: the module; importing pystray opens the display.
        first, make: as for ``Watch``.
        folder: folder of the file with the menu's ticks.
    """

    def __init__(self, pystray: Any, first: LunaDaemon, make: Callable[[], LunaDaemon], folder: Path) -> None:
        self._pystray = pystray
        self._file = folder / "tray.json"
        self._preferences = Preferences.load(self._file)
        self._watch = Watch(first, make, lambda: self._preferences.restart, self._show)
        self._watching = threading.Thread(target=self._watch.run, name="tray watch", daemon=True)
        self._view = View()
        self._notified = ""
        self._entries: list[Entry] = []
        self._menu_made = 0.0
        self._closing = False
        self._loop_ended = False
        """Whether the icon's loop has ended."""
        self._icon = pystray.Icon(_NAME, draw_icon(self._view.state), title(self._view), pystray.Menu(self._items))

    def run(self) -> None:
        """Show the icon until Exit, SIGTERM, or the end of the desktop session.

        Raises:
            TrayUnavailable: the desktop refuses the icon.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._icon.run(self._begin)
        except Exception as error:
            if not self._closing:  # after Exit errors do not matter: a desktop without notifications raises one
                cure = "GTK needs a session bus (DBUS_SESSION_BUS_ADDRESS)" if _ON_LINUX else ""
                raise TrayUnavailable(f"the tray icon cannot be shown ({error})", cure) from error
        finally:
            self._loop_ended = True
            if self._watching.ident is None:  # pystray's thread waits for a loop that never began
                self._icon._mark_ready()
            if not self._closing:  # the desktop session has ended
                self._leave()
            if self._watching.ident is not None:
                self._watching.join(self._watch.settings.drain_timeout_sec + 10)

    def _begin(self, icon: Any) -> None:
        if self._loop_ended:
            return
        self._icon.visible = True
        logger.info("the tray icon is shown")
        self._watching.start()
        while self._watching.is_alive() and not self._loop_ended:
            self._watching.join(0.1)
        if not self._loop_ended:  # the watch has ended; an icon whose loop has ended cannot be stopped
            icon.stop()

    def _on_signal(self, number: int, frame: object) -> None:
        if not self._loop_ended:
            self._leave()

    # --- showing ---

    def _show(self, view: View) -> None:
        """Update icon, tooltip and menu, and notify the user; called on the watch's thread."""
        before, self._view = self._view, view
        if self._loop_ended:
            return
        if view.state is not before.state:
            logger.info("%s", title(view))
            self._icon.icon = draw_icon(view.state)
        if title(view) != title(before):
            self._icon.title = title(view)
        self._update_menu()
        self._notify(notice(before, view, self._preferences.restart))

    def _update_menu(self) -> None:
        entries, shown = self._menu(), self._entries
        others = [[line for line in lines if line.action is not Action.STATUS] for lines in (entries, shown)]
        soon = time.monotonic() - self._menu_made < _STATISTICS_S
        if entries == shown or (others[0] == others[1] and soon):
            return
        self._entries, self._menu_made = entries, time.monotonic()
        self._icon.update_menu()

    def _menu(self) -> list[Entry]:
        return menu(self._view, self._preferences, self._watch.log.is_file())

    def _notify(self, text: str) -> None:
        if not text or text == self._notified:
            return
        self._notified = text
        logger.info("notified the user: %s", text)
        if self._icon.HAS_NOTIFICATION:
            try:
                self._icon.notify(text[:_NOTICE_LETTERS], _NAME)
            except Exception as error:
                logger.warning("the notification cannot be shown: %s", error)

    # --- the menu ---

    def _items(self) -> Iterator[Any]:
        for entry in self._menu():
            if not entry.text:
                yield self._pystray.Menu.SEPARATOR
                continue
            checked = entry.checked
            yield self._pystray.MenuItem(
                entry.text,
                self._doing(entry.action),
                enabled=entry.enabled,
                default=entry.default,
                checked=None if checked is None else (lambda _, ticked=checked: ticked),
            )

    def _doing(self, action: Action | None) -> Callable[[Any, Any], None]:
        def do(icon: Any, item: Any) -> None:
            if action is not None:
                self._do(action)

        return do

    def _do(self, action: Action) -> None:
        logger.info("chosen: %s", action.value)
        if action is Action.START:
            self._watch.wish(Wish.START)
        elif action is Action.STOP:
            self._watch.wish(Wish.STOP)
        elif action is Action.STATUS:
            self._notified = ""  # the user asks: show the same text again
            self._notify(statistics(self._view.info) if self._view.info is not None else self._view.detail)
        elif action is Action.OPEN_PAGE:
            _in_background(webbrowser.open, self._page())
        elif action is Action.OPEN_LOG:
            _in_background(_open_file, self._watch.log)
        elif action is Action.EXIT:
            self._leave()
        else:
            self._preferences = self._preferences.toggled(action)
            self._preferences.save(self._file)

    def _page(self) -> str:
        settings, info = self._watch.settings, self._view.info
        tls = info is not None and info["tls"]
        return page_address(tls, dial_host(settings.host), self._view.page_port or settings.ws_port) + "/"

    def _leave(self) -> None:
        self._closing = True
        self._watch.wish(Wish.EXIT_AND_STOP if self._preferences.stop_on_exit else Wish.EXIT)


# --- the desktop ------------------------------------------------------------------------------------------------


def _load_pystray() -> Any:
    """Import pystray with a backend that works on this desktop.

    Raises:
        TrayUnavailable: no backend works; says what is missing.
    """
    if _ON_LINUX and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise TrayUnavailable(
            "a tray icon needs a display (neither DISPLAY nor WAYLAND_DISPLAY is set)",
            "Use 'luna-daemon serve' on a machine without a display",
        )
    if not (importlib.util.find_spec("pystray") and importlib.util.find_spec("PIL")):
        raise TrayUnavailable("the tray icon needs pystray and Pillow", "pip install luna-daemon[tray]")
    return _first_backend(_GTK_BACKENDS if _ON_LINUX else (sys.platform,))


def _first_backend(names: Sequence[str]) -> Any:
    """Import pystray with the backend that ``PYSTRAY_BACKEND`` names, or the first of ``names`` that works.

    Raises:
        TrayUnavailable: no backend works; says what the last backend lacks.
    """
    chosen, why = os.environ.get("PYSTRAY_BACKEND", ""), ""
    for name in (chosen,) if chosen in names else names:
        os.environ["PYSTRAY_BACKEND"] = name
        try:
            return importlib.import_module("pystray")
        except Exception as error:  # the error for a missing library differs between backends
            why = " ".join(str(error).removeprefix("this platform is not supported: ").split()) or repr(error)
    if _ON_LINUX:
        raise TrayUnavailable(f"the tray icon needs GTK 3 with its Python bindings ({why})", _INSTALL_GTK)
    raise TrayUnavailable(f"the tray icon cannot be shown ({why})", "Use 'luna-daemon serve'")


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the lock that allows one tray icon per user.

    Raises:
        TrayRunning: another tray holds the lock.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / "tray.lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrayRunning(
            "this user's tray icon is shown already", "Look for the icon in the panel, or choose Exit in its menu"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """Write the log to a file as well: most trays have no terminal."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=1 << 20, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _in_background(function: Callable[[Any], object], argument: Any) -> None:
    """Call a function in a thread: some programs return only when the user closes what they show."""
    threading.Thread(target=function, args=(argument,), daemon=True).start()


def _open_file(path: Path) -> None:
    """Open a file with the desktop's program for such files."""
    if sys.platform == "win32":
        os.startfile(path)  # noqa: S606 (the daemon's log)
        return
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if opener is None:
        logger.warning("xdg-open is not installed: the log is %s", path)
        return
    subprocess.run([opener, str(path)], stdin=subprocess.DEVNULL, check=False)


def main() -> None:
    """Run ``luna-daemon tray`` with the arguments of ``python luna_daemon/tray_app.py``."""
    run_command("tray", *sys.argv[1:])


if __name__ == "__main__":
    main()
