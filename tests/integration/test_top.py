"""``luna-daemon top`` in a real terminal, before a daemon that comes and goes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import time

import pytest

from tests.integration.helpers import DEMO_TOML

pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
termios = pytest.importorskip("termios")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, daemon, *arguments: str) -> None:
        self._outer, self.inner = pty.openpty()
        termios.tcsetwinsize(self.inner, (50, 120)) if hasattr(termios, "tcsetwinsize") else None
        options = ["--port", str(daemon.port), "--runtime-dir", str(daemon.runtime_dir), "--interval", "0.2"]
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luna_daemon", "top", *options, *arguments],
            stdin=self.inner, stdout=self.inner, stderr=self.inner, env=environ,
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self._outer)
        os.close(self.inner)

    def until(self, words: str, timeout_s: float = 20.0) -> str:
        """What was drawn from now on, up to and with these words."""
        text, end = "", time.monotonic() + timeout_s
        while words not in text:
            ready, _, _ = select.select([self._outer], [], [], 0.1)
            if ready:
                text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self._outer, 65536).decode(errors="replace"))
            assert time.monotonic() < end, f"{words!r} was never drawn: {text[-2000:]}"
        return text

    def ended(self, timeout_s: float = 20.0) -> int | None:
        """The exit code, once it is there; what is drawn until then is read, as a terminal does."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._outer], [], [], 0.05)[0]:
                os.read(self._outer, 65536)
        return self.process.poll()

    def press(self, key: str) -> None:
        os.write(self._outer, key.encode())


def is_cooked(terminal: Terminal) -> bool:
    """Whether lines are edited and echoed, as a shell expects it."""
    flags = termios.tcgetattr(terminal.inner)[3]
    return bool(flags & termios.ICANON and flags & termios.ECHO)


def test_it_follows_a_daemon_that_ends_and_comes_back(start_daemon):
    """State, then that it is away, then the new one; ``q`` ends it and leaves the terminal as it was."""
    daemon = start_daemon(toml=DEMO_TOML)
    with Terminal(daemon) as terminal:
        assert "No workers" in terminal.until("No clients except this one")
        import torch

        daemon.client(name="painter").vae_decode(torch.zeros(1, 16, 8, 8), vae_type="demo")
        terminal.until("luna_demo_vae")
        terminal.until("painter")
        terminal.until("vae.decode")
        daemon.stop()
        terminal.until("Luna Daemon is away")
        terminal.until("Last seen at")
        second = start_daemon(port=daemon.port, toml=DEMO_TOML)
        terminal.until(f"pid {second.process.pid}")
        assert not is_cooked(terminal)
        terminal.press("q")
        assert terminal.ended() == 0 and is_cooked(terminal)


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_it_ends_while_nobody_answers(start_daemon, key):
    """No daemon at all: it says so, waits, and can be left."""
    daemon = start_daemon()
    daemon.stop()
    with Terminal(daemon) as terminal:
        terminal.until("Start it with 'luna-daemon serve'")
        if key == "\x03":
            terminal.process.send_signal(2)  # the terminal is not its controlling one
        else:
            terminal.press(key)
        assert terminal.ended() == 0 and is_cooked(terminal)


def test_one_picture(start_daemon):
    """``--once``, or no terminal: one picture and exit code 0; without a daemon one line and 1."""
    daemon = start_daemon()
    options = ["--port", str(daemon.port), "--runtime-dir", str(daemon.runtime_dir)]

    def top(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "luna_daemon", "top", *options, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    for more in ((), ("--once",)):
        ran = top(*more)
        assert ran.returncode == 0 and ran.stdout.count("Luna Daemon") == 1 and "\x1b" not in ran.stdout
    daemon.stop()
    ran = top()
    assert (ran.returncode, ran.stdout) == (1, "") and ran.stderr.count("\n") == 1
