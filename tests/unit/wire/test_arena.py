"""Shared memory: no two slots overlap, everything comes back, and nobody reaches outside."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from luna_daemon.core import BadRequest, LimitExceeded
from luna_daemon.wire.arena import Arena, ArenaUnavailable, ArenaView, Leases, Slot, default_folder, open_arena
from tests.unit.fakes import Memory

PAGE = 4096
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm and uids")


@pytest.fixture
def arena(tmp_path):
    """An arena of at most sixteen pages with nothing reserved yet."""
    arena = Arena(tmp_path / "arena", 16 * PAGE)
    yield arena
    arena.close()


def grow(arena: Arena, pages: int) -> str:
    """Reserve a segment of exactly so many pages; its name."""
    made = arena.grow(pages * PAGE)
    arena.add(*made)
    return made[0]


# --- slots -------------------------------------------------------------------------------------------------------


def test_a_part_keeps_the_whole_in_use():
    """The memory is free only when the slot and all its parts have been released, in any order."""
    memory = Memory()
    slot = memory.slot(100)
    first, second = slot.part(0, 10), slot.part(50, 50)
    slot.release()
    first.release()
    assert memory.live == 1
    second.release()
    assert memory.freed == [slot]


def test_a_part_shows_its_bytes_and_place():
    """A part is a window: right offset, right size, the same memory."""
    slot = Slot(3, "seg-a", 8192, memoryview(bytearray(b"abcdef")), lambda slot: None)
    part = slot.part(2, 3)
    assert (part.number, part.segment, part.offset, part.nbytes, bytes(part.view)) == (3, "seg-a", 8194, 3, b"cde")
    part.view[:] = b"XYZ"
    assert bytes(slot.view) == b"abXYZf"


def test_a_part_of_a_part():
    """Parts nest: the innermost one alone keeps the memory."""
    memory = Memory()
    slot = memory.slot(100)
    outer = slot.part(10, 50)
    inner = outer.part(5, 5)
    assert inner.offset == 15
    outer.release()
    slot.release()
    assert memory.live == 1
    inner.release()
    assert memory.live == 0


def test_a_part_counts_its_own_users():
    """A part that was retained needs as many releases before it lets the whole go."""
    memory = Memory()
    slot = memory.slot()
    part = slot.part(0, 8).retain()
    slot.release()
    part.release()
    assert memory.live == 1
    part.release()
    assert memory.live == 0


def test_heap_slots_travel_inline():
    """Without an arena a slot has number 0 and is ordinary memory."""
    slot = Slot.on_heap(10)
    assert (slot.number, slot.segment, bytes(slot.view)) == (0, "", bytes(10))
    slot.release()


# --- leases ------------------------------------------------------------------------------------------------------


def test_leases_count_bytes_and_give_back_everything():
    """Bytes held rise and fall with the slots; when the peer goes, all come back."""
    memory, leases = Memory(), Leases()
    numbers = [leases.add(memory.slot(size)) for size in (10, 20, 30)]
    assert (len(leases), leases.nbytes, len(set(numbers))) == (3, 60, 3)
    leases.release(numbers[1])
    assert (len(leases), leases.nbytes, memory.live) == (2, 40, 2)
    leases.release_all()
    assert (len(leases), leases.nbytes, memory.live) == (0, 0, 0)


def test_a_lease_is_released_once():
    """Releasing twice, or a number never given, does nothing."""
    memory, leases = Memory(), Leases()
    slot = memory.slot()
    slot.retain()
    number = leases.add(slot)
    leases.release(number)
    leases.release(number)
    leases.release(999)
    assert slot.users == 1 and leases.nbytes == 0


def test_numbers_of_leases_are_never_used_again():
    """A late release of an old number cannot hit a new slot."""
    memory, leases = Memory(), Leases()
    old = leases.add(memory.slot())
    leases.release(old)
    assert leases.add(memory.slot()) != old


def test_taking_a_lease_passes_its_use_on():
    """``take`` keeps the slot in use and forgets the number; ``get`` keeps both."""
    memory, leases = Memory(), Leases()
    slot = memory.slot(10)
    number = leases.add(slot)
    assert leases.get(number) is slot and leases.nbytes == 10
    assert leases.take(number) is slot and leases.nbytes == 0 and slot.users == 1
    with pytest.raises(BadRequest, match=f"slot {number} is not held"):
        leases.get(number)


def test_a_slot_leased_twice_is_held_twice():
    """Two numbers for one slot are two uses of it."""
    memory, leases = Memory(), Leases()
    slot = memory.slot()
    first, second = leases.add(slot), leases.add(slot.retain())
    leases.release(first)
    assert memory.live == 1
    leases.release(second)
    assert memory.live == 0


# --- the owner's side --------------------------------------------------------------------------------------------


class Allocations(RuleBasedStateMachine):
    """Slots taken and given back in any order, in two segments."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.temporary = tempfile.TemporaryDirectory()
        self.arena = Arena(Path(self.temporary.name) / "arena", 1 << 30)
        for name, pages in (("seg-1", 8), ("seg-2", 5)):
            self.arena.add(name, pages * PAGE, mmap.mmap(-1, pages * PAGE))
        self.live: list[Slot] = []

    @rule(nbytes=st.integers(0, 6 * PAGE))
    def take(self, nbytes):
        slot = self.arena.try_allocate(nbytes)
        if slot is not None:
            assert slot.nbytes == nbytes
            slot.view[:] = bytes([slot.number % 256]) * nbytes
            self.live.append(slot)

    @rule(index=st.integers(0, 20))
    def give(self, index):
        if self.live:
            self.live.pop(index % len(self.live)).release()

    @invariant()
    def nobody_overlaps(self):
        for slot in self.live:
            assert bytes(slot.view) == bytes([slot.number % 256]) * slot.nbytes
        used = sorted((slot.segment, slot.offset, max(1, -(-slot.nbytes // PAGE)) * PAGE) for slot in self.live)
        for (segment, offset, size), following in itertools.pairwise(used):
            assert segment != following[0] or offset + size <= following[1]
        assert self.arena.bytes_used == sum(size for _, _, size in used)

    def teardown(self):
        while self.live:
            self.live.pop(len(self.live) // 2).release()
        assert self.arena.bytes_used == 0
        whole = [self.arena.try_allocate(8 * PAGE), self.arena.try_allocate(5 * PAGE)]
        assert None not in whole, "free blocks were not joined again"
        self.arena.close()
        self.temporary.cleanup()


Allocations.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestAllocations = Allocations.TestCase


def test_free_neighbours_are_joined(arena):
    """Three slots given back in the order that needs joining on both sides make one block again."""
    grow(arena, 3)
    slots = [arena.try_allocate(PAGE) for _ in range(3)]
    assert arena.try_allocate(1) is None
    for index in (0, 2, 1):
        slots[index].release()
    assert arena.try_allocate(3 * PAGE) is not None


def test_slots_are_whole_pages(arena):
    """One byte takes a page, and a page and a byte two: neighbours never share a cache line."""
    grow(arena, 4)
    first, second = arena.try_allocate(1), arena.try_allocate(PAGE + 1)
    assert (first.nbytes, second.nbytes, second.offset, arena.bytes_used) == (1, PAGE + 1, PAGE, 3 * PAGE)


def test_growing_stops_at_the_limit(arena):
    """Segments together never exceed the limit; the refusal says what was asked and what is left."""
    grow(arena, 10)
    with pytest.raises(LimitExceeded, match=f"{7 * PAGE} bytes requested, {6 * PAGE} of {16 * PAGE} left"):
        arena.grow(7 * PAGE)
    grow(arena, 6)
    assert arena.bytes_reserved == 16 * PAGE
    with pytest.raises(LimitExceeded, match=f"{PAGE} bytes requested, 0 of"):
        arena.grow(PAGE)


def test_more_than_the_limit_is_refused_at_once(tmp_path):
    """A request larger than everything is refused before any file is made."""
    arena = Arena(tmp_path / "arena", 16 * PAGE)
    with pytest.raises(LimitExceeded):
        arena.grow(17 * PAGE)
    assert [path.name for path in arena.folder.iterdir()] == ["nonce"]
    arena.close()


@linux_only
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """Where the folder has no room, growing fails cleanly: no half a file, no SIGBUS later."""
    folder = Path("/dev/shm") / f"luna-test-{os.getpid()}-{tmp_path.name}"
    arena = Arena(folder, 1 << 60)
    try:
        with pytest.raises(LimitExceeded, match="shared memory in"):
            arena.grow(1 << 50)
        assert [path.name for path in folder.iterdir()] == ["nonce"]
    finally:
        arena.close()


@linux_only
def test_a_segment_is_reserved_in_full_and_private(arena):
    """Its pages exist before the first write, and only this user may open it."""
    name = grow(arena, 4)
    facts = (arena.folder / name).stat()
    assert facts.st_blocks * 512 >= 4 * PAGE
    assert facts.st_mode & 0o777 == 0o600 and arena.folder.stat().st_mode & 0o777 == 0o700


def test_trim_gives_back_only_what_nobody_uses(arena):
    """A segment with a live slot stays; once that is released and the idle time is over, its file goes."""
    name = grow(arena, 2)
    slot = arena.try_allocate(10)
    assert arena.trim(0) == []
    slot.release()
    assert arena.trim(3600) == [] and (arena.folder / name).exists()
    assert arena.trim(0) == [name] and not (arena.folder / name).exists()
    assert arena.bytes_reserved == 0 and arena.try_allocate(1) is None


def test_after_a_trim_there_is_room_again(arena):
    """What was given back can be reserved again."""
    grow(arena, 16)
    arena.trim(0)
    grow(arena, 16)
    assert arena.try_allocate(16 * PAGE) is not None


def test_what_a_dead_daemon_left_is_swept(tmp_path):
    """A new arena begins with an empty folder and a nonce of its own."""
    folder = tmp_path / "arena"
    old = Arena(folder, 16 * PAGE)
    grow(old, 4)
    new = Arena(folder, 16 * PAGE)
    assert [path.name for path in folder.iterdir()] == ["nonce"]
    assert new.nonce != old.nonce
    new.close()
    assert not folder.exists()


def test_a_slot_may_be_released_after_the_end(tmp_path):
    """A connection that is lost late may give its slots back to an arena that is closed already."""
    arena = Arena(tmp_path / "arena", 16 * PAGE)
    grow(arena, 1)
    slot = arena.try_allocate(10)
    arena.close()
    slot.release()


# --- the other side ----------------------------------------------------------------------------------------------


def test_both_sides_see_the_same_bytes(arena):
    """What the view writes the owner reads, and the other way round."""
    grow(arena, 4)
    slot, view = arena.try_allocate(5), ArenaView(arena.folder)
    theirs = view.slice(slot.segment, slot.offset, 5)
    theirs[:] = b"hello"
    assert bytes(slot.view) == b"hello"
    slot.view[:] = b"HELLO"
    assert bytes(theirs) == b"HELLO"


def test_the_nonce_proves_the_memory(arena, tmp_path):
    """Whoever reads the folder can show the owner's nonce; whoever does not is told what is missing."""
    assert ArenaView(arena.folder).prove() == arena.nonce
    with pytest.raises(ArenaUnavailable, match="elsewhere"):
        ArenaView(tmp_path / "elsewhere").prove()


@pytest.mark.parametrize("offset, nbytes", [(-1, 4), (0, -1), (0, 16 * PAGE + 1), (16 * PAGE, 1), (1 << 62, 1 << 62)])
def test_nothing_outside_a_segment_is_mapped(arena, offset, nbytes):
    """Negative, one past the end, gigantic: refused, never a wrapped slice."""
    name = grow(arena, 16)
    with pytest.raises(BadRequest, match="outside arena segment"):
        ArenaView(arena.folder).slice(name, offset, nbytes)


def test_the_edges_of_a_segment_can_be_mapped(arena):
    """Its first and last byte, all of it, and nothing at its end are inside."""
    name = grow(arena, 16)
    view = ArenaView(arena.folder)
    sizes = [view.slice(name, *edge).nbytes for edge in [(0, 1), (16 * PAGE - 1, 1), (0, 16 * PAGE), (16 * PAGE, 0)]]
    assert sizes == [1, 1, 16 * PAGE, 0]


@pytest.mark.parametrize(
    "name", ["..", "../secret", "seg-/../../secret", "/etc/passwd", "seg-\\x", "nonce", "secret", "", "seg-", "seg-1"]
)
def test_a_name_never_leaves_the_folder(arena, tmp_path, name):
    """Only segments can be mapped: no other file, no path, and none that does not exist."""
    for place in (tmp_path / "secret", arena.folder / "secret"):
        place.write_bytes(bytes(PAGE))
    with pytest.raises(BadRequest):
        ArenaView(arena.folder).slice(name, 0, 1)


@pytest.mark.parametrize("name", ["seg-\0", "seg-empty"])
def test_an_impossible_segment_is_a_typed_error(arena, name):
    """A NUL in the name, or a file that was emptied a moment ago, is refused like any other."""
    (arena.folder / "seg-empty").touch()
    with pytest.raises(BadRequest):
        ArenaView(arena.folder).slice(name, 0, 0)


def test_mapped_memory_outlives_the_owner(tmp_path):
    """A tensor over a slot stays readable after the daemon has removed everything."""
    arena = Arena(tmp_path / "arena", 16 * PAGE)
    grow(arena, 1)
    slot = arena.try_allocate(5)
    slot.view[:] = b"hello"
    view = ArenaView(arena.folder)
    mine = view.slice(slot.segment, slot.offset, 5)
    arena.close()
    gc.collect()
    assert bytes(mine) == b"hello"


def test_a_view_forgets_segments_that_are_gone(arena):
    """After a trim and a new segment, the old one is no longer mapped: its pages would be lost ones."""
    view = ArenaView(arena.folder)
    old = grow(arena, 16)
    view.slice(old, 0, 1)
    arena.trim(0)
    new = grow(arena, 16)
    view.slice(new, 0, 1)
    with pytest.raises(BadRequest, match="No such file"):
        view.slice(old, 0, 1)


# --- where it lies -----------------------------------------------------------------------------------------------


@linux_only
def test_the_default_folder_is_one_per_user_and_port(monkeypatch):
    """It names uid and port, and a system without a writable /dev/shm has none."""
    assert default_folder(5) == Path(f"/dev/shm/luna-daemon-{os.getuid()}-5")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ArenaUnavailable, match="/dev/shm"):
        default_folder(5)


@linux_only
def test_open_makes_a_folder_below_the_one_given(tmp_path):
    """``arena_dir`` is made if need be and keeps its other content."""
    arena = open_arena(tmp_path / "new" / "dir", 5, 1 << 30)
    assert arena.folder == tmp_path / "new" / "dir" / "luna-daemon-5" and arena.max_bytes == 1 << 30
    arena.close()
    assert (tmp_path / "new" / "dir").is_dir()


@linux_only
def test_half_of_the_free_room_is_the_default(tmp_path):
    """Without a limit the arena takes at most half of what is free."""
    import shutil

    arena = open_arena(tmp_path, 5, 0)
    assert 0 < arena.max_bytes <= shutil.disk_usage(tmp_path).free * 0.6
    arena.close()


def test_too_small_a_limit_is_refused(tmp_path):
    """Less than one segment is no use: the daemon says so and uses TCP."""
    with pytest.raises(ArenaUnavailable, match="needed"):
        open_arena(tmp_path, 5, 1 << 20)


@linux_only
def test_a_link_is_not_followed(tmp_path):
    """A folder that is a link could lie anywhere: refused, and its target keeps its files."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").touch()
    (tmp_path / "luna-daemon-5").symlink_to(tmp_path / "target")
    with pytest.raises(ArenaUnavailable, match="another user"):
        open_arena(tmp_path, 5, 1 << 30)
    assert (tmp_path / "target" / "precious").exists()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_another_users_folder_is_refused(tmp_path):
    """Whoever made the folder first could read and change every tensor."""
    (tmp_path / "luna-daemon-5").mkdir()
    os.chown(tmp_path / "luna-daemon-5", 12345, 12345)
    with pytest.raises(ArenaUnavailable, match="another user"):
        open_arena(tmp_path, 5, 1 << 30)


@linux_only
def test_a_file_in_the_way_is_refused(tmp_path):
    """``arena_dir`` that is a file means no shared memory, not a crash."""
    (tmp_path / "file").touch()
    with pytest.raises(ArenaUnavailable):
        open_arena(tmp_path / "file", 5, 1 << 30)
