"""Work that waits for a worker: a bounded queue that clients share fairly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple

from ..core import Busy, LunaError
from . import policy
from .launch import same_place
from .work import Work

_RECENT = 256


class Line(NamedTuple):
    """The waiting work that the same workers can take with the same model."""

    length: int
    waited_s: float
    """Waiting time of the oldest work, seconds."""


class WorkQueue:
    """Waiting work in the order of arrival; iterates over it.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._works: list[Work] = []
        self._waits: deque[float] = deque(maxlen=_RECENT)
        self._served: dict[int, float] = {}
        """Time when each client's work was last sent to a worker, by client."""

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._works)

    @property
    def average_wait_s(self) -> float:
        """Mean waiting time of the last 256 requests that were sent to a worker, seconds."""
        return sum(self._waits) / len(self._waits) if self._waits else 0.0

    def add(self, work: Work, limit: int) -> None:
        """Append work. In a full queue the client with most requests loses its last one to a client with fewer.

        Raises:
            Busy: the queue is full, and the client of ``work`` has most requests in it.
        """
        if len(self) >= limit:
            retry_s = max(0.1, self.average_wait_s)
            busy = Busy(f"the queue is full ({len(self)} requests wait)", f"Ask again in {retry_s:.1f} s", retry_s)
            index = policy.displaced([waiting.client for waiting in self], work.client)
            if index is None:
                raise busy
            self._works.pop(index).fail(busy)
        self._works.append(work)

    def put_back(self, work: Work) -> None:
        """Insert work that is tried again, before all other work."""
        self._works.insert(0, work)

    def remove(self, work: Work) -> None:
        """Remove work without answering its callers."""
        self._works.remove(work)

    def fail(self, works: Iterable[Work], error: LunaError) -> None:
        """Remove those of ``works`` that still wait, and answer their callers with ``error``."""
        for work in works:
            if work in self._works:
                self._works.remove(work)
                work.fail(error)

    def served(self, work: Work) -> float:
        """Record that work was given to a worker just now; return the seconds for which the work waited."""
        now = self._clock()
        self._served[work.client] = now
        self._waits.append(now - work.born)
        return self._waits[-1]

    def forget(self, client: int) -> None:
        """Drop the record of a client that has disconnected."""
        self._served.pop(client, None)

    def in_order(self, running: Mapping[int, int]) -> list[Work]:
        """Return the work in the order to serve it.

        Args:
            running: number of requests that are being computed, per client.
        """
        pending = [(work.priority, work.client) for work in self]
        return [self._works[index] for index in policy.fair_order(pending, running, self._served)]

    def lines(self) -> dict[Hashable, Line]:
        """Return the line of each model, by ``launch.same_place``."""
        now = self._clock()
        lines: dict[Hashable, Line] = {}
        for work in self:
            place = same_place(work.spec)
            length, waited_s = lines.get(place, (0, 0.0))
            lines[place] = Line(length + 1, max(waited_s, now - work.born))
        return lines
