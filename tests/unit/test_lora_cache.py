"""The LoRA cache's policy: bounds, who goes first, who stays because it is used or pinned, memory counted right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luna_daemon.core import BadRequest, ModelNotFound
from luna_daemon.lora_cache import LoRACache, LoRAEntry
from luna_daemon.wire.messages import FileId, TensorRef
from tests.unit.fakes import Clock, Memory


@pytest.fixture
def memory():
    return Memory()


def put(memory: Memory, name: str, *sizes: int) -> LoRAEntry:
    """A state dict that a client put, with tensors of these sizes."""
    slots = [memory.slot(size) for size in sizes]
    refs = [(f"key{number}", TensorRef("uint8", (size,), size, 7)) for number, size in enumerate(sizes)]
    return LoRAEntry(name, "put", refs, sum(sizes), slots)


def a_file(name: str, nbytes: int = 10, mtime: int = 1) -> LoRAEntry:
    """A file that clients map."""
    return LoRAEntry(name, "file", [], nbytes, source=FileId(f"/loras/{name}", nbytes, mtime, 5))


def kept(cache: LoRACache, names: str) -> str:
    """Which of these names are kept."""
    return "".join(name for name in names if name in cache)


def test_what_was_kept_comes_back(memory):
    """The same entry, counted; the cache holds the only use of its memory."""
    cache = LoRACache(100, 10)
    entry = put(memory, "a", 10, 20)
    assert cache.keep(entry) and cache.get("a") is entry and cache.get("b") is None
    assert (cache.nbytes, memory.live, len(cache), cache.hits, cache.misses) == (30, 2, 1, 1, 1)


@pytest.mark.parametrize(("max_bytes", "max_entries"), [(90, 10), (1000, 3)])
def test_the_least_recently_used_goes(memory, max_bytes, max_entries):
    """By bytes, or by count; looking is no use, and what goes gives its memory back."""
    cache = LoRACache(max_bytes, max_entries)
    for name in "abc":
        cache.keep(put(memory, name, 30))
    cache.get("a")
    cache.look("b")
    assert cache.keep(put(memory, "d", 30))
    assert kept(cache, "abcd") == "acd" and (cache.nbytes, memory.live, cache.evictions) == (90, 3, 1)


def test_one_in_use_stays_and_a_pinned_one_too(memory):
    """Room is made from the others, however long ago these were used."""
    cache = LoRACache(100, 3)
    for name in "abc":
        cache.keep(put(memory, name, 30))
    use = cache.entries()[0].hold(client=1)
    cache.pinned.add("b")
    assert cache.keep(put(memory, "d", 30)) and kept(cache, "abcd") == "abd"
    use.release()
    assert cache.keep(put(memory, "e", 30)) and kept(cache, "abde") == "bde"


def test_with_all_in_use_a_further_one_is_not_kept(memory):
    """It stays the caller's, and nobody was pushed out in vain."""
    cache = LoRACache(100, 10)
    cache.keep(put(memory, "free", 40))
    cache.keep(put(memory, "used", 60))
    cache.entries()[1].hold(client=1)
    extra = put(memory, "extra", 50)
    assert not cache.keep(extra) and kept(cache, ["free", "used"]) == "freeused" and memory.live == 3
    extra.drop()
    assert memory.live == 2


@pytest.mark.parametrize(("max_bytes", "max_entries"), [(29, 10), (100, 0), (0, 10)])
def test_larger_than_the_cache_is_not_kept(memory, max_bytes, max_entries):
    """Nor anything at all in a cache of nothing."""
    cache = LoRACache(max_bytes, max_entries)
    assert not cache.keep(put(memory, "a", 30)) and cache.nbytes == 0 and len(cache) == 0


def test_a_file_that_changed_is_another(memory):
    """The old one is dropped when the new one is asked for; a file that did not change is a hit."""
    cache = LoRACache(100, 10)
    old, new = a_file("a", mtime=1), a_file("a", 20, mtime=2)
    cache.keep(old)
    assert cache.get("a", old.source) is old
    assert cache.get("a", new.source) is None and "a" not in cache and cache.nbytes == 0
    cache.keep(new)
    assert cache.get("a", new.source) is new and cache.stats()["loras"]["a"]["misses"] == 1


def test_the_same_name_is_replaced_without_pushing_others_out(memory):
    """The old one's bytes count as free when its successor comes."""
    cache = LoRACache(100, 2)
    for name, size in (("a", 50), ("b", 50), ("a", 40)):
        assert cache.keep(put(memory, name, size))
    assert kept(cache, "ab") == "ab" and cache.nbytes == 90 and memory.live == 2


def test_memory_goes_with_its_last_user(memory):
    """What is evicted while clients use it lives until the last of them lets go; each lets go once."""
    cache = LoRACache(100, 10)
    entry = put(memory, "a", 10)
    cache.keep(entry)
    first, second, again = entry.hold(1), entry.hold(2), entry.hold(2)
    assert len(entry.clients) == 2
    assert cache.evict("a") and not cache.evict("a") and cache.nbytes == 0 and memory.live == 1
    for use, clients in ((again, 2), (second, 1), (first, 0)):
        assert memory.live == 1
        use.release()
        assert len(entry.clients) == clients
    assert memory.live == 0


def test_pieces_hold_the_memory_until_they_are_sent(memory):
    """Bytes that travel by the socket outlive the entry."""
    cache = LoRACache(100, 10)
    entry = LoRAEntry("a", "arena", [("x", TensorRef("uint8", (4,), 4, 6))], 10, [memory.slot(10)])
    entry.slots[0].view[6:] = b"abcd"
    cache.keep(entry)
    (piece,) = entry.pieces()
    cache.clear()
    assert bytes(piece.slot.view) == b"abcd" and memory.live == 1
    piece.slot.release()
    assert memory.live == 0


def test_evicting_all_leaves_what_is_pinned(memory):
    """Which are gone is told."""
    cache = LoRACache(100, 10)
    for name in "abc":
        cache.keep(put(memory, name, 10))
    cache.pinned.add("b")
    assert [entry.name for entry in cache.evict_all()] == ["a", "c"] and kept(cache, "abc") == "b"


def test_an_unknown_name_suggests_what_is_close():
    """By name or by the file's full path; nothing close: where to look."""
    cache = LoRACache(100, 10)
    cache.keep(a_file("style/ink.safetensors"))
    assert cache.named("/loras/style/ink.safetensors").name == "style/ink.safetensors"
    with pytest.raises(ModelNotFound, match=r"'style/inc'.*style/ink\.safetensors"):
        cache.named("style/inc")
    with pytest.raises(ModelNotFound, match="lora ls"):
        cache.named("zzz")
    with pytest.raises(BadRequest, match="empty"):
        cache.named("")


def test_figures(memory):
    """Totals, and per LoRA; counts of a LoRA outlive its eviction."""
    clock = Clock(5000.0)
    cache = LoRACache(100, 10, clock)
    cache.get("a")
    cache.keep(put(memory, "a", 10))
    clock.now += 7
    cache.get("a")
    cache.entries()[0].hold(3)
    cache.pinned.add("a")
    stats = cache.stats()
    assert stats.pop("loras") == {
        "a": {
            "kind": "put", "bytes": 10, "tensors": 1, "hits": 1, "misses": 1, "load_s": 0.0, "last_used": 5007.0,
            "clients": 1, "pinned": True, "path": None,
        }
    }  # fmt: skip
    assert stats == {
        "entries": 1, "bytes": 10, "max_bytes": 100, "max_entries": 10, "hits": 1, "misses": 1, "evictions": 0,
        "uncached": 0,
    }  # fmt: skip
    cache.evict("a")
    cache.get("a")
    cache.keep(put(memory, "a", 10))
    assert cache.stats()["loras"]["a"]["misses"] == 2


STEPS = st.lists(
    st.tuples(st.sampled_from(["keep", "get", "hold", "release", "evict", "pin", "unpin"]), st.sampled_from("abcdef"),
              st.integers(1, 60)),
    max_size=60,
)  # fmt: skip


@given(STEPS)
def test_whatever_happens_the_sums_are_right(steps):
    """Bytes and entries stay within bounds and are those of what is kept; used and pinned ones are never pushed out."""
    memory, cache, uses = Memory(), LoRACache(100, 4), []
    for step, name, size in steps:
        staying = {entry.name for entry in cache.entries() if entry.clients or entry.name in cache.pinned}
        if step == "keep":
            entry = put(memory, name, size)
            if not cache.keep(entry):
                entry.drop()
            assert staying <= {entry.name for entry in cache.entries()}
        elif step == "get":
            cache.get(name)
        elif step == "hold" and (found := cache.look(name)) is not None:
            uses.append(found.hold(size))
        elif step == "release" and uses:
            uses.pop(size % len(uses)).release()
        elif step == "evict":
            cache.evict(name)
        elif step == "pin":
            cache.pinned.add(name)
        elif step == "unpin":
            cache.pinned.discard(name)
        assert cache.nbytes == sum(entry.nbytes for entry in cache.entries()) <= 100 and len(cache) <= 4
    for use in uses:
        use.release()
    cache.clear()
    assert memory.live == 0
