"""Tables, sums and the progress bar of the commands."""

from __future__ import annotations

import pytest

from luna_daemon.commands import terminal
from luna_daemon.wire.messages import Progress


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")


def test_tables_say_when_they_are_empty(capsys):
    """A title with ``none``; without a title and rows nothing at all."""
    terminal.tables(("Workers", "># name", []), ("", "what value", []))
    assert capsys.readouterr().out == "\nWorkers: none\n"


def test_columns_are_aligned_as_they_are_named(capsys):
    """``>`` is to the right, an underscore a space, and a table without a title has no heads."""
    terminal.tables(("T", "name >in_flight", [("a", "1"), ("bcd", "22")]), ("", "what value", [("k", "v")]))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == ["T", "name   in flight", "a              1", "bcd           22", "k   v"]


def test_rows_of_loaded_models():
    """Sizes in words; what is pinned is marked."""
    listing = {"loaded": {"vae:a": 1 << 30, "clip:b": 5 << 20}, "pinned": ["clip:b"]}
    assert terminal.loaded_rows(listing) == [("vae:a", "1.0 GB", ""), ("clip:b", "5 MB", "yes")]


def test_checks_are_summed_up(capsys):
    """Each with its advice below, and the number of problems and warnings."""
    checks = [
        ("Python", "ok", "3.12", ""),
        ("GPU", "warning", "none", "Buy one"),
        ("port 1", "problem", "x", "Stop it"),
    ]
    terminal.show_checks(checks)
    out = capsys.readouterr().out
    assert "Buy one." in out and "Stop it." in out
    assert out.endswith("\n1 problem, 1 warning\n")


def test_a_sign_of_life_changes_nothing_on_the_bar():
    """The stage before stays; a total of 0 is unknown."""
    with terminal.Bar("sdxl") as bar:
        bar.progress(Progress(1, "starting"))
        assert bar._progress.tasks[0].total is None
        bar.progress(Progress(1, "loading", 3, 4))
        bar.progress(Progress(1, "running"))
        (task,) = bar._progress.tasks
        assert (task.description, task.completed, task.total) == ("sdxl: loading", 3, 4)
