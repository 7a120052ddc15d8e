"""Shared memory: segments that every process on the host maps, cut into slots by one allocator in the control process.

``Arena`` is the side of the control process, which owns the memory; clients and workers use ``ArenaView``. A segment is
a file in a memory-backed folder (a named pagefile section on Windows), reserved in full before use: on a full tmpfs,
writing to a sparse file would kill the writing process with SIGBUS.
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
    """Shared memory cannot be used; the text says why."""


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
    """A reference-counted piece of memory; the last ``release`` frees the memory.

    A slot without an arena lies on this process' heap, has number 0, and is sent inline.
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
        """A slot on this process' heap, for when there is no arena or the arena is full."""
        return cls(0, "", 0, memoryview(bytearray(nbytes)), lambda slot: None)

    @property
    def nbytes(self) -> int:
        """Size of the slot in bytes."""
        return self.view.nbytes

    def part(self, start: int, nbytes: int) -> Slot:
        """A slot over a part of this slot, which stays in use until that part is released."""
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
    """The slots that a peer holds, by their numbers on its connection; ``release_all`` when the peer disconnects."""

    def __init__(self) -> None:
        self._held: dict[int, Slot] = {}
        self._next = 1
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def add(self, slot: Slot) -> int:
        """Take over a use of ``slot``; returns the slot's number on this connection."""
        number, self._next = self._next, self._next + 1
        self._held[number] = slot
        self.nbytes += slot.nbytes
        return number

    def lend(self, slot: Slot) -> TensorRef:
        """Pass a use of ``slot`` to the peer; returns the descriptor to send."""
        return TensorRef("uint8", (slot.nbytes,), slot.nbytes, slot.offset, self.add(slot), slot.segment)

    def get(self, number: int) -> Slot:
        """The slot with this number.

        Raises:
            BadRequest: this peer does not hold the slot.
        """
        slot = self._held.get(number)
        if slot is None:
            raise BadRequest(f"arena slot {number} is not held by this connection")
        return slot

    def take(self, number: int) -> Slot:
        """Remove a slot from the leases; its use passes to the caller.

        Raises:
            BadRequest: this peer does not hold the slot.
        """
        slot = self.get(number)
        del self._held[number]
        self.nbytes -= slot.nbytes
        return slot

    def release(self, number: int) -> None:
        """End the peer's use of a slot; a number that the peer does not hold is ignored."""
        if number in self._held:
            self.take(number).release()

    def release_all(self) -> None:
        """End the peer's use of every slot."""
        for number in list(self._held):
            self.release(number)


class Arena:
    """The control process' side of shared memory: creates segments, allocates slots, returns unused segments.

    Args:
        folder: used by this daemon alone; files that a dead daemon left there are removed.
        max_bytes: most bytes of all segments together.

    Raises:
        ArenaUnavailable: the folder cannot be created or is full.
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
        # Copied first: ``grow`` reads this from another thread.
        return sum(segment.size for segment in list(self._segments.values()))

    @property
    def bytes_used(self) -> int:
        """Bytes of all slots in use."""
        return sum(self._sizes.values())

    def try_allocate(self, nbytes: int) -> Slot | None:
        """A slot from the existing segments; ``None`` if ``grow`` is needed first."""
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
        """Reserve a segment of at least ``nbytes``; slow (every page is allocated), so call this off the event loop.

        Raises:
            LimitExceeded: the arena's limit is reached, or the folder is full.
        """
        size = max(_SEGMENT, -(-nbytes // _ALIGN) * _ALIGN)
        room = self.max_bytes - self.bytes_reserved
        if size > room:
            size = -(-nbytes // _ALIGN) * _ALIGN
        if size > room:
            raise LimitExceeded(f"shared memory: {nbytes} bytes requested, {max(room, 0)} of {self.max_bytes} left")
        name = f"seg-{size:x}-{secrets.token_hex(8)}"
        try:
            return name, size, _create_segment(self.folder, name, size)
        except OSError as error:
            raise LimitExceeded(f"shared memory in {self.folder}: {error.strerror or error}") from error

    def add(self, name: str, size: int, memory: mmap.mmap) -> None:
        """Start to use a segment that ``grow`` reserved."""
        self._segments[name] = _Segment(name, size, memory)

    def trim(self, idle_s: float) -> list[str]:
        """Remove segments that have been unused for ``idle_s`` seconds; returns their names."""
        now = time.monotonic()
        idle = [s.name for s in self._segments.values() if s.unused and now - s.idle_since >= idle_s]
        for name in idle:
            del self._segments[name]
            _remove_segment(self.folder / name)
        return idle

    def close(self) -> None:
        """Remove all segments and the folder. Other processes keep the pages until they unmap the segment."""
        self._segments.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class ArenaView:
    """The side of a client or worker: maps the daemon's segments by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, memoryview] = {}

    def prove(self) -> str:
        """The nonce in the arena folder: shows that this process sees the daemon's memory.

        Raises:
            ArenaUnavailable: the nonce cannot be read from this process.
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
            BadRequest: the segment does not exist, or the bytes are outside the segment.
        """
        view = self._maps.get(segment)
        if view is None:
            self._forget_gone()
            view = self._maps[segment] = memoryview(self._map(segment))
        if offset < 0 or nbytes < 0 or offset + nbytes > view.nbytes:
            raise BadRequest(f"bytes {offset}..{offset + nbytes} are outside arena segment {segment!r}")
        return view[offset : offset + nbytes]

    def private(self, segment: str, offset: int, nbytes: int) -> tuple[mmap.mmap, int]:
        """A copy-on-write map of these bytes, and the offset in the segment at which the map begins.

        Raises:
            BadRequest: the segment does not exist, or the bytes are outside the segment.
        """
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        self._check(segment)
        try:
            return _open_privately(self.folder, segment, start, offset + nbytes - start), start
        except (OSError, ValueError) as error:
            raise BadRequest(f"arena segment {segment!r}: {getattr(error, 'strerror', None) or error}") from error

    def _check(self, segment: str) -> None:
        if "/" in segment or "\\" in segment or not segment.startswith("seg-"):
            raise BadRequest(f"{segment!r} is not an arena segment")

    def _map(self, segment: str) -> mmap.mmap:
        self._check(segment)
        try:
            return _open_segment(self.folder, segment)
        except (OSError, ValueError) as error:  # ValueError: an empty file, or a NUL in the name
            raise BadRequest(f"arena segment {segment!r}: {getattr(error, 'strerror', None) or error}") from error

    def _forget_gone(self) -> None:
        """Drop the maps of segments that the daemon has removed, to free their address space."""
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
    """Free the segment's pages even if other processes still map the file: none of its slots is in use."""
    if WINDOWS:
        return
    with contextlib.suppress(OSError):
        os.truncate(path, 0)
        path.unlink()


def process_space() -> str:
    """Name of this process' PID namespace, to tell containers that share memory apart; empty without namespaces."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def default_folder(port: int) -> Path:
    """Default arena folder of this user's daemon on ``port``.

    Raises:
        ArenaUnavailable: this system has no memory-backed folder.
    """
    if WINDOWS:
        return Path.home() / "AppData" / "Local" / "luna-daemon" / f"arena-{port}"
    if sys.platform == "darwin":
        return Path("/tmp") / f"luna-daemon-{os.getuid()}-{port}"
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        raise ArenaUnavailable("/dev/shm does not exist or is not writable")
    return shm / f"luna-daemon-{os.getuid()}-{port}"


def open_arena(folder: Path | None, port: int, max_bytes: int) -> Arena:
    """Create the arena below ``folder``, or in this system's default folder (``default_folder``).

    Args:
        max_bytes: most bytes of all segments together; 0 is half of the folder's free space.

    Raises:
        ArenaUnavailable: the folder belongs to another user, cannot be created, or has too little space.
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
