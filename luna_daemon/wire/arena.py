"""Shared memory: segments that every process on the host maps, cut into slots by one allocator in the control process.

``Arena`` is the owner's side (the control process), ``ArenaView`` everybody else's. A segment is a file in a
memory-backed folder (a named pagefile section on Windows), reserved in full before it is used: on a full tmpfs a
sparse file would kill a process that writes to it with SIGBUS.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..core import BadRequest, LimitExceeded, logger
from .messages import TensorRef

WINDOWS = sys.platform == "win32"
_ALIGN = 4096
_SEGMENT = 64 << 20
_NONCE = "nonce"


class ArenaUnavailable(Exception):
    """No shared memory can be had; the text says why."""


class _Segment:
    """One mapped file and its free list, sorted by offset."""

    def __init__(self, name: str, size: int, memory: mmap.mmap) -> None:
        self.name = name
        self.size = size
        self.view = memoryview(memory)
        self.free: list[tuple[int, int]] = [(0, size)]
        self.idle_since = time.monotonic()

    def take(self, size: int) -> int | None:
        for index, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        index = bisect.bisect_left(self.free, (offset, 0))
        if index < len(self.free) and self.free[index][0] == offset + size:
            size += self.free.pop(index)[1]
        if index > 0 and sum(self.free[index - 1]) == offset:
            offset, before = self.free[index - 1]
            self.free[index - 1] = (offset, before + size)
        else:
            self.free.insert(index, (offset, size))
        self.idle_since = time.monotonic()

    @property
    def unused(self) -> bool:
        return self.free == [(0, self.size)]


class Slot:
    """A piece of memory with a count of its users; the last ``release`` gives it back.

    A slot without an arena lives on this process' heap and has number 0: it travels inline.
    """

    def __init__(self, number: int, segment: str, offset: int, view: memoryview, free: Callable[[Slot], None]) -> None:
        self.number = number
        self.segment = segment
        self.offset = offset
        self.view = view
        self.users = 1
        self._free = free

    @classmethod
    def on_heap(cls, nbytes: int) -> Slot:
        """Memory of this process alone, for when there is no arena or it is full."""
        return cls(0, "", 0, memoryview(bytearray(nbytes)), lambda slot: None)

    @property
    def nbytes(self) -> int:
        """Size of the memory."""
        return self.view.nbytes

    def part(self, start: int, nbytes: int) -> Slot:
        """A piece of this slot, which it keeps in use until the piece is released."""
        self.retain()
        view = self.view[start : start + nbytes]
        return Slot(self.number, self.segment, self.offset + start, view, lambda _: self.release())

    def retain(self) -> Slot:
        """Add one use; returns the slot."""
        self.users += 1
        return self

    def release(self) -> None:
        """End one use; the last one frees the memory."""
        self.users -= 1
        if self.users == 0:
            self._free(self)


class Leases:
    """The slots that one peer holds, by the numbers it knows them by. All are given back when it goes."""

    def __init__(self) -> None:
        self._held: dict[int, Slot] = {}
        self._next = 1
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def add(self, slot: Slot) -> int:
        """Take over one use of ``slot``; the number that stands for it on this connection."""
        number, self._next = self._next, self._next + 1
        self._held[number] = slot
        self.nbytes += slot.nbytes
        return number

    def lend(self, slot: Slot) -> TensorRef:
        """Hand a use of ``slot`` to the peer: the descriptor that it gets."""
        return TensorRef("uint8", (slot.nbytes,), slot.nbytes, slot.offset, self.add(slot), slot.segment)

    def get(self, number: int) -> Slot:
        """The slot behind a number.

        Raises:
            BadRequest: this peer does not hold it.
        """
        slot = self._held.get(number)
        if slot is None:
            raise BadRequest(f"arena slot {number} is not held by this connection")
        return slot

    def take(self, number: int) -> Slot:
        """The slot, whose use passes to the caller."""
        slot = self.get(number)
        del self._held[number]
        self.nbytes -= slot.nbytes
        return slot

    def release(self, number: int) -> None:
        """The peer is done with it; a number that it does not hold is ignored."""
        if number in self._held:
            self.take(number).release()

    def release_all(self) -> None:
        """End every use."""
        for number in list(self._held):
            self.release(number)


class Arena:
    """The owner's side: makes segments, hands out slots, gives memory back.

    Args:
        folder: taken for this daemon alone; what a dead one left there is removed.
        max_bytes: most bytes of all segments together.

    Raises:
        ArenaUnavailable: the folder cannot be had or has no room.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.nonce = secrets.token_hex(16)
        self._segments: dict[str, _Segment] = {}
        self._sizes: dict[int, int] = {}
        self._next = 1
        self._prepare()

    def _prepare(self) -> None:
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(mode=0o700, parents=True)
            if WINDOWS:
                self._nonce_section = _map_section(f"{self.folder.name}-{_NONCE}", _ALIGN)
                self._nonce_section[: len(self.nonce)] = self.nonce.encode()
            else:
                file = os.open(self.folder / _NONCE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(file, "w") as handle:
                    handle.write(self.nonce)
        except OSError as error:
            raise ArenaUnavailable(f"{self.folder}: {error.strerror or error}") from error

    @property
    def bytes_reserved(self) -> int:
        """Bytes of all segments."""
        # Copied first: ``grow`` asks from another thread.
        return sum(segment.size for segment in list(self._segments.values()))

    @property
    def bytes_used(self) -> int:
        """Bytes of all slots in use."""
        return sum(self._sizes.values())

    def try_allocate(self, nbytes: int) -> Slot | None:
        """A slot from the segments there are; ``None`` if ``grow`` is needed first."""
        size = max(_ALIGN, -(-nbytes // _ALIGN) * _ALIGN)
        for segment in self._segments.values():
            offset = segment.take(size)
            if offset is not None:
                number, self._next = self._next, self._next + 1
                slot = Slot(number, segment.name, offset, segment.view[offset : offset + nbytes], self._give)
                self._sizes[number] = size
                return slot
        return None

    def _give(self, slot: Slot) -> None:
        segment, size = self._segments.get(slot.segment), self._sizes.pop(slot.number)
        if segment is not None:  # None: the arena was closed meanwhile
            segment.give(slot.offset, size)

    def grow(self, nbytes: int) -> tuple[str, int, mmap.mmap]:
        """Reserve a segment that holds ``nbytes``; slow (the pages are made), so call it off the event loop.

        Raises:
            LimitExceeded: the arena's limit, or the folder is full.
        """
        size = max(_SEGMENT, -(-nbytes // _ALIGN) * _ALIGN)
        room = self.max_bytes - self.bytes_reserved
        if size > room:
            size = -(-nbytes // _ALIGN) * _ALIGN
        if size > room:
            raise LimitExceeded(f"shared memory: {nbytes} bytes asked, {max(room, 0)} left of {self.max_bytes}")
        name = f"seg-{size:x}-{secrets.token_hex(8)}"
        try:
            return name, size, _create_segment(self.folder, name, size)
        except OSError as error:
            raise LimitExceeded(f"shared memory in {self.folder}: {error.strerror or error}") from error

    def add(self, name: str, size: int, memory: mmap.mmap) -> None:
        """Take a segment that ``grow`` made into use."""
        self._segments[name] = _Segment(name, size, memory)

    def trim(self, idle_s: float) -> list[str]:
        """Give segments back that nobody has used for ``idle_s`` seconds; their names."""
        now = time.monotonic()
        gone = [s.name for s in self._segments.values() if s.unused and now - s.idle_since >= idle_s]
        for name in gone:
            del self._segments[name]
            _remove_segment(self.folder / name)
        return gone

    def close(self) -> None:
        """Remove everything. Processes that still map a segment keep their pages until they let go."""
        self._segments.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class ArenaView:
    """The side of a client or worker: maps the daemon's segments by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, memoryview] = {}

    def prove(self) -> str:
        """The nonce that lies in the folder: shows that this process sees the daemon's memory.

        Raises:
            ArenaUnavailable: it cannot be read from here.
        """
        try:
            if WINDOWS:
                return bytes(_map_section(f"{self.folder.name}-{_NONCE}", _ALIGN)[:32]).decode()
            return (self.folder / _NONCE).read_text()
        except OSError as error:
            raise ArenaUnavailable(f"{self.folder / _NONCE}: {error.strerror or error}") from error

    def slice(self, segment: str, offset: int, nbytes: int) -> memoryview:
        """The bytes of a slot, writable.

        Raises:
            BadRequest: no such segment, or outside it.
        """
        view = self._maps.get(segment)
        if view is None:
            self._forget_gone()
            view = self._maps[segment] = memoryview(self._map(segment))
        if offset < 0 or nbytes < 0 or offset + nbytes > view.nbytes:
            raise BadRequest(f"bytes {offset}..{offset + nbytes} are outside arena segment {segment!r}")
        return view[offset : offset + nbytes]

    def private(self, segment: str, offset: int, nbytes: int) -> tuple[mmap.mmap, int]:
        """A map of these bytes that is written to without anybody seeing it, and the offset at which it begins.

        Raises:
            BadRequest: no such segment, or outside it.
        """
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        self._check(segment)
        try:
            return _open_privately(self.folder, segment, start, offset + nbytes - start), start
        except (OSError, ValueError) as error:
            raise BadRequest(f"arena segment {segment!r}: {getattr(error, 'strerror', None) or error}") from error

    def _check(self, segment: str) -> None:
        if "/" in segment or "\\" in segment or not segment.startswith("seg-"):
            raise BadRequest(f"{segment!r} is no arena segment")

    def _map(self, segment: str) -> mmap.mmap:
        self._check(segment)
        try:
            return _open_segment(self.folder, segment)
        except (OSError, ValueError) as error:  # ValueError: an empty file, or a NUL in the name
            raise BadRequest(f"arena segment {segment!r}: {getattr(error, 'strerror', None) or error}") from error

    def _forget_gone(self) -> None:
        """Drop maps of segments that the daemon has given back, so that their address space is not kept."""
        if not WINDOWS:
            for name in [name for name in self._maps if not (self.folder / name).exists()]:
                del self._maps[name]


def _map_section(name: str, size: int) -> mmap.mmap:
    if sys.platform != "win32":
        raise OSError("named sections exist on Windows only")
    return mmap.mmap(-1, size, tagname=f"Local\\{name}")


def _create_segment(folder: Path, name: str, size: int) -> mmap.mmap:
    if WINDOWS:
        return _map_section(f"{folder.name}-{name}", size)
    path = folder / name
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if sys.platform == "linux":
            os.posix_fallocate(file, 0, size)
        else:
            os.ftruncate(file, size)
        return mmap.mmap(file, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(file)


def _open_segment(folder: Path, name: str) -> mmap.mmap:
    if WINDOWS:
        # The name carries the size, since Windows cannot be asked how large a section is.
        return _map_section(f"{folder.name}-{name}", int(name.split("-")[1], 16))
    file = os.open(folder / name, os.O_RDWR)
    try:
        return mmap.mmap(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def _open_privately(folder: Path, name: str, start: int, nbytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes, tagname=f"Local\\{folder.name}-{name}", access=mmap.ACCESS_COPY, offset=start)
    file = os.open(folder / name, os.O_RDONLY)
    try:
        return mmap.mmap(file, nbytes, access=mmap.ACCESS_COPY, offset=start)
    finally:
        os.close(file)


def _remove_segment(path: Path) -> None:
    """Give the pages back even if others still map the file: nobody has a slot in it any more."""
    if WINDOWS:
        return
    with contextlib.suppress(OSError):
        os.truncate(path, 0)
        path.unlink()


def process_space() -> str:
    """Name of this process number space, by which containers that share memory are told apart; empty elsewhere."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def default_folder(port: int) -> Path:
    """Folder of the arena of this user's daemon on ``port``.

    Raises:
        ArenaUnavailable: this system has no memory-backed folder.
    """
    if WINDOWS:
        return Path.home() / "AppData" / "Local" / "luna-daemon" / f"arena-{port}"
    if sys.platform == "darwin":
        return Path("/tmp") / f"luna-daemon-{os.getuid()}-{port}"
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        raise ArenaUnavailable("/dev/shm does not exist or cannot be written")
    return shm / f"luna-daemon-{os.getuid()}-{port}"


def open_arena(folder: Path | None, port: int, max_bytes: int) -> Arena:
    """Make the arena: in ``folder``, or where this system keeps memory-backed files.

    Args:
        max_bytes: 0 is half of what the folder has free.

    Raises:
        ArenaUnavailable: says why.
    """
    place = (folder / f"luna-daemon-{port}") if folder else default_folder(port)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not WINDOWS and (place.is_symlink() or place.stat().st_uid != os.getuid()):
            raise ArenaUnavailable(f"{place} belongs to another user")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
    except OSError as error:
        raise ArenaUnavailable(f"{place.parent}: {error.strerror or error}") from error
    limit = max_bytes or free // 2
    if limit < _SEGMENT or free < 2 * _SEGMENT:
        raise ArenaUnavailable(f"{place.parent} has {free >> 20} MB free; at least {2 * _SEGMENT >> 20} MB are needed")
    logger.debug("arena in %s, up to %d MB", place, limit >> 20)
    return Arena(place, limit)
