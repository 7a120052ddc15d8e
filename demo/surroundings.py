"""What the demo and the benchmarks share: a place of their own, memory of a process, a word on what goes on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console

__all__ = ["BUILD", "ROOT", "free_port", "leave_the_users_settings", "pss", "stage"]

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"


def leave_the_users_settings() -> None:
    """No ``LUNA_*`` variable and no ``luna.toml`` of the current folder decides what is shown or measured.

    Daemons and clients inherit this process' environment. ``COMFYUI_PATH`` stays: a tokenizer may lie there.
    """
    for name in [name for name in os.environ if name.startswith("LUNA_")]:
        del os.environ[name]
    BUILD.mkdir(exist_ok=True)
    nothing = BUILD / "no-settings.toml"
    nothing.touch()
    os.environ["LUNA_CONFIG"] = str(nothing)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pss(pid: int | None) -> int:
    """Memory of a process, shared pages divided among those who share them; resident memory where unknown."""
    facts = psutil.Process(pid).memory_full_info()
    return int(getattr(facts, "pss", 0) or facts.uss)


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """Say what goes on: a spinner on a terminal, a line elsewhere."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, soft_wrap=True)
        yield
