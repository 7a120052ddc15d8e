"""The tray on plain X11, which pystray 0.19 serves by python-xlib: what both leave out.

Two threads that use one connection of python-xlib can wait for each other for ever, and an event that one of them read
does not wake the other. So only the thread of the icon's loop touches the icon: others give it what is to be done.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ..core import LunaError, logger

_PANEL_WAIT_S = 10.0
"""At login the icon may be there before the panel."""


class TrayUnavailable(LunaError):
    """No icon can be shown here; says why."""

    code = "tray"


class IconLoop:
    """Has things done on the thread of an icon's loop.

    Args:
        icon: of pystray's X11 backend; its loop need not run yet.
    """

    def __init__(self, icon: Any) -> None:
        import Xlib.display
        import Xlib.X

        self._given: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._due: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._display = Xlib.display.Display()
        """A connection of the waker's own."""
        self._display.set_error_handler(lambda *_: None)  # the window may be gone by then
        self._message_type = self._display.intern_atom("_LUNA_TASK")
        self._others = icon._message_handlers[Xlib.X.ClientMessage]
        icon._message_handlers[Xlib.X.ClientMessage] = self._on_message
        _ask_for_clicks(icon)
        threading.Thread(target=self._wake, args=(icon._window.id,), name="icon waker", daemon=True).start()

    def do(self, task: Callable[[], object]) -> None:
        """Have something done soon, in the order of the calls; what it raises is logged."""
        self._given.put(task)

    def _wake(self, window_id: int) -> None:
        """Send the icon's window a message for each task."""
        from Xlib.error import ConnectionClosedError
        from Xlib.protocol.event import ClientMessage

        window = self._display.create_resource_object("window", window_id)
        message = ClientMessage(window=window, client_type=self._message_type, data=(32, [0] * 5))
        try:
            while True:
                self._due.put(self._given.get())
                window.send_event(message)
                self._display.flush()
        except (ConnectionClosedError, OSError):
            return  # the desktop has ended, and the icon with it

    def _on_message(self, event: Any) -> None:
        if event.client_type != self._message_type:
            self._others(event)
            return
        try:
            self._due.get_nowait()()
        except Exception:  # pystray ends its loop without a word otherwise
            logger.exception("the icon could not be changed")


def is_plain_x11(pystray: Any) -> bool:
    """Whether this is pystray with its backend for X11 without GTK."""
    return bool(pystray.Icon.__module__ == "pystray._xorg")


def _ask_for_clicks(icon: Any) -> None:
    """Have X11 send clicks on the icon: pystray 0.19 handles them, but does not ask for them."""
    from Xlib import X

    icon._window.change_attributes(event_mask=X.ExposureMask | X.StructureNotifyMask | X.ButtonPressMask)
    icon._display.flush()
    # It docks anew with each picture as well, and a panel may lose the icon then: once is enough.
    dock = icon._dock_window
    icon._dock_window = lambda: None if icon._systray_manager else dock()


def wait_for_a_panel() -> None:
    """Until somebody shows the tray of this X11 display.

    Raises:
        TrayUnavailable: nobody does.
    """
    import Xlib.display
    import Xlib.X

    display = Xlib.display.Display()
    try:
        tray = display.intern_atom(f"_NET_SYSTEM_TRAY_S{display.get_default_screen()}")
        end = time.monotonic() + _PANEL_WAIT_S
        while display.get_selection_owner(tray) == Xlib.X.NONE:
            if time.monotonic() > end:
                raise TrayUnavailable(
                    f"nothing on display {os.environ.get('DISPLAY')} shows tray icons",
                    "Start a panel with a tray, or use 'luna-daemon serve'",
                )
            time.sleep(0.2)
    finally:
        display.close()
