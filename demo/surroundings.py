"""What the demo and the benchmarks share: default settings, a free port, the memory of a process, progress lines."""

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
    """Ignore the user's ``LUNA_*`` variables and ``luna.toml``: neither decides what is shown or measured.

    Daemons and clients inherit this process' environment. ``COMFYUI_PATH`` stays: a tokenizer may lie there.
    """
    for name in [name for name in os.environ if name.startswith("LUNA_")]:
        del os.environ[name]
    BUILD.mkdir(exist_ok=True)
    nothing = BUILD / "no-settings.toml"
    nothing.touch()
    os.environ["LUNA_CONFIG"] = str(nothing)


def free_port() -> int:
    """Find a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pss(pid: int | None) -> int:
    """Bytes of memory of a process: PSS, which divides shared pages among their users; where unknown, USS."""
    memory = psutil.Process(pid).memory_full_info()
    return int(getattr(memory, "pss", 0) or memory.uss)


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """Show what is running: a spinner on a terminal, a line elsewhere."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, soft_wrap=True)
        yield
