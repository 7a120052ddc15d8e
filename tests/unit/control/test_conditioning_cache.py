"""Answers to repeated prompts: bounded by bytes, least recently used out first, memory counted right."""

from __future__ import annotations

import pytest

from luna_daemon.control.conditioning_cache import ConditioningCache
from tests.unit.fakes import Memory


@pytest.fixture
def memory():
    return Memory()


def put(cache: ConditioningCache, memory: Memory, key: str, *sizes: int) -> None:
    """Keep an outcome of these sizes; the worker's own use of it ends."""
    outcome = memory.outcome(*sizes)
    cache.put(key.encode(), outcome)
    outcome.release()


def test_what_was_put_comes_back(memory):
    """The same outcome, still in memory though the worker has let go of it."""
    cache = ConditioningCache(100)
    outcome = memory.outcome(10, 20)
    cache.put(b"a", outcome)
    outcome.release()
    assert cache.get(b"a") is outcome and memory.live == 2 and cache.nbytes == 30


def test_the_least_recently_used_goes(memory):
    """What was asked for lately stays, and what goes gives its memory back."""
    cache = ConditioningCache(100)
    for key in "abc":
        put(cache, memory, key, 30)
    cache.get(b"a")
    put(cache, memory, "d", 30)
    assert [cache.get(key.encode()) is not None for key in "abcd"] == [True, False, True, True]
    assert (cache.nbytes, memory.live) == (90, 3)


def test_as_many_go_as_needed(memory):
    """A large outcome pushes out several small ones, and exactly fills the cache."""
    cache = ConditioningCache(100)
    for key in "abcd":
        put(cache, memory, key, 25)
    put(cache, memory, "e", 70)
    assert cache.stats()["entries"] == 2 and cache.nbytes == 95
    put(cache, memory, "f", 100)
    assert cache.stats()["entries"] == 1 and memory.live == 1


def test_too_large_is_not_kept(memory):
    """What would not fit even alone pushes nothing out."""
    cache = ConditioningCache(100)
    put(cache, memory, "a", 50)
    put(cache, memory, "b", 60, 41)
    assert cache.get(b"a") is not None and cache.get(b"b") is None
    assert memory.live == 1


def test_the_same_key_is_kept_once(memory):
    """Two workers that computed the same keep one outcome, and the other one's memory is free."""
    cache = ConditioningCache(100)
    put(cache, memory, "a", 10)
    put(cache, memory, "a", 10)
    assert cache.nbytes == 10 and memory.live == 1


def test_zero_keeps_nothing(memory):
    """0 turns the cache off."""
    cache = ConditioningCache(0)
    put(cache, memory, "a", 1)
    assert cache.get(b"a") is None and memory.live == 0


def test_clearing_gives_everything_back(memory):
    """After ``clear`` no memory is held, and the cache goes on working."""
    cache = ConditioningCache(100)
    put(cache, memory, "a", 10, 20)
    cache.clear()
    assert cache.nbytes == 0 and memory.live == 0
    put(cache, memory, "b", 10)
    assert cache.get(b"b") is not None


def test_a_reader_keeps_what_is_pushed_out(memory):
    """An outcome that a client is still reading stays in memory though the cache has dropped it."""
    cache = ConditioningCache(100)
    put(cache, memory, "a", 60)
    slot = cache.get(b"a").pieces[0].slot.retain()
    put(cache, memory, "b", 60)
    assert cache.get(b"a") is None and memory.live == 2
    slot.release()
    assert memory.live == 1


def test_figures(memory):
    """Hits, misses, entries and bytes are counted."""
    cache = ConditioningCache(100)
    put(cache, memory, "a", 10)
    cache.get(b"a")
    cache.get(b"a")
    cache.get(b"b")
    assert cache.stats() == {"entries": 1, "bytes": 10, "max_bytes": 100, "hits": 2, "misses": 1}
