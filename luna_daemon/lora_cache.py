"""The cache of LoRAs in RAM, shared by all clients; reads no files."""

from __future__ import annotations

import difflib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .core import BadRequest, ModelNotFound
from .files.safetensors import NamedRef
from .pool.work import Piece
from .wire.arena import Slot
from .wire.messages import FileId

__all__ = ["LoRACache", "LoRAEntry"]

_COUNTED = 1000
"""Limit of names whose hits and misses are counted, evicted LoRAs included."""


@dataclass(eq=False)
class LoRAEntry:
    """A LoRA. Its memory is released when neither the cache nor a client uses the LoRA any more."""

    name: str
    kind: str
    """``file`` (clients map the file), ``arena`` (a copy in the daemon's memory) or ``put`` (a client's state dict)."""
    refs: list[NamedRef]
    """The tensors; offsets count from the start of the file if ``kind`` is ``file``, else of ``slots[0]``."""
    nbytes: int
    slots: list[Slot] = field(default_factory=list)
    """The memory: no slot for ``file``, one for ``arena``, one per tensor for ``put``."""
    source: FileId | None = None
    """The file's identity, which changes with the file."""
    load_s: float = 0.0
    """Seconds that loading took."""
    last_used: float = field(default_factory=time.time, init=False)
    clients: Counter[int] = field(default_factory=Counter, init=False)
    """Number of uses by the number of the client's session."""
    table: Any = field(default=None, init=False)
    """The tensors' positions as ``lora.load`` sends them, packed at the first request."""
    _uses: int = field(default=1, init=False)

    def hold(self, client: int = 0) -> Slot:
        """Use the LoRA until the returned slot is released.

        Args:
            client: number of the session; 0 for the daemon itself.
        """
        self._uses += 1
        if client:
            self.clients[client] += 1
        return Slot(1, "", 0, memoryview(b""), lambda _: self._end_use(client))

    def drop(self) -> None:
        """End the first use, which began with the entry: that of its maker, and then of the cache."""
        self._end_use(0)

    def _end_use(self, client: int) -> None:
        if client:
            self.clients[client] -= 1
            self.clients += Counter()  # removes zeros
        self._uses -= 1
        if self._uses == 0:
            for slot in self.slots:
                slot.release()

    @property
    def mappable(self) -> bool:
        """Whether clients can map the tensors: all are contiguous and in shared memory."""
        return all(slot.number for slot in self.slots) and not any(ref.order for _, ref in self.refs)

    def places(self) -> list[tuple[str, str, Any]]:
        """Key, segment (empty for a file) and descriptor, with its offset in the segment or file, of each tensor."""
        if self.kind == "file":
            return [(key, "", ref) for key, ref in self.refs]
        return [(key, slot.segment, ref.placed(slot.offset + start)) for key, ref, slot, start in self._parts()]

    def pieces(self) -> list[Piece]:
        """The tensors as pieces that the caller must release."""
        return [Piece(ref.placed(0), slot.part(start, ref.nbytes)) for _, ref, slot, start in self._parts()]

    def _parts(self) -> list[tuple[str, Any, Slot, int]]:
        if self.kind == "put":
            return [(key, ref, slot, 0) for (key, ref), slot in zip(self.refs, self.slots)]
        return [(key, ref, self.slots[0], ref.offset) for key, ref in self.refs]


class LoRACache:
    """An LRU cache of LoRAs by name, limited in bytes and in entries.

    An entry that a client uses, or that is pinned, is not evicted. If that leaves no room, a further LoRA is not kept.

    Args:
        max_bytes: limit of the bytes of all entries together.
        max_entries: limit of the number of entries.
        clock: returns seconds since 1970.
    """

    def __init__(self, max_bytes: int, max_entries: int, clock: Callable[[], float] = time.time) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.uncached = 0
        """Number of loads that found no room in the cache; counted by the loader."""
        self.pinned: set[str] = set()
        self._clock = clock
        self._kept: OrderedDict[str, LoRAEntry] = OrderedDict()
        self._counts: OrderedDict[str, Counter[str]] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def entries(self) -> list[LoRAEntry]:
        """All entries, the least recently used first."""
        return list(self._kept.values())

    def look(self, name: str, source: FileId | None = None) -> LoRAEntry | None:
        """The entry of a name, not counted as a hit or a miss; evicted if its file's identity is not ``source``."""
        entry = self._kept.get(name)
        if entry is not None and source is not None and entry.source != source:
            self.evict(name)
            return None
        return entry

    def get(self, name: str, source: FileId | None = None) -> LoRAEntry | None:
        """The entry of a name as ``look`` finds it, counted as a hit or a miss."""
        entry = self.look(name, source)
        self.count(name, hit=entry is not None)
        if entry is not None:
            entry.last_used = self._clock()
            self._kept.move_to_end(name)
        return entry

    def count(self, name: str, hit: bool) -> None:
        """Count a hit or a miss of a name."""
        counts = self._counts.setdefault(name, Counter())
        self._counts.move_to_end(name)
        if len(self._counts) > _COUNTED:
            self._counts.popitem(last=False)
        if hit:
            self.hits += 1
            counts["hits"] += 1
        else:
            self.misses += 1
            counts["misses"] += 1

    def keep(self, entry: LoRAEntry) -> bool:
        """Keep an entry, in place of another of the same name.

        Returns:
            Whether the cache now owns the entry; ``False`` if it finds no room.
        """
        old = self._kept.get(entry.name)
        evicted = self._to_make_room(entry, old)
        if evicted is None:
            return False
        for name in evicted:
            self.evict(name)
            self.evictions += 1
        if old is not None:
            self.evict(entry.name)
        self._kept[entry.name] = entry
        self.nbytes += entry.nbytes
        return True

    def _to_make_room(self, entry: LoRAEntry, old: LoRAEntry | None) -> list[str] | None:
        """Names to evict besides ``old``, which the entry replaces; ``None`` if evicting cannot make enough room."""
        nbytes, count = self.nbytes - (old.nbytes if old else 0), len(self._kept) - (1 if old else 0)
        evicted: list[str] = []
        for other in self._kept.values():
            if nbytes + entry.nbytes <= self.max_bytes and count < self.max_entries:
                break
            if other is not old and not other.clients and other.name not in self.pinned:
                evicted.append(other.name)
                nbytes, count = nbytes - other.nbytes, count - 1
        return evicted if nbytes + entry.nbytes <= self.max_bytes and count < self.max_entries else None

    def evict(self, name: str) -> bool:
        """Remove the entry of a name, if there is one, and return whether; its last use releases the memory."""
        entry = self._kept.pop(name, None)
        if entry is None:
            return False
        self.nbytes -= entry.nbytes
        entry.drop()
        return True

    def evict_all(self) -> list[LoRAEntry]:
        """Remove and return all entries that are not pinned."""
        evicted = [entry for entry in self._kept.values() if entry.name not in self.pinned]
        for entry in evicted:
            self.evict(entry.name)
        return evicted

    def clear(self) -> None:
        """Remove all entries, pinned entries included."""
        for name in list(self._kept):
            self.evict(name)

    def named(self, name: str) -> LoRAEntry:
        """The entry of a name or of a file's path.

        Raises:
            BadRequest: the name is empty.
            ModelNotFound: there is no such entry; the hint suggests similar names.
        """
        if not name:
            raise BadRequest("a LoRA's name is empty")
        for entry in self._kept.values():
            if name == entry.name or (entry.source is not None and name == entry.source.path):
                return entry
        close = difflib.get_close_matches(name, self._kept, n=3, cutoff=0.4)
        hint = f"Similar names: {', '.join(close)}" if close else "'luna-daemon lora ls' lists the cache"
        raise ModelNotFound(f"LoRA {name!r} is not in the cache", hint)

    def stats(self) -> dict[str, Any]:
        """Statistics for ``info``, in total and by LoRA: sizes in bytes, times in seconds, ``last_used`` since 1970."""
        return {
            "entries": len(self._kept), "bytes": self.nbytes, "max_bytes": self.max_bytes,
            "max_entries": self.max_entries, "hits": self.hits, "misses": self.misses,
            "evictions": self.evictions, "uncached": self.uncached,
            "loras": {name: self._entry_stats(entry) for name, entry in self._kept.items()},
        }  # fmt: skip

    def _entry_stats(self, entry: LoRAEntry) -> dict[str, Any]:
        counts = self._counts.get(entry.name, Counter())
        return {
            "kind": entry.kind, "bytes": entry.nbytes, "tensors": len(entry.refs), "hits": counts["hits"],
            "misses": counts["misses"], "load_s": round(entry.load_s, 4), "last_used": entry.last_used,
            "clients": len(entry.clients), "pinned": entry.name in self.pinned,
            "path": entry.source.path if entry.source else None,
        }  # fmt: skip
