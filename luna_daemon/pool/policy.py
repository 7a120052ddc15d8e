"""The pool's decisions as pure functions: which work next, which worker, when to scale, what to evict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass
class Candidate:
    """A worker, as far as routing matters."""

    takes: bool
    """Runs what the work needs: backend, device, ComfyUI and versions."""
    free: bool
    """Has imported its backend and computes nothing now."""
    models: Collection[str] = ()
    """Loaded or loading models."""
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

    By priority; within a priority clients take turns (a client's second request comes after everybody's first, and
    requests of the client that run count); in the same turn by the time since the client was served; then by arrival.

    Args:
        pending: priority and client of each waiting piece of work.
        running: requests per client that are being computed.
        served: when each client was last given a worker.
    """
    turns: Counter[tuple[int, int]] = Counter()
    keys = []
    for index, (priority, client) in enumerate(pending):
        turn = turns[priority, client] + running.get(client, 0)
        turns[priority, client] += 1
        keys.append((priority, turn, (served or {}).get(client, 0.0), index))
    return [index for *_, index in sorted(keys)]


def displaced(waiting: Sequence[int], newcomer: int) -> int | None:
    """Return the index of the request that leaves a full queue for a newcomer, or ``None`` if the newcomer must wait.

    The last request of the client with most in the queue, if that is more than the newcomer would have: a client with
    a thousand requests fills the queue, and another's single one is not refused for it.

    Args:
        waiting: the client of each request in the queue.
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

    A worker that has the model is best. If none has it, any free one loads it, so one worker serves VAE and CLIP. If
    all that have it are busy, another copy is made only after a queue has lasted, and if there is room.

    Args:
        waited_s: how long the oldest request for the model has waited.
        queued: waiting requests for the model.
        has_room: asked only when a worker would be started, since finding out is slow.
    """
    ours = [index for index, worker in enumerate(workers) if worker.takes]
    holders = [index for index in ours if model in workers[index].models]
    free = [index for index in ours if workers[index].free]
    for index in free:
        if index in holders:
            return index
    if not ours:
        return "spawn"
    if not holders and free:
        return min(free, key=lambda index: len(workers[index].models))
    of_kind = sum(kind in workers[index].kinds for index in ours)
    overdue = waited_s >= limits.delay_s and queued >= limits.queue_threshold
    if not overdue or (holders and of_kind >= limits.most):
        return "wait"
    if free:
        return min(free, key=lambda index: len(workers[index].models))
    starting = any(not worker.free and not worker.models for worker in (workers[index] for index in ours))
    return "spawn" if not starting and len(ours) < limits.most and has_room() else "wait"


def has_room(
    device: str, cores: int, threads_used: Iterable[int], threads: int, free_bytes: int | None, need_bytes: int
) -> bool:
    """Return whether another worker fits beside those that run.

    On the CPU only idle cores count: more threads than cores make all workers slower. On a GPU only memory counts.

    Args:
        threads_used: threads of each worker on the CPU.
        threads: threads of the other worker.
        free_bytes: free memory of the GPU less the safety margin; ``None`` if unknown.
    """
    if device == "cpu":
        return sum(threads_used) + threads <= cores
    return free_bytes is None or need_bytes <= free_bytes


def choose_evictions(
    models: Mapping[str, tuple[float, int]], keep: set[str], need_bytes: int, budget_bytes: int
) -> list[str] | None:
    """Return the models to unload so that ``need_bytes`` more fit, oldest use first; ``None`` if they never do.

    Args:
        models: per loaded model the time of its last use and its bytes.
        keep: pinned, or in use.
        budget_bytes: most bytes of weights; 0 is no limit.
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
    """Return what becomes of an idle worker: ``"keep"``, ``"unload"`` (give the models' memory back) or ``"stop"``.

    Args:
        others: other workers of the same key.
        keep_at_least: workers that stay, with their models (``MIN_*_WORKERS``).
        pinned: the worker holds a pinned model, so it never stops.
    """
    if idle_s < timeout_s or others < keep_at_least:
        return "keep"
    return "stop" if (others > 0 or idle_s >= keep_s) and not pinned else "unload"
