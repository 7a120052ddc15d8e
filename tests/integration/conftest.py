"""Real daemons for integration tests: each test module gets its own, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from luna_daemon.client import DaemonClient
from luna_daemon.core import LunaError
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "luna_daemon" / "daemon_server.py"
DEMO_VAE = ROOT / "demo" / "model" / "luna_demo_vae.safetensors"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RunningDaemon:
    """A daemon process, with what tests need to know about it."""

    process: subprocess.Popen[bytes]
    port: int
    ws_port: int
    runtime_dir: Path
    arena_dir: Path
    log: Path
    clients: list[DaemonClient] = field(default_factory=list)
    expected_to_die: bool = False
    """The test ends it by its own means: that it is gone, and what it left, is no error."""
    stopped: bool = False

    def client(self, **options: Any) -> DaemonClient:
        client = DaemonClient("127.0.0.1", self.port, runtime_dir=self.runtime_dir, **options)
        self.clients.append(client)
        return client

    def info(self) -> dict[str, Any]:
        with DaemonClient("127.0.0.1", self.port, runtime_dir=self.runtime_dir, name="test-info") as client:
            return client.get_daemon_info()

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 20.0) -> dict[str, Any]:
        """The first ``info`` for which ``holds``."""
        infos: list[dict[str, Any]] = []

        def look() -> bool:
            infos[:] = [self.info()]
            return holds(infos[0])

        wait_until(look, timeout_s, lambda: f"what is waited for; last info: {infos[0]}")
        return infos[0]

    def stop(self, expect_clean: bool = True) -> None:
        """End it, and check that it ended well and that nothing is left over: no process, no arena, no runtime folder.

        One that ends by itself (a test's signal, ``luna-daemon stop``) is checked in the same way.
        """
        self.stopped = True
        for client in self.clients:
            client.close()
        workers = self.workers() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        _, alive = psutil.wait_procs(workers, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if expect_clean:
            assert self.process.returncode == 0, f"exit code {self.process.returncode}: {self.log.read_text()}"
            assert not alive, f"worker processes were left over: {alive}"
            assert not list(self.arena_dir.glob("*")), "arena files were left over"
            assert not (self.runtime_dir / str(self.port)).exists(), "the runtime folder was left over"
            assert "Traceback" not in self.log.read_text(), self.log.read_text()

    def end(self) -> None:
        """What every daemon meets after its test: it is stopped; one that is gone already must have had a reason."""
        stopped, gone = self.stopped, self.process.poll() is not None
        self.stop(expect_clean=not gone)  # its clients may have connected anew, to another daemon on its port
        assert not gone or stopped or self.expected_to_die, (
            f"the daemon died during the test, exit code {self.process.returncode}: {self.log.read_text()}"
        )


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """Start daemons with settings as keywords; each is ended and checked after the test."""
    with daemons_below(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningDaemon]]:
    """The same for a daemon that all tests of a module share."""
    with daemons_below(tmp_path_factory.mktemp("module")) as start:
        yield start


@pytest.fixture(scope="session")
def clip_l() -> Path:
    """A text encoder with CLIP-L's real architecture and seeded random weights, made once per checkout."""
    sys.path.insert(0, str(ROOT / "demo"))
    from make_text_encoder import make_clip_l

    path = ROOT / "build" / "models" / "clip_l.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_clip_l(path)


@contextlib.contextmanager
def daemons_below(folder: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """A function that starts daemons whose files lie below ``folder``."""
    running: list[RunningDaemon] = []
    with contextlib.ExitStack() as folders, contextlib.ExitStack() as ends:

        def start(*, toml: str = "", wait: bool = True, port: int | None = None, **settings: Any) -> RunningDaemon:
            number = len(running)
            arena = Path(settings.pop("arena_dir", "") or folders.enter_context(_arena_folder()))
            runtime = folder / "run"
            runtime.mkdir(exist_ok=True)
            config = folder / f"luna-{number}.toml"
            config.write_text(toml)
            port_, ws_port = port or free_port(), free_port()
            environ = {key: value for key, value in os.environ.items() if not key.startswith(("LUNA_", "COMFYUI_"))}
            environ |= {
                "LUNA_PORT": str(port_), "LUNA_WS_PORT": str(ws_port), "LUNA_RUNTIME_DIR": str(runtime),
                "LUNA_ARENA_DIR": str(arena), "LUNA_CONFIG": str(config), "LUNA_MODEL_DIRS": str(DEMO_VAE.parent),
            }  # fmt: skip
            environ |= {f"LUNA_{name.upper()}": str(value) for name, value in settings.items()}
            log = folder / f"daemon-{number}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, str(SERVER)], env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            daemon = RunningDaemon(process, port_, ws_port, runtime, arena, log)
            running.append(daemon)
            # Each on its own: one that ends badly must not keep the others from ending.
            ends.callback(daemon.end)
            if wait:
                _wait_until_it_answers(daemon)
            return daemon

        yield start


@contextlib.contextmanager
def _arena_folder() -> Iterator[str]:
    import tempfile

    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="luna-test-", dir=base) as folder:
        yield folder


def _wait_until_it_answers(daemon: RunningDaemon, timeout_s: float = 60.0) -> None:
    def answers() -> bool:
        assert daemon.process.poll() is None, daemon.log.read_text()
        with contextlib.suppress(LunaError), daemon.client() as client:
            return client.ping() > 0
        return False

    wait_until(answers, timeout_s, daemon.log.read_text)
