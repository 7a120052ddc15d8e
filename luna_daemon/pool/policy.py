"""The pool's decisions as pure functions: which work next, which worker, when to scale, what to evict.

Given plain facts, they answer; all input and output is elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pending:
    """A waiting piece of work, as far as its order matters."""

    priority: int
    client: int
    waited_s: float


@dataclass
class Facts:
    """A worker, as far as routing matters."""

    key: str
    """Backend and device: work goes only to workers of its own key."""
    ready: bool
    """Has imported its backend and computes nothing now."""
    models: Mapping[str, float] = field(default_factory=dict)
    """Loaded or loading models, with the time of their last use."""
    kinds: frozenset[str] = frozenset()
    """Kinds of the loaded models."""


@dataclass(frozen=True)
class Limits:
    """Scaling settings of one kind of work."""

    most: int
    queue_threshold: int
    delay_s: float


def fair_order(
    pending: Sequence[Pending], running: Mapping[int, int], served: Mapping[int, float] | None = None
) -> list[int]:
    """Indices of ``pending`` in the order to serve them.

    By priority; within it clients take turns (a client's second request comes after everybody's first, and what it
    has running counts); among those in the same turn first whoever was served longest ago; then by arrival.

    Args:
        running: requests per client that are being computed.
        served: when each client was last given a worker.
    """
    turns: Counter[tuple[int, int]] = Counter()
    keys = []
    for index, item in enumerate(pending):
        turn = turns[item.priority, item.client] + running.get(item.client, 0)
        turns[item.priority, item.client] += 1
        keys.append((item.priority, turn, (served or {}).get(item.client, 0.0), index))
    return [index for *_, index in sorted(keys)]


def displaced(waiting: Sequence[int], newcomer: int) -> int | None:
    """Who leaves a full queue for a newcomer: an index of ``waiting``, or ``None`` if the newcomer must come back.

    The last request of whoever has most in the queue, if that is more than the newcomer would have: a client with a
    thousand requests fills the queue, and another's single one is not refused for it.

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
    key: str,
    model: str,
    kind: str,
    waited_s: float,
    queued: int,
    workers: Sequence[Facts],
    limits: Limits,
    has_room: Callable[[], bool],
) -> int | str:
    """Where a piece of work goes: a worker's index, ``"spawn"`` or ``"wait"``.

    A worker that has the model is best. Nobody has it: any free one loads it, so one worker serves VAE and CLIP. All
    that have it are busy: another copy only after a queue has lasted, and if there is room.

    Args:
        has_room: asked only when a worker would be started, since finding out is slow.
    """
    ours = [index for index, worker in enumerate(workers) if worker.key == key]
    holders = [index for index in ours if model in workers[index].models]
    free = [index for index in ours if workers[index].ready]
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
    starting = any(not worker.ready and not worker.models for worker in (workers[index] for index in ours))
    return "spawn" if not starting and len(ours) < limits.most and has_room() else "wait"


def has_room(
    device: str, cores: int, threads_used: Iterable[int], threads: int, free_bytes: int | None, need_bytes: int
) -> bool:
    """Whether another worker fits beside those there are.

    On the CPU only idle cores count: more threads than cores make everybody slower. On a GPU, memory.

    Args:
        free_bytes: free memory of the GPU less the safety margin; ``None`` if unknown.
    """
    if device == "cpu":
        return sum(threads_used) + threads <= cores
    return free_bytes is None or need_bytes <= free_bytes


def choose_evictions(
    models: Mapping[str, tuple[float, int]], keep: set[str], need_bytes: int, budget_bytes: int
) -> list[str] | None:
    """Models to unload so that ``need_bytes`` more fit; ``None`` if they never do.

    Args:
        models: per loaded model the time of its last use and its bytes.
        keep: pinned, or in use.
        budget_bytes: most bytes of weights; 0 is no limit.
    """
    if budget_bytes <= 0:
        return []
    held = sum(nbytes for _, nbytes in models.values())
    going: list[str] = []
    for name in sorted(models, key=lambda name: models[name][0]):
        if held + need_bytes <= budget_bytes:
            break
        if name not in keep:
            going.append(name)
            held -= models[name][1]
    return going if held + need_bytes <= budget_bytes else None


def idle_action(idle_s: float, others: int, keep_at_least: int, timeout_s: float, keep_s: float) -> str:
    """What becomes of an idle worker: ``"keep"``, ``"unload"`` (give the models' memory back) or ``"stop"``.

    Args:
        others: other workers of the same key.
        keep_at_least: workers that stay, with their models (``MIN_*_WORKERS``).
    """
    if idle_s < timeout_s or others < keep_at_least:
        return "keep"
    if others > 0 or idle_s >= keep_s:
        return "stop"
    return "unload"
