"""Warnings of the package as toasts in ComfyUI's window, such as "the local model steps in", and why.

Every warning of ``luna_daemon`` is written for the user, so all of them are shown, as the event ``luna.toast``.
"""

from __future__ import annotations

import logging

from . import host

_NAME = "luna.toast"
_SEVERITY = ((logging.ERROR, "error"), (logging.WARNING, "warn"))


def toast(detail: str, severity: str = "info") -> bool:
    """Send a toast to every window of this ComfyUI; ``False`` if there is no server, as in a script."""
    server = host.server()
    if server is None:
        return False
    server.send_sync(_NAME, {"severity": severity, "summary": "Luna Daemon", "detail": detail})
    return True


class ToastHandler(logging.Handler):
    """Log handler that sends each warning and error as a toast."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.set_name(_NAME)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a log record as a toast."""
        try:
            severity = next(name for level, name in _SEVERITY if record.levelno >= level)
            toast(record.getMessage(), severity)
        except Exception:
            self.handleError(record)


def show_warnings() -> None:
    """Show warnings of ``luna_daemon`` as toasts from now on; a second call changes nothing."""
    logger = logging.getLogger("luna_daemon")
    if all(handler.get_name() != _NAME for handler in logger.handlers):
        logger.addHandler(ToastHandler())
