"""Quantities as people read them."""

from __future__ import annotations

import pytest

from luna_daemon.system.units import count, size, span


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (1024, "1 KB"), (12582912, "12 MB"), (3 << 30, "3.0 GB"),
     (2000 << 30, "2000.0 GB")],
)  # fmt: skip
def test_sizes(nbytes, text):
    """In the largest unit that fits; nothing is larger than GB."""
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (4.2, "4 s"), (59.4, "59 s"), (61, "1 min"), (3600, "1 h 0 min"), (7260, "2 h 1 min"),
     (48 * 3600, "2 days")],
)  # fmt: skip
def test_spans(seconds, text):
    """The unit fits the time."""
    assert span(seconds) == text


def test_counts():
    """One is singular, none and several are not."""
    assert [count(number, "model") for number in (0, 1, 2)] == ["0 models", "1 model", "2 models"]
