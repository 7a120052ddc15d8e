"""A unit of work on its way through the pool: a call with its model, its inputs, and who waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from ..core import LunaError
from ..wire.arena import Slot
from ..wire.messages import LoadSpec, TensorRef


@dataclass(frozen=True)
class Piece:
    """A tensor and the memory it lies in."""

    ref: TensorRef
    slot: Slot


def release(pieces: Iterable[Piece]) -> None:
    """Give back one use of the memory behind each."""
    for piece in pieces:
        piece.slot.release()


@dataclass(frozen=True)
class PatchSet:
    """A patch set and the memory its tensors lie in."""

    name: str
    packed: Any
    pieces: list[Piece]
    models: list[LoadSpec] = field(default_factory=list)
    """Whose weights it names."""


@dataclass(frozen=True)
class Outcome:
    """What a worker answered. Whoever holds it holds one use of each piece's slot."""

    result: Any
    pieces: list[Piece]
    notes: list[str]

    def release(self) -> None:
        release(self.pieces)


class Waiter(Protocol):
    """One request of one client."""

    client: int
    """Number of its session: fairness counts by it."""

    def progress(self, stage: str, step: int, total: int) -> None: ...

    def finish(self, outcome: Outcome, shared: bool) -> None:
        """Answer; the outcome's slots stay the caller's unless not ``shared``."""
        ...

    def fail(self, error: LunaError) -> None: ...


@dataclass(eq=False)
class Work:
    """One computation; several waiters if clients asked for the same."""

    op: str
    call: msgspec.Raw
    spec: LoadSpec
    pieces: list[Piece]
    priority: int
    deadline: float | None
    waiters: list[Waiter]
    patches: list[PatchSet] = field(default_factory=list)
    """Patch sets that the call names."""
    reserve: Callable[[], Slot | None] = lambda: None
    """A slot for the result, if its size can be foretold."""
    measured: Callable[[int], None] = lambda nbytes: None
    """Told the bytes of a result that is one tensor."""
    load_bytes: int = 0
    """Bytes of the model's files: how much room loading it takes, about."""
    keep: Callable[[Outcome], None] | None = None
    """Puts the outcome into a cache too, so waiters get it to copy."""
    pin: bool = False
    born: float = field(default_factory=time.monotonic)
    started: float = 0.0
    crashes: int = 0
    evicted_all: bool = False

    @property
    def models(self) -> dict[str, LoadSpec]:
        """By key what a worker needs: the work's own model, and those whose weights its patches name."""
        lenders = {spec.key: spec for patch in self.patches for spec in patch.models}
        return {self.spec.key: self.spec, **lenders}

    @property
    def client(self) -> int:
        """The session that asked first."""
        return self.waiters[0].client if self.waiters else 0

    def widen(self, priority: int, deadline: float | None) -> None:
        """Another waiter joins: the more urgent of both counts, and the later deadline."""
        self.priority = min(self.priority, priority)
        self.deadline = None if self.deadline is None or deadline is None else max(self.deadline, deadline)

    def progress(self, stage: str, step: int = 0, total: int = 0) -> None:
        for waiter in self.waiters:
            waiter.progress(stage, step, total)

    def release_inputs(self) -> None:
        release(self.pieces)
        for patch in self.patches:
            release(patch.pieces)
        self.pieces, self.patches = [], []

    def finish(self, outcome: Outcome) -> None:
        """Answer everybody; takes over the outcome's slots."""
        self.release_inputs()
        waiters, self.waiters = self.waiters, []
        shared = self.keep is not None or len(waiters) > 1
        if self.keep is not None:
            self.keep(outcome)
        for waiter in waiters:
            waiter.finish(outcome, shared)
        if shared or not waiters:
            outcome.release()

    def fail(self, error: LunaError) -> None:
        self.release_inputs()
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.fail(error)
