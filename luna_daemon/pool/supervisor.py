"""Back-off: the delay after a failed start of a worker, and the error for callers during that delay."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..core import WorkerCrashed


class Backoff:
    """Doubling delay between failed starts, from ``first_s`` up to ``most_s`` seconds; a success resets it."""

    def __init__(self, first_s: float = 0.5, most_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.first_s = first_s
        self.most_s = most_s
        self.failures = 0
        self.why = ""
        self._clock = clock
        self._until = 0.0

    def failed(self, why: str) -> None:
        """Record a failed start and its reason, and double the delay."""
        delay = min(self.most_s, self.first_s * 2 ** min(self.failures, 30))
        self.failures += 1
        self.why = why
        self._until = self._clock() + delay

    def succeeded(self) -> None:
        """Record that a worker became ready, and reset the delay."""
        self.failures = 0
        self.why = ""
        self._until = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until the next start is allowed."""
        return max(0.0, self._until - self._clock())

    def error(self) -> WorkerCrashed:
        """Return the error that callers get while no start is allowed."""
        return WorkerCrashed(
            f"no worker can be started ({self.failures} tries failed): {self.why}",
            f"The next try is in {self.wait_s:.1f} s",
        )
