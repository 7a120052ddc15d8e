"""Kept tensors: bounded by bytes and count, least recently used out first, memory counted right."""

from __future__ import annotations

import pytest

from luna_daemon.control.pieces_cache import PiecesCache
from luna_daemon.pool.work import Outcome
from tests.unit.fakes import Memory


@pytest.fixture
def memory():
    return Memory()


def caching(max_bytes: int, max_entries: int = 100) -> PiecesCache[bytes, Outcome]:
    """A cache of outcomes within these limits."""
    return PiecesCache(max_bytes, max_entries, Outcome.release)


def put(cache: PiecesCache[bytes, Outcome], memory: Memory, key: str, *sizes: int) -> bool:
    """Keep an outcome of these sizes; what is not kept is released, as its owner does. Whether it is kept."""
    outcome = memory.outcome(*sizes)
    kept = cache.put(key.encode(), outcome, sum(sizes))
    if not kept:
        outcome.release()
    return kept


def test_what_was_put_comes_back(memory):
    """The same outcome, whose memory is the cache's."""
    cache = caching(100)
    outcome = memory.outcome(10, 20)
    assert cache.put(b"a", outcome, 30)
    assert cache.get(b"a") is outcome and memory.live == 2 and cache.nbytes == 30


@pytest.mark.parametrize(("max_bytes", "max_entries"), [(100, 100), (90, 100), (1000, 3)])
def test_the_least_recently_used_goes(memory, max_bytes, max_entries):
    """By bytes, or by count: what was asked for lately stays, and what goes gives its memory back."""
    cache = caching(max_bytes, max_entries)
    for key in "abc":
        put(cache, memory, key, 30)
    cache.get(b"a")
    put(cache, memory, "d", 30)
    assert [cache.get(key.encode()) is not None for key in "abcd"] == [True, False, True, True]
    assert (cache.nbytes, memory.live) == (90, 3)


def test_as_many_go_as_needed(memory):
    """A large outcome pushes out several small ones, and exactly fills the cache."""
    cache = caching(100)
    for key in "abcd":
        put(cache, memory, key, 25)
    put(cache, memory, "e", 70)
    assert cache.stats()["entries"] == 2 and cache.nbytes == 95
    put(cache, memory, "f", 100)
    assert cache.stats()["entries"] == 1 and memory.live == 1


def test_too_large_is_not_kept(memory):
    """What would not fit even alone pushes nothing out, not even what it was to replace; it stays its owner's."""
    cache = caching(100)
    put(cache, memory, "a", 50)
    assert not put(cache, memory, "b", 60, 41) and not put(cache, memory, "a", 101)
    assert cache.get(b"a") is not None and cache.get(b"b") is None
    assert memory.live == 1


def test_the_same_key_is_kept_once(memory):
    """What is put again takes the place of the old, whose memory is free, and pushes out no more than it must."""
    cache = caching(100, 2)
    put(cache, memory, "a", 60)
    put(cache, memory, "b", 10)
    put(cache, memory, "a", 90)
    assert cache.nbytes == 100 and memory.live == 2 and b"b" in cache


def test_a_lower_limit_holds_at_once(memory):
    """The least recently used go until the rest fits."""
    cache = caching(100)
    for key in "abc":
        put(cache, memory, key, 30)
    cache.get(b"a")
    cache.resize(60)
    assert (b"a" in cache, b"b" in cache, b"c" in cache) == (True, False, True) and memory.live == 2


def test_zero_keeps_nothing(memory):
    """0 turns the cache off."""
    cache = caching(0)
    put(cache, memory, "a", 1)
    assert cache.get(b"a") is None and memory.live == 0


def test_clearing_gives_everything_back(memory):
    """After ``clear`` no memory is held, and the cache goes on working."""
    cache = caching(100)
    put(cache, memory, "a", 10, 20)
    cache.clear()
    assert cache.nbytes == 0 and memory.live == 0
    put(cache, memory, "b", 10)
    assert cache.get(b"b") is not None


def test_a_reader_keeps_what_is_pushed_out(memory):
    """An outcome that a client is still reading stays in memory though the cache has dropped it."""
    cache = caching(100)
    put(cache, memory, "a", 60)
    slot = cache.get(b"a").pieces[0].slot.retain()
    put(cache, memory, "b", 60)
    assert cache.get(b"a") is None and memory.live == 2
    slot.release()
    assert memory.live == 1


def test_figures(memory):
    """Hits, misses, entries and bytes are counted."""
    cache = caching(100)
    put(cache, memory, "a", 10)
    cache.get(b"a")
    cache.get(b"a")
    cache.get(b"b")
    assert cache.stats() == {"entries": 1, "bytes": 10, "max_bytes": 100, "hits": 2, "misses": 1}
