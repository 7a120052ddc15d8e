"""LoRA state dicts in RAM: bounded by bytes and count, least recently used out first, memory counted right."""

from __future__ import annotations

import pytest

from luna_daemon.core import LimitExceeded
from luna_daemon.lora_cache import LoRACache, LoRAEntry
from tests.unit.fakes import Memory


@pytest.fixture
def memory():
    return Memory()


def entry(memory: Memory, *sizes: int) -> LoRAEntry:
    """A state dict with tensors of these sizes."""
    return LoRAEntry([f"key{number}" for number in range(len(sizes))], [memory.piece(size) for size in sizes])


def test_what_was_put_comes_back(memory):
    """The same keys and memory; the cache holds the only use."""
    cache = LoRACache(100, 10)
    lora = entry(memory, 10, 20)
    cache.put("a", lora)
    assert cache.get("a") is lora and "a" in cache and "b" not in cache
    assert (cache.nbytes, lora.nbytes, memory.live) == (30, 30, 2)


def test_the_least_recently_used_goes_by_bytes(memory):
    """What was asked for lately stays, and what goes gives its memory back."""
    cache = LoRACache(100, 10)
    for name in "abc":
        cache.put(name, entry(memory, 30))
    cache.get("a")
    cache.put("d", entry(memory, 30))
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    assert (cache.nbytes, memory.live) == (90, 3)


def test_the_least_recently_used_goes_by_count(memory):
    """The number of entries is bounded too, however small they are."""
    cache = LoRACache(1000, 2)
    for name in "abc":
        cache.put(name, entry(memory, 1))
    assert [name in cache for name in "abc"] == [False, True, True] and memory.live == 2


def test_looking_does_not_refresh(memory):
    """Only ``get`` counts as a use: a check before an upload keeps nothing alive."""
    cache = LoRACache(1000, 2)
    cache.put("a", entry(memory, 1))
    cache.put("b", entry(memory, 1))
    assert "a" in cache
    cache.put("c", entry(memory, 1))
    assert "a" not in cache


@pytest.mark.parametrize("max_bytes, max_entries", [(29, 10), (100, 0)])
def test_too_large_is_refused_and_stays_the_callers(memory, max_bytes, max_entries):
    """What can never fit is an error that names the LoRA; nothing is pushed out, and the slots are not touched."""
    cache = LoRACache(max_bytes, max_entries)
    lora = entry(memory, 30)
    with pytest.raises(LimitExceeded, match="'big'"):
        cache.put("big", lora)
    assert memory.live == 1 and lora.pieces[0].slot.users == 1 and cache.nbytes == 0


def test_a_refused_lora_leaves_the_old_one(memory):
    """An upload that is too large does not lose the entry of the same name."""
    cache = LoRACache(100, 10)
    cache.put("a", entry(memory, 50))
    with pytest.raises(LimitExceeded):
        cache.put("a", entry(memory, 101))
    assert "a" in cache and cache.nbytes == 50


def test_the_same_name_is_replaced(memory):
    """A second upload takes the first one's place and frees its memory, without pushing others out."""
    cache = LoRACache(100, 10)
    cache.put("a", entry(memory, 60))
    cache.put("b", entry(memory, 10))
    second = entry(memory, 90)
    cache.put("a", second)
    assert cache.get("a") is second and "b" in cache
    assert cache.nbytes == 100 and memory.live == 2


def test_replacing_does_not_evict_without_need(memory):
    """The old entry's bytes count as free when its successor comes."""
    cache = LoRACache(100, 2)
    cache.put("a", entry(memory, 50))
    cache.put("b", entry(memory, 50))
    cache.put("a", entry(memory, 50))
    assert "a" in cache and "b" in cache and cache.nbytes == 100


def test_dropping_says_whether_there_was_one(memory):
    """``drop`` frees the memory once."""
    cache = LoRACache(100, 10)
    cache.put("a", entry(memory, 10))
    assert cache.drop("a") is True and cache.drop("a") is False
    assert cache.nbytes == 0 and memory.live == 0


def test_clearing_gives_everything_back(memory):
    """After ``clear`` no memory is held."""
    cache = LoRACache(100, 10)
    for name in "abc":
        cache.put(name, entry(memory, 10, 5))
    cache.clear()
    assert cache.nbytes == 0 and memory.live == 0 and cache.stats()["entries"] == 0


def test_figures(memory):
    """Totals, and per LoRA its bytes, hits and last use."""
    cache = LoRACache(100, 10)
    cache.put("a", entry(memory, 10))
    before = cache.stats()["loras"]["a"]["last_used"]
    cache.get("a")
    cache.get("nothing")
    stats = cache.stats()
    lora = stats.pop("loras")["a"]
    assert stats == {"entries": 1, "bytes": 10, "max_bytes": 100, "max_entries": 10, "hits": 1, "misses": 1}
    assert (lora["bytes"], lora["hits"]) == (10, 1) and lora["last_used"] >= before
