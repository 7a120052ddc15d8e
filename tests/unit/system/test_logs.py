"""The log's two forms, and the file it is kept in."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from luna_daemon.core import ConfigError
from luna_daemon.system import logs


@pytest.fixture(autouse=True)
def root_logger():
    """The root logger as it was."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.handlers = []
    yield root
    for handler in root.handlers:
        handler.close()
    root.handlers = before
    root.setLevel(level)


def record(message: str, exc_info=None) -> logging.LogRecord:
    return logging.LogRecord("luna_daemon", logging.ERROR, "x.py", 1, message, None, exc_info)


def test_json_lines_are_one_line():
    """A message with line breaks and a traceback stay one line, and text in any language stays readable."""
    try:
        raise KeyError("gone")
    except KeyError:
        text = logs.JsonLines().format(record("zwei\nZeilen: ü", sys.exc_info()))
    line = json.loads(text)
    assert "\n" not in text and "ü" in text
    assert line["message"] == "zwei\nZeilen: ü" and line["level"] == "ERROR" and line["logger"] == "luna_daemon"
    assert line["error"].endswith("KeyError: 'gone'") and line["time"].endswith("+00:00")


@pytest.mark.parametrize("as_json", [False, True])
def test_the_file_has_what_stderr_has(tmp_path, capsys, as_json):
    """Folders on the way are made; both get the same lines."""
    file = tmp_path / "new" / "daemon.log"
    logs.set_up(as_json, file)
    logging.getLogger("luna_daemon").info("it starts")
    assert file.read_text("utf-8") == capsys.readouterr().err
    text = file.read_text("utf-8")
    assert (json.loads(text)["message"] == "it starts") if as_json else text.endswith(" INFO    it starts\n")


def test_the_file_is_rotated(tmp_path, monkeypatch):
    """It never grows past its size, and two old ones are kept."""
    monkeypatch.setattr(logs, "_FILE_BYTES", 2000)
    logs.set_up(False, tmp_path / "daemon.log")
    for number in range(200):
        logging.getLogger("luna_daemon").info("line %d", number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert (tmp_path / "daemon.log").read_text().endswith("line 199\n")


def test_a_file_that_cannot_be_written(tmp_path):
    """Names the setting and the file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="log_file") as caught:
        logs.set_up(False, tmp_path / "file" / "daemon.log")
    assert str(tmp_path) in caught.value.message
