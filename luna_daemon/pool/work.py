"""A unit of work on its way through the pool: a call with its model, its inputs and its waiters."""

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
    """A tensor's description and the memory that holds the tensor."""

    ref: TensorRef
    slot: Slot


def release(pieces: Iterable[Piece]) -> None:
    """Give back one use of the memory behind each piece."""
    for piece in pieces:
        piece.slot.release()


@dataclass(frozen=True)
class PatchSet:
    """A patch set and the memory that holds its tensors."""

    name: str
    packed: Any
    pieces: list[Piece]
    models: list[LoadSpec] = field(default_factory=list)
    """Models whose weights ``packed`` names."""


@dataclass(frozen=True)
class Outcome:
    """A worker's answer; its owner has one use of each piece's slot."""

    result: Any
    pieces: list[Piece]
    notes: list[str]

    def release(self) -> None:
        """Give back the outcome's use of each slot."""
        release(self.pieces)


class Waiter(Protocol):
    """One request of one client."""

    client: int
    """Number of the client's session; fairness counts by client."""

    def progress(self, stage: str, step: int, total: int) -> None:
        """Send a sign of life; see ``messages.Progress``."""
        ...

    def finish(self, outcome: Outcome, shared: bool) -> None:
        """Answer with a result.

        Args:
            shared: whether the outcome has other users, so that its slots must be copied; else the waiter owns them.
        """
        ...

    def fail(self, error: LunaError) -> None:
        """Answer with an error."""
        ...


@dataclass(eq=False)
class Work:
    """One computation, with several waiters if clients made equal requests."""

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
    """Returns a slot for the result, if the size is known from the last time."""
    measured: Callable[[int], None] = lambda nbytes: None
    """Called with the bytes of a result that is one tensor."""
    load_bytes: int = 0
    """Bytes of the model's files: about the memory that loading takes."""
    keep: Callable[[Outcome], None] | None = None
    """Puts the outcome into a cache too, so that waiters must copy from it."""
    pin: bool = False
    born: float = field(default_factory=time.monotonic)
    crashes: int = 0
    evicted_all: bool = False

    @property
    def models(self) -> dict[str, LoadSpec]:
        """The models that a worker needs, by key: the work's own, and those whose weights its patches name."""
        lenders = {spec.key: spec for patch in self.patches for spec in patch.models}
        return {self.spec.key: self.spec, **lenders}

    @property
    def client(self) -> int:
        """Number of the first waiter's session; 0 without waiters."""
        return self.waiters[0].client if self.waiters else 0

    def widen(self, priority: int, deadline: float | None) -> None:
        """Adopt the more urgent priority and the later deadline when another waiter joins."""
        self.priority = min(self.priority, priority)
        self.deadline = None if self.deadline is None or deadline is None else max(self.deadline, deadline)

    def progress(self, stage: str, step: int = 0, total: int = 0) -> None:
        """Send a sign of life to every waiter."""
        for waiter in self.waiters:
            waiter.progress(stage, step, total)

    def release_inputs(self) -> None:
        """Give back the memory of the inputs and patch sets."""
        release(self.pieces)
        for patch in self.patches:
            release(patch.pieces)
        self.pieces, self.patches = [], []

    def finish(self, outcome: Outcome) -> None:
        """Answer every waiter with a result; takes over the outcome's slots."""
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
        """Answer every waiter with an error."""
        self.release_inputs()
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.fail(error)
