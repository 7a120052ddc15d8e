"""Patch sets of clients: bounded by bytes and count, least recently used out first, memory counted right."""

from __future__ import annotations

import pytest

from luna_daemon.control.patch_sets import PatchEntry, PatchSets
from luna_daemon.core import LimitExceeded
from tests.unit.fakes import Memory


@pytest.fixture
def memory():
    return Memory()


def entry(memory: Memory, *sizes: int) -> PatchEntry:
    """A patch set with tensors of these sizes."""
    return PatchEntry({"packed": len(sizes)}, [memory.piece(size) for size in sizes])


def test_what_was_put_comes_back(memory):
    """The same set; ours is the only use of its memory."""
    sets, patches = PatchSets(100, 10), entry(memory, 10, 20)
    sets.put("a", patches)
    assert sets.get("a") is patches and sets.get("b") is None
    assert (sets.nbytes, memory.live) == (30, 2)


@pytest.mark.parametrize(("max_bytes", "max_entries"), [(90, 10), (1000, 3)])
def test_the_least_recently_used_goes(memory, max_bytes, max_entries):
    """By bytes, or by count; what goes gives its memory back."""
    sets = PatchSets(max_bytes, max_entries)
    for name in "abc":
        sets.put(name, entry(memory, 30))
    sets.get("a")
    sets.put("d", entry(memory, 30))
    assert [sets.get(name) is not None for name in "abcd"] == [True, False, True, True]
    assert (sets.nbytes, memory.live) == (90, 3)


def test_one_that_can_never_fit_is_refused(memory):
    """Nothing is pushed out for it, the old one of its name stays, and its memory is the caller's."""
    sets = PatchSets(50, 10)
    sets.put("a", entry(memory, 50))
    with pytest.raises(LimitExceeded, match="'a'"):
        sets.put("a", entry(memory, 51))
    assert sets.nbytes == 50 and memory.live == 2


def test_the_same_name_is_replaced_and_clearing_frees_all(memory):
    """A set that is put again takes the old one's place."""
    sets = PatchSets(100, 2)
    sets.put("a", entry(memory, 60))
    sets.put("b", entry(memory, 10))
    sets.put("a", entry(memory, 90))
    assert sets.nbytes == 100 and memory.live == 2
    sets.clear()
    assert sets.nbytes == 0 and memory.live == 0
