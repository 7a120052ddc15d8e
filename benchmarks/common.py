"""What every benchmark here needs: a daemon of its own, medians, one form of result."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from luna_daemon.client import DaemonClient
from luna_daemon.daemon_server import LunaDaemon

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from surroundings import BUILD, ROOT, free_port, leave_the_users_settings, pss, stage

__all__ = ["BUILD", "ROOT", "free_port", "pss", "stage"]  # and everything below

MODELS = BUILD / "models"
RUNTIME = BUILD / "run"
CLIP_L, CLIP_G, VAE = MODELS / "clip_l.safetensors", MODELS / "clip_g.safetensors", MODELS / "sdxl_vae.safetensors"

Result = dict[str, Any]
"""``value``, ``unit``, ``bar`` (``{"at_most": 1.6}``, ``{"at_least": 20}`` or ``None``), ``met`` (``None`` without a
bar), and both sides of a ratio."""

_BAR = re.compile(r"(<=|>=) (\d+(?:\.\d+)?)")
_SIDES = {"<=": "at_most", ">=": "at_least"}

leave_the_users_settings()


def make_models() -> None:
    """SDXL's text encoders and VAE at their real size with seeded random weights, float16, once."""
    from make_text_encoder import make_clip_g, make_clip_l, make_sdxl_vae

    MODELS.mkdir(parents=True, exist_ok=True)
    make_clip_l(CLIP_L)
    make_clip_g(CLIP_G)
    make_sdxl_vae(VAE)


@contextmanager
def daemon(**settings: Any) -> Iterator[LunaDaemon]:
    """A daemon on a free port, with the SDXL files as model ``sdxl``."""
    models = {"sdxl": {"vae": [str(VAE)], "clip": [str(CLIP_L), str(CLIP_G)], "type": "sdxl"}}
    settings = {"backend": "diffusers", "runtime_dir": RUNTIME, "models": models, **settings}
    with LunaDaemon(port=free_port(), ws_port=free_port(), environ=dict(os.environ), **settings) as running:
        yield running


def client(running: LunaDaemon, **options: Any) -> DaemonClient:
    return DaemonClient("127.0.0.1", running.port, runtime_dir=RUNTIME, **options)


def times_ms(work: Callable[[], object], runs: int, warm: int = 10) -> list[float]:
    """Sorted milliseconds of ``runs`` calls after ``warm`` that do not count."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        found.append((time.perf_counter() - start) * 1e3)
    return sorted(found)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def result(value: float, unit: str, bar: str = "", private: bool | None = None, **sides: Any) -> Result:
    """One row; numbers are rounded, since these are measurements.

    Args:
        bar: ``<= 1.6``, ``>= 20``, or nothing.
        private: whether results were private where that was looked at; the bar is not met if they were not.
    """
    rounded = {name: round(side, 4) if isinstance(side, float) else side for name, side in sides.items()}
    if private is not None:
        rounded = {"private": private, **rounded}
    limit, met = None, None
    if bar:
        match = _BAR.fullmatch(bar)
        assert match is not None, bar
        limit = {_SIDES[match[1]]: float(match[2])}
        met = (value <= float(match[2]) if match[1] == "<=" else value >= float(match[2])) and private is not False
    return {"value": round(value, 4), "unit": unit, "bar": limit, "met": met, **rounded}


class Peer:
    """A process of a script here, ``peer.py`` or another, that does what it is told, one JSON line at a time."""

    def __init__(self, *options: str, threads: int = 0, script: str = "peer.py") -> None:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        if threads:
            environ["OMP_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / script), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ,
        )  # fmt: skip

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a benchmark process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def ask(self, **order: Any) -> Any:
        self.tell(**order)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@contextmanager
def peers(count: int, *options: str, threads: int = 0, script: str = "peer.py") -> Iterator[list[Peer]]:
    """Several peers at once; they end with the block."""
    running = [Peer(*options, threads=threads, script=script) for _ in range(count)]
    try:
        yield running
    finally:
        for peer in running:
            peer.close()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def median(values: list[float]) -> float:
    return statistics.median(values)
