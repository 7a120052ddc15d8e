"""The daemon's log: plain or JSON lines, on stderr and in a rotated file."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from pathlib import Path

from ..core import ConfigError

_FILE_BYTES, _OLD_FILES = 5 << 20, 2
_FOR_PEOPLE = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")


class JsonLines(logging.Formatter):
    """Formats a record as a JSON object: ``time`` (UTC), ``level``, ``message``, ``logger``, ``error`` (traceback)."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            "logger": record.name,
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(as_json: bool = False, file: Path | None = None) -> None:
    """Send the records of all loggers to stderr and to ``file``, if any; replaces an earlier setup.

    Raises:
        ConfigError: the file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(_rotated(file))
    for handler in handlers:
        handler.setFormatter(JsonLines() if as_json else _FOR_PEOPLE)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


def _rotated(file: Path) -> logging.Handler:
    from logging.handlers import RotatingFileHandler  # takes longer to import than the rest of this module

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return RotatingFileHandler(file, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8")
    except OSError as error:
        message = f"setting 'log_file' is {str(file)!r}: {error.strerror or error}"
        raise ConfigError(message, "Name a file that can be written") from error
