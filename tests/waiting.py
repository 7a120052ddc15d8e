"""Waiting in tests: for a condition instead of for a time, and bounds on time that a busy machine stretches too."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
What = str | Callable[[], str]

_PAUSE_S = 0.02
"""Between two looks at a condition."""


def wait_until(condition: Callable[[], T], within_s: float = 30.0, what: What = "the condition") -> T:
    """The first true value of ``condition``; ``what``, or what it returns, is named if there is none in time."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, _never(within_s, what)
        time.sleep(_PAUSE_S)
    return value


async def wait_until_async(condition: Callable[[], T], within_s: float = 30.0, what: What = "the condition") -> T:
    """``wait_until`` on an event loop that goes on meanwhile."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, _never(within_s, what)
        await asyncio.sleep(_PAUSE_S)
    return value


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes at most half as long again as a bare wait of ``seconds`` that runs beside it.

    A machine that is busy or stands still holds up both, so only a block that is slow by itself fails.
    """
    over, waits = threading.Event(), []

    def wait() -> None:
        if not over.wait(seconds):
            waits.append(time.monotonic() - began)

    thread = threading.Thread(target=wait, daemon=True)
    began = time.monotonic()
    thread.start()
    try:
        yield
        took = time.monotonic() - began
    finally:
        over.set()
        thread.join()
    assert not waits or took <= 1.5 * waits[0], f"{took:.2f} s, and a bare wait of {seconds:g} s took {waits[0]:.2f} s"


def _never(within_s: float, what: What) -> str:
    return f"not within {within_s:g} s: {what if isinstance(what, str) else what()}"
