"""The daemon's metrics for Prometheus, read from the state at each scrape; docs/monitoring.md lists the names."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from .. import __version__
from ..control.state import State
from ..core import WorkerState
from ..pool.events import Histogram, base_name, model_name
from .watchers import Watchers

Values = Mapping[tuple[str, ...], float]
"""Samples of a family by the values of their labels."""


async def render(state: State, watchers: Watchers, accept: str) -> tuple[bytes, str]:
    """Render all metrics.

    Args:
        accept: the request's ``Accept`` header, which chooses the format.

    Returns:
        The exposition and its content type.
    """
    # The state is read on the event loop; encoding takes longer and runs in a thread.
    registry = CollectorRegistry()
    registry.register(_Collected(list(Collector(state, watchers).collect())))
    encode, kind = choose_encoder(accept)
    return await asyncio.get_running_loop().run_in_executor(None, encode, registry), kind


class _Collected:
    """A collector of families that were made before."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """Return the families."""
        return self._families


class Collector:
    """Makes all metric families from the daemon's state."""

    def __init__(self, state: State, watchers: Watchers) -> None:
        self._state = state
        self._watchers = watchers

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        yield from self._process()
        yield from self._requests()
        yield from self._queue()
        yield from self._workers()
        yield from self._models()
        yield from self._caches()
        yield from self._loras()
        yield from self._memory()
        yield from self._clients()

    def _process(self) -> Iterator[Metric]:
        state, process = self._state, psutil.Process()
        with process.oneshot():
            rss, times, threads = process.memory_info().rss, process.cpu_times(), process.num_threads()
        yield _gauge("luna_build_info", "The daemon's version; always 1.", {"version": __version__}, 1)
        yield _gauge("luna_start_time_seconds", "When the daemon started, in seconds since 1970.", {}, state.started_at)
        yield _gauge("luna_ready", "Whether the daemon accepts requests.", {}, int(state.pool.accepting))
        yield _gauge("luna_process_resident_memory_bytes", "Memory of the control process.", {}, rss)
        yield _counter("luna_process_cpu_seconds", "CPU time of the control process.", {}, times.user + times.system)
        yield _gauge("luna_process_threads", "Threads of the control process.", {}, threads)

    def _requests(self) -> Iterator[Metric]:
        events = self._state.events
        requests = CounterMetricFamily(
            "luna_requests", "Requests that have ended, by op and result: ok, cancelled or an error's code.",
            labels=["op", "result"],
        )  # fmt: skip
        for (op, result), count in events.results.items():
            requests.add_metric([op, result], count)
        yield requests
        latency = HistogramMetricFamily(
            "luna_request_duration_seconds", "Time from receipt to answer of successful requests.",
            labels=["op", "model"],
        )  # fmt: skip
        for (op, model), histogram in events.latencies.items():
            _add(latency, [op, model], histogram)
        yield latency
        yield _gauge("luna_requests_in_flight", "Requests waiting or running.", {}, self._state.pool.in_flight)
        yield _counter("luna_requests_coalesced", "Requests that joined an identical one.", {}, self._state.coalesced)

    def _queue(self) -> Iterator[Metric]:
        state = self._state
        yield _gauge("luna_queue_depth", "Requests that wait for a worker.", {}, len(state.pool.queue))
        yield _gauge("luna_queue_limit", "Maximum number of waiting requests.", {}, state.settings.queue_limit)
        waits = HistogramMetricFamily("luna_queue_wait_seconds", "Time that requests waited in the queue.", labels=[])
        _add(waits, [], state.events.waits)
        yield waits

    def _workers(self) -> Iterator[Metric]:
        pool, events = self._state.pool, self._state.events
        states = Counter(worker.state for worker in pool.workers)
        yield _gauges(
            "luna_workers", "Worker processes by state.", ["state"],
            {(state.value,): states[state] for state in WorkerState if state is not WorkerState.DEAD},
        )  # fmt: skip
        yield _gauges(
            "luna_worker_resident_memory_bytes", "Memory of a worker process.", ["worker", "device"],
            {(str(worker.number), worker.device): worker.rss for worker in pool.workers},
        )  # fmt: skip
        yield _counters("luna_worker_crashes", "Workers that ended unexpectedly.", ["key"], _by_key(events.crashes))
        yield _counters(
            "luna_worker_restarts", "Workers started in place of a crashed worker.", ["key"], _by_key(events.restarts)
        )
        yield _counter("luna_request_retries", "Requests tried again after a crash of their worker.", {}, pool.retries)
        yield _counters(
            "luna_scale_events", "Starts and ends of workers, loads and unloads of models, by event.", ["event"],
            _by_key(events.scalings),
        )  # fmt: skip

    def _models(self) -> Iterator[Metric]:
        held: Counter[tuple[str, ...]] = Counter()
        for worker in self._state.pool.workers:
            for key, nbytes in worker.models.items():
                held[str(worker.number), key.partition(":")[0], model_name(key)] += nbytes
        yield _gauges("luna_model_bytes", "Weights of a model in a worker.", ["worker", "kind", "model"], held)
        yield _gauge("luna_models_pinned", "Models that stay loaded.", {}, len(self._state.pool.pinned))

    def _caches(self) -> Iterator[Metric]:
        stats = {"conditioning": self._state.conditionings.stats(), "lora": self._state.loras.stats()}

        def of(name: str) -> Values:
            return {(cache,): numbers[name] for cache, numbers in stats.items() if name in numbers}

        yield _counters("luna_cache_hits", "Answers from a cache.", ["cache"], of("hits"))
        yield _counters("luna_cache_misses", "Lookups that a cache could not answer.", ["cache"], of("misses"))
        yield _counters("luna_cache_evictions", "Entries evicted to make room in a cache.", ["cache"], of("evictions"))
        yield _gauges("luna_cache_entries", "Entries of a cache.", ["cache"], of("entries"))
        yield _gauges("luna_cache_bytes", "Memory of a cache.", ["cache"], of("bytes"))
        yield _gauges("luna_cache_limit_bytes", "Memory limit of a cache.", ["cache"], of("max_bytes"))

    def _loras(self) -> Iterator[Metric]:
        loras = self._state.loras.stats()["loras"]
        columns: tuple[tuple[str, Any, str, str], ...] = (
            ("hits", _counters, "luna_lora_hits", "How often a LoRA was served from the cache."),
            ("misses", _counters, "luna_lora_misses", "How often a LoRA had to be loaded."),
            ("bytes", _gauges, "luna_lora_bytes", "Memory of a LoRA."),
            ("load_s", _gauges, "luna_lora_load_seconds", "How long loading a LoRA took."),
            (
                "last_used",
                _gauges,
                "luna_lora_last_used_timestamp_seconds",
                "When a LoRA was last used, since 1970.",
            ),
            ("clients", _gauges, "luna_lora_clients", "Clients that use a LoRA."),
            ("pinned", _gauges, "luna_lora_pinned", "Whether a LoRA is pinned."),
        )
        for column, family, name, text in columns:
            values = {(base_name(lora),): row[column] for lora, row in loras.items() if column in row}
            yield family(name, text, ["lora"], values)

    def _memory(self) -> Iterator[Metric]:
        arena = self._state.memory.arena
        sizes = (0, 0, 0) if arena is None else (arena.bytes_used, arena.bytes_reserved, arena.max_bytes)
        for nbytes, name, text in zip(
            sizes,
            ("used", "reserved", "limit"),
            ("Shared memory in use.", "Shared memory reserved from the system.", "Limit of shared memory."),
        ):
            yield _gauge(f"luna_arena_{name}_bytes", text, {}, nbytes)
        gpus = self._state.gpus
        for column, name, text in (
            ("used", "luna_gpu_memory_used_bytes", "VRAM in use by all processes."),
            ("free", "luna_gpu_memory_free_bytes", "Free VRAM."),
            ("total", "luna_gpu_memory_total_bytes", "Total VRAM."),
        ):
            values: Values = {(str(gpu["index"]), gpu["name"], gpu["uuid"]): gpu[column] for gpu in gpus}
            yield _gauges(name, text, ["gpu", "name", "uuid"], values)

    def _clients(self) -> Iterator[Metric]:
        state = self._state
        sessions = list(state.sessions.values())
        yield _gauges(
            "luna_clients", "Connected clients by transport of tensors.", ["transport"],
            {("shared_memory",): sum(s.sees_arena for s in sessions),
             ("tcp",): sum(not s.sees_arena for s in sessions)},
        )  # fmt: skip
        yield _gauge(
            "luna_clients_leased_bytes", "Shared memory leased to clients.", {}, sum(s.leases.nbytes for s in sessions)
        )
        yield _gauge("luna_watchers", "Open WebSockets.", {}, len(self._watchers))
        yield _counter(
            "luna_watchers_dropped", "WebSockets disconnected for reading too slowly.", {}, self._watchers.dropped
        )
        yield _counter("luna_client_fallbacks", "Calls that clients computed themselves.", {}, state.fallbacks)
        yield _counter(
            "luna_client_materialised", "Weights that clients had to load themselves.", {}, state.materialised
        )


def _by_key(counts: Counter[str]) -> Values:
    return {(key,): count for key, count in counts.items()}


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets: list[Any] = histogram.buckets()
    family.add_metric(labels, buckets=buckets, sum_value=histogram.total)


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    return _gauges(name, text, list(labels), {tuple(labels.values()): value})


def _counter(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    return _counters(name, text, list(labels), {tuple(labels.values()): value})


def _gauges(name: str, text: str, labels: list[str], values: Values) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def _counters(name: str, text: str, labels: list[str], values: Values) -> Metric:
    """Make a counter family; its samples' names get the suffix ``_total``."""
    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def _filled(family: Any, values: Values) -> Metric:
    for labels, value in values.items():
        family.add_metric(list(labels), value)
    result: Metric = family
    return result
