"""The pool's decisions, from plain facts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luna_daemon.pool.policy import (
    Candidate,
    Limits,
    choose_evictions,
    displaced,
    fair_order,
    has_room,
    idle_action,
    route,
)

# --- order -------------------------------------------------------------------------------------------------------


def order(*pending: tuple[int, int], running: dict[int, int] | None = None) -> list[int]:
    """``fair_order`` of ``(priority, client)`` pairs in the order of their arrival."""
    return fair_order(pending, running or {})


def test_first_come_first_served():
    """Equal in everything else, arrival decides."""
    assert order((1, 1), (1, 2), (1, 3)) == [0, 1, 2]


def test_priority_beats_arrival():
    """Interactive work overtakes batch work that came earlier."""
    assert order((2, 1), (1, 2), (0, 3)) == [2, 1, 0]


def test_clients_take_turns():
    """A client with many requests does not hold up one with a single request."""
    assert order((1, 1), (1, 1), (1, 1), (1, 2)) == [0, 3, 1, 2]


def test_what_runs_counts_as_a_turn():
    """A client whose request is being computed waits behind one that has none."""
    assert order((1, 1), (1, 2), running={1: 1}) == [1, 0]
    assert order((1, 1), (1, 1), (1, 2), (1, 2), running={1: 1}) == [2, 0, 3, 1]


def test_turns_are_counted_within_a_priority():
    """A client's batch work does not cost it its turn among interactive work."""
    assert order((2, 1), (0, 1), (0, 2)) == [1, 2, 0]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=20),
    st.dictionaries(st.integers(1, 4), st.integers(0, 3)),
)
def test_nothing_is_lost_and_priorities_hold(pending, running):
    """The order names every request once, and never puts a lower priority before a higher one."""
    result = order(*pending, running=running)
    assert sorted(result) == list(range(len(pending)))
    priorities = [pending[index][0] for index in result]
    assert priorities == sorted(priorities)


# --- a full queue ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "waiting, newcomer, leaves",
    [
        ([], 1, None),
        ([1, 1, 1], 1, None),
        ([1, 1, 1], 2, 2),
        ([1, 2, 1, 1, 3], 4, 3),
        ([1, 2, 1, 2], 1, None),
        ([1, 1, 2], 2, None),
        ([1, 1, 1, 2], 2, 2),
        ([1, 2, 3], 4, None),
    ],
)
def test_who_leaves_a_full_queue(waiting, newcomer, leaves):
    """The last one of whoever has most, and only if the newcomer has fewer even then."""
    assert displaced(waiting, newcomer) == leaves


@given(st.lists(st.integers(1, 4), max_size=12), st.integers(1, 5))
def test_a_full_queue_becomes_fairer(waiting, newcomer):
    """Whoever leaves has at least as many left as the newcomer then has: they cannot push each other out in turns."""
    index = displaced(waiting, newcomer)
    if index is not None:
        loser = waiting[index]
        after = [*waiting[:index], *waiting[index + 1 :], newcomer]
        assert loser != newcomer and after.count(loser) >= after.count(newcomer)


# --- route -------------------------------------------------------------------------------------------------------

LIMITS = Limits(most=2, queue_threshold=2, delay_s=1.0)


def worker(*models: str, ready: bool = True, takes: bool = True) -> Candidate:
    """A worker that holds these models; their kind is the name's first part."""
    kinds = frozenset(model.partition(":")[0] for model in models)
    return Candidate(takes, ready, models, kinds)


def where(*workers: Candidate, waited: float = 0.0, queued: int = 1, room: bool | None = None, limits: Limits = LIMITS):
    """Where a request for ``vae:a`` goes; ``room=None`` means that nobody may ask."""

    def has_room() -> bool:
        assert room is not None, "asked for room though no worker would be started"
        return room

    return route("vae:a", "vae", waited, queued, workers, limits, has_room)


def test_the_worker_that_has_the_model_is_best():
    """A free worker with the model is taken before an empty one."""
    assert where(worker(), worker("vae:a"), worker("vae:b")) == 1


def test_the_first_worker_is_started_at_once():
    """Without any worker of the key nothing is asked and nothing waited for."""
    assert where() == "spawn"


def test_workers_of_another_key_are_not_used():
    """Another backend or device never gets the work, even if it has the model."""
    assert where(worker("vae:a", takes=False)) == "spawn"


def test_a_free_worker_loads_what_nobody_has():
    """One worker serves VAE and CLIP: the free one with the fewest models loads it."""
    assert where(worker("clip:a", "vae:b"), worker("clip:a")) == 1


def test_a_busy_holder_is_waited_for():
    """Moving a model to another worker costs more than a short wait."""
    assert where(worker("vae:a", ready=False), worker()) == "wait"


@pytest.mark.parametrize("waited, queued", [(0.99, 5), (5.0, 1)])
def test_a_short_queue_starts_nothing(waited, queued):
    """A copy is made only when enough requests have waited long enough: both, not either."""
    assert where(worker("vae:a", ready=False), worker(), waited=waited, queued=queued) == "wait"


def test_a_lasting_queue_makes_a_copy_on_a_free_worker():
    """At both thresholds a free worker loads a second copy."""
    assert where(worker("vae:a", ready=False), worker("clip:a"), waited=1.0, queued=2) == 1


def test_a_lasting_queue_starts_another_worker():
    """With every worker busy another is started, if there is room for it."""
    busy = worker("vae:a", ready=False)
    assert where(busy, waited=1.0, queued=2, room=True) == "spawn"
    assert where(busy, waited=1.0, queued=2, room=False) == "wait"


def test_the_limit_of_workers_holds():
    """With as many workers of this kind as allowed nothing is started, and room is not asked for."""
    busy = worker("vae:a", ready=False)
    assert where(busy, busy, waited=9.0, queued=9) == "wait"
    assert where(busy, waited=9.0, queued=9, limits=Limits(1, 2, 1.0)) == "wait"


def test_the_limit_of_copies_holds_for_free_workers_too():
    """A free worker does not load one copy more than allowed."""
    busy = worker("vae:a", ready=False)
    assert where(busy, busy, worker("clip:a"), waited=9.0, queued=9) == "wait"


def test_a_worker_that_starts_is_waited_for():
    """While one is starting no second one is started for the same queue."""
    starting = worker(ready=False)
    assert where(starting) == "wait"
    assert where(worker("vae:a", ready=False), starting, waited=9.0, queued=9, limits=Limits(5, 2, 1.0)) == "wait"


def test_all_busy_with_other_models():
    """Nobody has the model and nobody is free: wait first, then start another worker."""
    busy = worker("clip:a", ready=False)
    assert where(busy) == "wait"
    assert where(busy, waited=1.0, queued=2, room=True) == "spawn"


# --- room --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used, threads, fits", [([2, 1], 1, True), ([2, 2], 1, False), ([], 4, True), ([], 5, False)])
def test_room_on_the_cpu_is_idle_cores(used, threads, fits):
    """All threads together must not exceed the cores; memory is not asked for."""
    assert has_room("cpu", 4, used, threads, 0, 1 << 40) is fits


@pytest.mark.parametrize("free, fits", [(None, True), (99, False), (100, True), (-5, False)])
def test_room_on_a_gpu_is_memory(free, fits):
    """The model must fit; what is unknown is tried; cores do not matter."""
    assert has_room("cuda:0", 1, [8, 8], 8, free, 100) is fits


# --- evictions ---------------------------------------------------------------------------------------------------

HELD = {"new": (30.0, 10), "old": (10.0, 20), "middle": (20.0, 30)}


@pytest.mark.parametrize(
    "need, keep, going",
    [
        (40, set(), []),
        (41, set(), ["old"]),
        (60, set(), ["old"]),
        (61, set(), ["old", "middle"]),
        (100, set(), ["old", "middle", "new"]),
        (41, {"old"}, ["middle"]),
        (80, {"old"}, ["middle", "new"]),
        (81, {"old"}, None),
        (101, set(), None),
        (50, {"old", "middle", "new"}, None),
    ],
)
def test_the_least_recently_used_goes_first(need, keep, going):
    """Just enough goes, oldest first and never what is pinned; ``None`` where it cannot be enough."""
    assert choose_evictions(HELD, keep, need, 100) == going


def test_no_budget_is_no_limit():
    """With 0 nothing is ever unloaded."""
    assert choose_evictions(HELD, set(), 1 << 60, 0) == []


@given(
    st.dictionaries(st.text(max_size=2), st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=8),
    st.sets(st.text(max_size=2)), st.integers(0, 100), st.integers(1, 200),
)  # fmt: skip
def test_evictions_make_it_fit(models, keep, need, budget):
    """What is chosen is loaded, not pinned, makes room, and each one was needed; else even all would not do."""
    going = choose_evictions(models, keep, need, budget)
    held = sum(nbytes for _, nbytes in models.values())
    if going is None:
        assert held - sum(models[name][1] for name in models if name not in keep) + need > budget
        return
    assert set(going) <= set(models) - keep and len(set(going)) == len(going)
    left = held - sum(models[name][1] for name in going)
    assert left + need <= budget
    assert not going or left + models[going[-1]][1] + need > budget


# --- idleness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "idle, others, least, action",
    [
        (29.9, 0, 0, "keep"),
        (29.9, 3, 0, "keep"),
        (30.0, 0, 0, "unload"),
        (30.0, 1, 0, "stop"),
        (599.9, 0, 0, "unload"),
        (600.0, 0, 0, "stop"),
        (9999.0, 0, 1, "keep"),
        (9999.0, 1, 2, "keep"),
        (30.0, 2, 2, "stop"),
        (30.0, 1, 1, "stop"),
    ],
)
def test_what_becomes_of_an_idle_worker(idle, others, least, action):
    """Extra workers end after the timeout; the last one gives memory back first; ``MIN_*`` workers stay as they are."""
    assert idle_action(idle, others, least, timeout_s=30.0, keep_s=600.0) == action


@pytest.mark.parametrize("idle, others, action", [(29.9, 1, "keep"), (30.0, 1, "unload"), (9999.0, 0, "unload")])
def test_a_worker_with_a_pinned_model_never_stops(idle, others, action):
    """It gives the other models back instead."""
    assert idle_action(idle, others, 0, timeout_s=30.0, keep_s=600.0, pinned=True) == action
