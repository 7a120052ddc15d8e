"""What the soak runs on: a daemon with small limits, its folders, its clients, local results to compare with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, free_port
from soak_client import PROMPTS, SHAPES, latents, pixels, versioned

from luna_daemon.client import DaemonClient
from luna_daemon.core import LunaError

__all__ = ["Stage", "prepared"]

ARENA_MB = 192
LORA = "versions.safetensors"
PATIENCE_S = 60.0
DEMO_VAE = ROOT / "demo" / "model" / "luna_demo_vae.safetensors"


@dataclass
class Stage:
    """What the soak runs on: a daemon, its folders, its clients."""

    folder: Path
    arena: Path
    private: bool
    """Whether the arena's folder is a file system of our own, which may be filled."""
    port: int = field(default_factory=free_port)
    ws_port: int = field(default_factory=free_port)
    daemon: subprocess.Popen[bytes] | None = None
    clients: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    version: int = 0
    seen: dict[int, float] = field(default_factory=dict)
    """Every worker that there was: its pid, and when it was born."""

    # --- the daemon ---

    def start_daemon(self) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("LUNA_")}
        environ |= {"LUNA_CONFIG": str(self.folder / "luna.toml")}
        log = (self.folder / "daemon.log").open("ab")
        script = ROOT / "luna_daemon" / "daemon_server.py"
        self.daemon = subprocess.Popen([sys.executable, str(script)], env=environ, stdout=log, stderr=log)
        self.wait_for(lambda info: info["status"] == "running")

    def stop_daemon(self) -> int:
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(60)

    def ask(self) -> DaemonClient:
        return DaemonClient("127.0.0.1", self.port, runtime_dir=self.folder / "run", name="soak")

    def info(self) -> dict[str, Any]:
        with self.ask() as client:
            return client.get_daemon_info()

    def wait_for(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while True:
            with suppress(LunaError):
                info = self.info()
                if holds(info):
                    return info
            if time.monotonic() > end:
                raise TimeoutError(f"the daemon is not as it should be after {timeout_s:g} s")
            time.sleep(0.1)

    def process(self) -> psutil.Process:
        assert self.daemon is not None
        return psutil.Process(self.daemon.pid)

    def workers(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            found = self.process().children(recursive=True)
            self.seen.update({worker.pid: worker.create_time() for worker in found})
            return found
        return []

    # --- clients ---

    def start_client(self, number: int) -> None:
        orders = {
            "number": number, "port": self.port, "runtime_dir": str(self.folder / "run"), "lora": LORA,
            "expected": str(self.folder / "expected.safetensors"), "version_file": str(self.folder / "version"),
            "log": str(self.folder / f"client-{number}.jsonl"),
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("soak_client.py"))], stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        process.stdin.flush()
        self.clients[number] = process

    def stop_clients(self) -> None:
        for process in self.clients.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        end = time.monotonic() + 2 * PATIENCE_S
        for process in self.clients.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            process.kill()

    def replace_lora(self) -> None:
        """Another version of the file, all at once, as an editor or a download does it."""
        from safetensors.torch import save_file

        self.version += 1
        part = self.folder / "loras" / "next.part"
        save_file(versioned(self.version), part)
        os.replace(part, self.folder / "loras" / LORA)
        (self.folder / "version.part").write_text(str(self.version))
        os.replace(self.folder / "version.part", self.folder / "version")


@contextmanager
def prepared() -> Iterator[Stage]:
    """Folders, models, the local results that answers are compared with; nothing is left of them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="luna-soak-")))
        arena, private = stack.enter_context(small_file_system())
        stage = Stage(folder, arena, private)
        for name in ("run", "loras"):
            (folder / name).mkdir()
        write_settings(stage)
        stage.replace_lora()
        write_expected(folder)
        stack.callback(end_everything, stage)
        yield stage


@contextmanager
def small_file_system() -> Iterator[tuple[Path, bool]]:
    """A tmpfs of our own that may be filled; a plain folder where none may be mounted."""
    with tempfile.TemporaryDirectory(prefix="luna-soak-arena-") as folder:
        options = ["-t", "tmpfs", "-o", f"size={ARENA_MB}m", "tmpfs", folder]
        mounted = sys.platform == "linux" and not subprocess.run(["mount", *options], capture_output=True).returncode
        try:
            yield Path(folder), mounted
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)


def write_settings(stage: Stage) -> None:
    """Small limits, so that they are met."""
    sys.path.insert(0, str(ROOT / "demo"))
    from make_text_encoder import make_tiny_clip

    clip = make_tiny_clip(stage.folder / "tiny.safetensors")
    (stage.folder / "luna.toml").write_text(
        f"""
port = {stage.port}
ws_port = {stage.ws_port}
runtime_dir = "{(stage.folder / "run").as_posix()}"
arena_dir = "{stage.arena.as_posix()}"
model_dirs = ["{stage.folder.as_posix()}"]
backend = "diffusers"
cpu_threads = 1
queue_limit = 48
conditioning_cache_mb = 1
lora_cache_gb = 0.1

[models.demo]
vae = ["{DEMO_VAE.as_posix()}"]
type = "sd3"

[models.tiny]
clip = ["{clip.as_posix()}"]
type = "sd15"
"""
    )


def write_expected(folder: Path) -> None:
    """What the models give in this process, with as many threads as a worker has."""
    import torch
    from safetensors.torch import save_file

    from luna_daemon.backends.local import LocalCLIP, LocalVAE

    torch.set_num_threads(1)
    vae, clip = LocalVAE(DEMO_VAE), LocalCLIP(folder / "tiny.safetensors", type="sd15")
    expected = {f"decode-{seed}": vae.decode(latents(seed)) for seed in range(SHAPES)}
    expected |= {f"encode-{seed}": vae.encode(pixels(seed)) for seed in range(SHAPES)}
    expected |= {f"cond-{number}": clip.encode(prompt) for number, prompt in enumerate(PROMPTS)}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")


def end_everything(stage: Stage) -> None:
    for process in [*stage.clients.values(), stage.daemon]:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
