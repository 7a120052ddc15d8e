"""The pool's decisions as pure functions: which work next, which worker, when to scale, what to evict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass
class Candidate:
    """What routing needs to know of a worker."""

    takes: bool
    """Whether the worker has the backend, device, ComfyUI and versions that the work needs."""
    free: bool
    """Whether the worker has imported its backend and computes nothing now."""
    models: Collection[str] = ()
    """Keys of loaded or loading models."""
    kinds: Collection[str] = ()
    """Kinds of these models."""


@dataclass(frozen=True)
class Limits:
    """Scaling settings of one kind of work."""

    most: int
    queue_threshold: int
    delay_s: float


def fair_order(
    pending: Sequence[tuple[int, int]], running: Mapping[int, int], served: Mapping[int, float] | None = None
) -> list[int]:
    """Return the indices of ``pending`` in the order to serve them.

    Sorted by priority; then by turn (a client's second request comes after every client's first; running requests
    count too); then clients served longest ago first; then by arrival.

    Args:
        pending: priority and client of each waiting piece of work.
        running: number of requests that are being computed, per client.
        served: time when each client's work was last sent to a worker.
    """
    turns: Counter[tuple[int, int]] = Counter()
    keys = []
    for index, (priority, client) in enumerate(pending):
        turn = turns[priority, client] + running.get(client, 0)
        turns[priority, client] += 1
        keys.append((priority, turn, (served or {}).get(client, 0.0), index))
    return [index for *_, index in sorted(keys)]


def displaced(waiting: Sequence[int], newcomer: int) -> int | None:
    """Return the index of the request that a full queue drops for a new one; ``None`` to refuse the new one.

    The last request is dropped of the client with most requests in the queue, if those are more than the new request's
    client would have. So a client with a thousand requests cannot shut out a client with a single request.

    Args:
        waiting: the client of each request in the queue.
        newcomer: the client of the new request.
    """
    counts = Counter(waiting)
    if not counts:
        return None
    greediest, most = max(counts.items(), key=lambda item: item[1])
    if most <= counts[newcomer] + 1:
        return None
    return max(index for index, client in enumerate(waiting) if client == greediest)


def route(
    model: str,
    kind: str,
    waited_s: float,
    queued: int,
    workers: Sequence[Candidate],
    limits: Limits,
    has_room: Callable[[], bool],
) -> int | Literal["spawn", "wait"]:
    """Return where a piece of work goes: a worker's index, ``"spawn"`` or ``"wait"``.

    A free worker that has the model comes first. If no worker has the model, any free worker loads it, so one worker
    serves VAE and CLIP. If all workers with the model are busy, another copy is loaded only once the queue has lasted.

    Args:
        waited_s: how long the oldest request for the model has waited.
        queued: waiting requests for the model.
        has_room: whether another worker fits; slow, so called only before a start.
    """
    able = [index for index, worker in enumerate(workers) if worker.takes]
    holders = [index for index in able if model in workers[index].models]
    free = [index for index in able if workers[index].free]
    for index in free:
        if index in holders:
            return index
    if not able:
        return "spawn"
    if not holders and free:
        return min(free, key=lambda index: len(workers[index].models))
    of_kind = sum(kind in workers[index].kinds for index in able)
    overdue = waited_s >= limits.delay_s and queued >= limits.queue_threshold
    if not overdue or (holders and of_kind >= limits.most):
        return "wait"
    if free:
        return min(free, key=lambda index: len(workers[index].models))
    starting = any(not worker.free and not worker.models for worker in (workers[index] for index in able))
    return "spawn" if not starting and len(able) < limits.most and has_room() else "wait"


def has_room(
    device: str, cores: int, threads_used: Iterable[int], threads: int, free_bytes: int | None, need_bytes: int
) -> bool:
    """Return whether another worker fits beside the running workers.

    On the CPU only idle cores count, since more threads than cores slow down all workers. On a GPU only memory counts.

    Args:
        cores: CPU cores of the machine.
        threads_used: threads of each running worker on the CPU.
        threads: threads of the new worker.
        free_bytes: free memory of the GPU minus the safety margin; ``None`` if unknown.
        need_bytes: memory that the new worker needs.
    """
    if device == "cpu":
        return sum(threads_used) + threads <= cores
    return free_bytes is None or need_bytes <= free_bytes


def choose_evictions(
    models: Mapping[str, tuple[float, int]], keep: set[str], need_bytes: int, budget_bytes: int
) -> list[str] | None:
    """Return the models to unload so that ``need_bytes`` more fit, oldest use first; ``None`` if that is impossible.

    Args:
        models: time of the last use and bytes of each loaded model.
        keep: models that are pinned or in use.
        budget_bytes: most bytes of weights; 0 means no limit.
    """
    if budget_bytes <= 0:
        return []
    held = sum(nbytes for _, nbytes in models.values())
    evicted: list[str] = []
    for name in sorted(models, key=lambda name: models[name][0]):
        if held + need_bytes <= budget_bytes:
            break
        if name not in keep:
            evicted.append(name)
            held -= models[name][1]
    return evicted if held + need_bytes <= budget_bytes else None


def idle_action(
    idle_s: float, others: int, keep_at_least: int, timeout_s: float, keep_s: float, pinned: bool = False
) -> Literal["keep", "unload", "stop"]:
    """Return what to do with an idle worker: ``"keep"``, ``"unload"`` its models or ``"stop"``.

    Args:
        others: number of other workers of the same key.
        keep_at_least: number of workers that keep running with their models (``MIN_*_WORKERS``).
        timeout_s: idle time after which models are unloaded.
        keep_s: idle time after which the last worker of a key stops.
        pinned: the worker holds a pinned model, so it never stops.
    """
    if idle_s < timeout_s or others < keep_at_least:
        return "keep"
    return "stop" if (others > 0 or idle_s >= keep_s) and not pinned else "unload"
