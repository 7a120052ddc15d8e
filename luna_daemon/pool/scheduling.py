"""Give waiting work to workers: choose or start a worker for each piece of work, and models to evict.

Collects the inputs of ``policy``'s decisions from the queue, the workers, the settings and the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Literal

from ..config import Settings
from ..core import ConfigError, DeadlineExceeded, ModelKind, OutOfMemory
from ..files.identity import load_bytes
from ..wire.messages import LoadSpec
from . import launch, policy
from .events import Events
from .fleet import Fleet
from .process import WorkerKey, WorkerProcess
from .waiting import Line, WorkQueue
from .work import Work

FreeVram = Callable[[str], "int | None"]
"""Free bytes of a GPU by its device; ``None`` where unknown."""


class Scheduler:
    """Gives the queue's work to the fleet's workers.

    Args:
        pinned: keys of models that are never evicted; shared with the pool.
        events: receives the time that work has waited.
        clock: monotonic seconds.
        free_vram: see ``FreeVram``.
    """

    def __init__(
        self,
        queue: WorkQueue,
        fleet: Fleet,
        pinned: set[str],
        events: Events,
        clock: Callable[[], float],
        free_vram: FreeVram,
    ) -> None:
        self.sizes: dict[str, int] = {}
        """Bytes of models that have been loaded before, by key; may differ from the bytes of the files."""
        self._queue, self._fleet, self._pinned, self._events = queue, fleet, pinned, events
        self._clock, self._free_vram = clock, free_vram
        self._jobs = 0

    def run(self, settings: Settings) -> None:
        """Give waiting work to free workers, start workers for it, and fail what is past its deadline."""
        if not self._queue:
            return
        now, workers = self._clock(), self._fleet.workers
        running = Counter(worker.work.client for worker in workers if worker.work is not None)
        lines = self._queue.lines()
        stuck: set[Hashable] = set()
        for work in self._queue.in_order(running):
            place = launch.same_place(work.spec)
            if work.deadline is not None and now > work.deadline:
                late = f"the request waited {now - work.born:.1f} s, past its deadline"
                self._queue.fail([work], DeadlineExceeded(late))
            # No worker becomes free in this loop: if a piece of work must wait, so must all of its line.
            elif place not in stuck and not self._place(work, lines[place], settings):
                stuck.add(place)

    def start_failed(self, key: WorkerKey, why: str, settings: Settings) -> None:
        """Back off from starting workers of a key, and fail the work that no other worker can take."""
        backoff = self._fleet.backoff(key)
        backoff.failed(why)
        if not self._fleet.of_key(key):
            self._queue.fail(self._of_key(key, settings), backoff.error())

    def refuse_outdated(self, worker: WorkerProcess, settings: Settings) -> None:
        """Fail the work whose ComfyUI has other versions than a new worker: another worker would not fit either."""
        for work in self._of_key(worker.key, settings):
            if work.spec.comfy is not None and self._fleet.refuses(worker, work.spec):
                self._queue.fail([work], launch.unlike(work.spec.comfy, worker.versions))

    def _of_key(self, key: WorkerKey, settings: Settings) -> list[Work]:
        return [work for work in self._queue if launch.worker_key(work.spec, settings) == key]

    def _place(self, work: Work, line: Line, settings: Settings) -> bool:
        """Give work to a worker, or start one; return whether a worker has it now."""
        where = find_worker(work, line, self._fleet.workers, settings, self._free_vram)
        if isinstance(where, WorkerProcess):
            self._queue.remove(work)
            self._give(where, work, settings)
            return True
        key = launch.worker_key(work.spec, settings)
        if where == "spawn" and not self._fleet.backoff(key).wait_s:
            try:
                self._fleet.start(key, work.spec, settings)
                work.progress("starting")
            except (OSError, ConfigError) as error:
                self.start_failed(key, str(error), settings)
        return False

    def _give(self, worker: WorkerProcess, work: Work, settings: Settings) -> None:
        try:
            evicted = choose_evictions(work, worker, self.sizes, self._pinned, settings)
        except OutOfMemory as error:
            work.fail(error)
            return
        self._jobs += 1
        self._events.waits.add(self._queue.served(work))
        self._fleet.evicted(worker, evicted)
        worker.give(work, self._jobs, evicted)
        work.deadline = None  # the deadline is for the first start: a retry may be later


def find_worker(
    work: Work,
    line: Line,
    workers: list[WorkerProcess],
    settings: Settings,
    free_vram: FreeVram,
) -> WorkerProcess | Literal["spawn", "wait"]:
    """Return the worker for a piece of work, or whether another worker is to start or the work must wait.

    Args:
        line: all waiting work of the same model.
        free_vram: called only before another worker is started.
    """
    key, spec = launch.worker_key(work.spec, settings), work.spec
    candidates = [_candidate(worker, key, spec) for worker in workers]
    most = settings.max_clip_workers if spec.kind == ModelKind.CLIP else settings.max_vae_workers
    limits = policy.Limits(most, settings.queue_threshold, settings.scale_up_delay_sec)
    where = policy.route(
        spec.key, spec.kind, line.waited_s, line.length, candidates, limits,
        lambda: _has_room(work, key, workers, settings, free_vram),
    )  # fmt: skip
    return workers[where] if isinstance(where, int) else where


def _candidate(worker: WorkerProcess, key: WorkerKey, spec: LoadSpec) -> policy.Candidate:
    takes = worker.key == key and launch.fits(spec, worker.versions)
    return policy.Candidate(takes, worker.is_free, worker.used, worker.kinds.values())


def _has_room(
    work: Work,
    key: WorkerKey,
    workers: list[WorkerProcess],
    settings: Settings,
    free_vram: FreeVram,
) -> bool:
    # A running worker of this key has replaced "auto" by the device that it chose.
    device = next((worker.device for worker in workers if worker.key == key), work.spec.device)
    used = [worker.threads for worker in workers if worker.device == "cpu"]
    free = free_vram(device)
    if free is not None:
        free -= int(settings.vram_safety_margin_gb * (1 << 30))
    threads = launch.threads_of(key, device, settings)
    return policy.has_room(device, launch.CORES, used, threads, free, work.load_bytes)


def choose_evictions(
    work: Work, worker: WorkerProcess, sizes: Mapping[str, int], pinned: Iterable[str], settings: Settings
) -> list[str]:
    """Return the keys of the models that ``worker`` must unload before it loads those of ``work``.

    Args:
        sizes: bytes of models that have been loaded before, by key.

    Raises:
        OutOfMemory: the models do not fit into the budget beside the pinned ones.
    """
    need = sum(_size(work, spec, sizes) for key, spec in work.models.items() if key not in worker.models)
    if not need:
        return []
    held = {key: (worker.used.get(key, 0.0), nbytes) for key, nbytes in worker.models.items()}
    budget = int(settings.model_memory_gb * (1 << 30))
    evicted = policy.choose_evictions(held, {*pinned, *work.models}, need, budget)
    if evicted is None:
        raise OutOfMemory(
            f"the model needs {need >> 20} MB, the budget is "
            f"{settings.model_memory_gb:g} GB and pinned models hold the rest",
            "Raise model_memory_gb or unpin a model",
        )
    return evicted


def _size(work: Work, spec: LoadSpec, sizes: Mapping[str, int]) -> int:
    """Return the bytes that loading a model takes: as the last time, else about those of its files."""
    if spec.key in sizes:
        return sizes[spec.key]
    if spec.key == work.spec.key:
        return work.load_bytes
    try:
        return load_bytes(spec)
    except OSError:  # a file has been deleted: the worker will report that
        return 0
