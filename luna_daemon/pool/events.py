"""Events and statistics: counters that only grow, the last events, and listeners.

The control process has one ``Events`` object: the pool and the service report to it; ``info``, the metrics and the
status page read it. Anybody who reaches the status page may see all of it, so it holds no prompt, tensor or folder.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from itertools import accumulate
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..core import logger

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of a histogram's buckets, seconds: a cached prompt takes less than the first, a cold model the last."""
_WINDOW_S, _WINDOW_SIZE = 300.0, 512
"""Latencies are computed from the answers of this many seconds, at most this many per op."""
_THROUGHPUT_S = 10
_TICKS, _DIGEST = 10, 200
_WORK = {"vae.encode", "vae.decode", "clip.tokenize", "clip.encode", "lora.get", "lora.load", "echo"}
"""Ops that count as throughput: those that instances need for images, not the tray's status requests."""
_MOST_MODELS = 100
"""Most models with separate statistics; others are counted together, to bound the number of metric labels."""
_MOST_TEXT = 300
_SHOWN = {
    "model_not_found", "model_mismatch", "model_load", "out_of_memory", "worker_crashed", "poison", "busy", "deadline",
    "shutting_down",
}  # fmt: skip
"""Errors whose message is about the daemon. Other messages may quote a caller's input: only their code is shown."""

Listener = Callable[[str, dict[str, Any]], None]


class Histogram:
    """Counts of seconds by bucket, and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, int]]:
        """Return each upper bound with the number of values up to it, as Prometheus expects."""
        return list(zip([*map(str, BOUNDS), "+Inf"], accumulate(self.counts)))


class Events:
    """A record of requests that end, of workers and models that come or go, and of errors.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.waits = Histogram()
        """Seconds in the queue."""
        self.scalings: Counter[str] = Counter()
        """Events of workers and models by name."""
        self.recent: deque[dict[str, Any]] = deque(maxlen=50)
        """The last events of workers and models, oldest first."""
        self.crashes: Counter[str] = Counter()
        """Workers that died, by key: backend and device."""
        self.restarts: Counter[str] = Counter()
        """Workers that started in place of one that died, by key."""
        self.last_errors: dict[str, tuple[str, float]] = {}
        """The last error of a worker and its time (seconds since 1970), by key."""
        self._clock = clock
        self._crashed: Counter[str] = Counter()
        self._ended: list[tuple[float, str, str, float, str]] = []
        self._results: Counter[tuple[str, str]] = Counter()
        self._latencies: dict[tuple[str, str], Histogram] = {}
        self._windows: dict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=_WINDOW_SIZE))
        self._ticks: Counter[int] = Counter()
        self._models: set[str] = set()
        self._listeners: list[Listener] = []

    # --- listeners ---

    def listen(self, listener: Listener) -> None:
        """Call ``listener(type, data)`` for each event from now on: ``request``, ``scaling``, ``error``."""
        self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Stop calling ``listener``."""
        self._listeners.remove(listener)

    def _notify(self, kind: str, data: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(kind, data)

    # --- reports ---

    def request(self, op: str, model: str, seconds: float, result: str = "ok") -> None:
        """Record a request that was answered (``ok``), failed (its code) or was given up (``cancelled``)."""
        self._ended.append((self._clock(), op, model, seconds, result))
        if len(self._ended) >= _DIGEST:
            self._digest()
        if self._listeners:
            data = {"op": op, "model": model, "seconds": round(seconds, 6), "result": result, "at": time.time()}
            self._notify("request", data)

    def _digest(self) -> None:
        """Count the requests that have ended since the last call.

        Requests are counted in batches for the processor's caches: one at a time costs four times as much, a tenth of
        a small call.
        """
        ended, self._ended = self._ended, []
        for now, op, model, seconds, result in ended:
            self._results[op, result] += 1
            if op in _WORK:
                self._ticks[int(now * _TICKS)] += 1
            if result != "ok":
                continue
            known = (op, model if model in self._models else self._known(model))
            histogram = self._latencies.get(known)
            if histogram is None:
                histogram = self._latencies[known] = Histogram()
            histogram.add(seconds)
            self._windows[op].append((now, seconds))
        oldest = int(self._clock() * _TICKS) - _THROUGHPUT_S * _TICKS
        for tick in [tick for tick in self._ticks if tick <= oldest]:
            del self._ticks[tick]

    def _known(self, model: str) -> str:
        if model not in self._models and len(self._models) >= _MOST_MODELS:
            return "other"
        self._models.add(model)
        return model

    def failed(self, code: str, message: str, op: str = "", model: str = "") -> None:
        """Notify listeners of a request that was answered with an error."""
        shown = without_folders(message) if code in _SHOWN else ""
        self._notify("error", {"code": code, "message": shown, "worker": None, "op": op, "model": model})

    def scaling(self, event: str, worker: int, key: str, **attributes: Any) -> None:
        """Record that a worker or model came or went.

        Args:
            event: ``worker_started``, ``worker_ready``, ``worker_stopped``, ``worker_crashed``, ``model_loaded``,
                ``model_unloaded`` or ``model_evicted``.
        """
        self.scalings[event] += 1
        data = {"event": event, "worker": worker, "key": key, **attributes, "at": time.time()}
        self.recent.append(data)
        if event == "worker_started" and self._crashed[key]:
            self._crashed[key] -= 1
            self.restarts[key] += 1
        if event.startswith("model_") or event == "worker_stopped":
            logger.info("worker %d: %s", worker, " ".join(str(part) for part in (event, *attributes.values())))
        self._notify("scaling", data)

    def worker_failed(self, key: str, code: str, message: str) -> None:
        """Record an error of a worker that keeps running."""
        shown = without_folders(message) if code in _SHOWN else f"{code}: see the daemon's log"
        self.last_errors[key] = (shown, time.time())

    def worker_crashed(self, worker: int, key: str, why: str) -> None:
        """Record a worker that ended without having been stopped."""
        shown = without_folders(why)
        self.crashes[key] += 1
        self._crashed[key] += 1
        self.last_errors[key] = (shown, time.time())
        self.scaling("worker_crashed", worker, key, why=shown)
        data = {"code": "worker_crashed", "message": shown, "worker": worker, "op": "", "model": ""}
        self._notify("error", data)

    # --- statistics ---

    @property
    def results(self) -> Counter[tuple[str, str]]:
        """Requests that have ended, by op and by ``ok`` or the error's code."""
        self._digest()
        return self._results

    @property
    def latencies(self) -> dict[tuple[str, str], Histogram]:
        """Seconds from receipt to answer of requests that succeeded, by op and model."""
        self._digest()
        return self._latencies

    def latency(self) -> dict[str, dict[str, float]]:
        """Return the ``count``, median, 95th percentile and mean (ms) of recent answers, by op."""
        self._digest()
        since = self._clock() - _WINDOW_S
        recent = {op: sorted(s for at, s in kept if at >= since) for op, kept in self._windows.items()}
        return {op: _summary(seconds) for op, seconds in recent.items() if seconds}

    @property
    def throughput_per_s(self) -> float:
        """Requests of the last ten seconds that ended, per second; only ops in ``_WORK`` count."""
        self._digest()
        return self._ticks.total() / _THROUGHPUT_S


def _summary(seconds: list[float]) -> dict[str, float]:
    """Summarise sorted seconds."""
    last = len(seconds) - 1
    return {
        "count": len(seconds),
        "p50_ms": round(1000 * seconds[last // 2], 3),
        "p95_ms": round(1000 * seconds[round(last * 0.95)], 3),
        "mean_ms": round(1000 * sum(seconds) / len(seconds), 3),
    }


def model_name(key: str) -> str:
    """Return NAME from a model's key ``vae:NAME:DIGEST``: the first file's name without folder and suffix."""
    parts = key.split(":")
    return ":".join(parts[1:-1]) if len(parts) > 2 else key


def base_name(text: str) -> str:
    """Return an absolute path's last part, and any other text as it is."""
    for flavour in (PurePosixPath, PureWindowsPath):
        if (path := flavour(text)).is_absolute():
            return path.name
    return text


def without_folders(text: str) -> str:
    """Return a message with each path reduced to its last part, cut to 300 characters."""
    quoted = re.sub(r"(['\"])[^'\"]*[\\/]([^'\"\\/]*)\1", r"\1\2\1", text)
    bare = re.sub(r"[^\s'\",;()]*[\\/]([^\s'\",;()\\/]*)", r"\1", quoted)
    return bare if len(bare) <= _MOST_TEXT else bare[: _MOST_TEXT - 3] + "..."
