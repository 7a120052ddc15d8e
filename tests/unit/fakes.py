"""Stand-ins that unit tests pass where the package takes an object: clocks, slots, peers, clients, local models.

Nothing here imports torch: tests that need tensors bring their own.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from luna_daemon.client import Answer
from luna_daemon.core import LunaError
from luna_daemon.pool.work import Outcome, Piece
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot
from luna_daemon.wire.connection import Connection

if TYPE_CHECKING:
    import torch


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Memory:
    """Makes slots and counts which of them have been given back, and how often."""

    def __init__(self) -> None:
        self.made: list[Slot] = []
        self.freed: list[Slot] = []

    def slot(self, nbytes: int = 16, number: int = 1) -> Slot:
        slot = Slot(number, "seg-fake", 0, memoryview(bytearray(nbytes)), self.freed.append)
        self.made.append(slot)
        return slot

    def piece(self, nbytes: int = 16, number: int = 1) -> Piece:
        return Piece(m.TensorRef("uint8", (nbytes,), nbytes, 0), self.slot(nbytes, number))

    def outcome(self, *sizes: int) -> Outcome:
        return Outcome({"names": []}, [self.piece(size) for size in sizes], [])

    @property
    def live(self) -> int:
        return len(self.made) - len(self.freed)


class Waiter:
    """Keeps what a piece of work told it; lets go of what it was given, as a client does in the end."""

    def __init__(self, client: int = 1) -> None:
        self.client = client
        self.outcomes: list[tuple[Outcome, bool]] = []
        self.errors: list[LunaError] = []
        self.seen: list[tuple[str, int, int]] = []

    def progress(self, stage: str, step: int, total: int) -> None:
        self.seen.append((stage, step, total))

    def finish(self, outcome: Outcome, shared: bool) -> None:
        self.outcomes.append((outcome, shared))
        for piece in outcome.pieces:
            assert piece.slot.users > 0, "a waiter was given memory that is free already"
        if not shared:
            outcome.release()

    def fail(self, error: LunaError) -> None:
        self.errors.append(error)


class Peer:
    """Owns connections: keeps every frame; ``answer`` may react to one."""

    def __init__(self, answer: Callable[[Connection, m.Message], None] | None = None) -> None:
        self.memory = Memory()
        self.frames: list[tuple[m.Message, bytes | None]] = []
        self.reasons: list[str] = []
        self.placed: list[int] = []
        self.connections: list[Connection] = []
        self.answer = answer

    def place(self, connection: Connection, nbytes: int) -> Slot:
        self.placed.append(nbytes)
        return self.memory.slot(nbytes)

    def received(self, connection: Connection, message: m.Message, payload: Slot | None) -> None:
        self.frames.append((message, None if payload is None else bytes(payload.view)))
        if payload is not None:
            payload.release()
        if self.answer is not None:
            self.answer(connection, message)

    def lost(self, connection: Connection, why: str) -> None:
        self.reasons.append(why)


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with near, far:
        yield near, far


class FewBytesSocket:
    """A socket that hands out ``most`` bytes per read, however many have arrived."""

    def __init__(self, sock: socket.socket, most: int = 1) -> None:
        self._sock = sock
        self._most = most

    def recv_into(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer[: self._most])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


Scripted = Answer | LunaError
"""What a fake client answers to one call."""


class Client:
    """A daemon's client that answers from a script; the last entry is answered for ever."""

    def __init__(self, *script: Scripted, most_calls: int = 1000) -> None:
        self.script = list(script)
        self.calls: list[m.Call] = []
        self.tensors: list[list[torch.Tensor]] = []
        self.options: list[dict[str, Any]] = []
        self.fallbacks = 0
        self.told = 0
        self._most_calls = most_calls

    def call(self, call: m.Call, tensors: Any = (), **options: Any) -> Answer:
        assert len(self.calls) < self._most_calls, "the proxy keeps on asking"
        self.calls.append(call)
        self.tensors.append(list(tensors))
        self.options.append(options)
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(entry, LunaError):
            raise entry
        return entry

    def report_pending(self) -> None:
        self.told, self.fallbacks = self.told + self.fallbacks, 0


def answer(*tensors: torch.Tensor, result: Any = None, notes: list[str] | None = None) -> Answer:
    """A daemon's answer."""
    return Answer(result, list(tensors), notes or [])


class LocalVAE:
    """A local VAE that says so in what it returns."""

    def __init__(self) -> None:
        self.tilings: list[dict[str, int]] = []

    def encode(self, pixels: torch.Tensor) -> str:
        return "local latents"

    def decode(self, samples: torch.Tensor) -> str:
        return "local pixels"

    def encode_tiled(self, pixels: torch.Tensor, **tiling: int) -> str:
        self.tilings.append(tiling)
        return "local latents"

    def decode_tiled(self, samples: torch.Tensor, **tiling: int) -> str:
        self.tilings.append(tiling)
        return "local pixels"


class LocalCLIP:
    """A local CLIP that shows which clip skip it was used with."""

    def __init__(self) -> None:
        self.layer: int | None = None

    def clone(self) -> LocalCLIP:
        other = LocalCLIP()
        other.layer = self.layer
        return other

    def clip_layer(self, layer: int) -> None:
        self.layer = layer

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, Any]:
        pair: tuple[Any, ...] = (7, 1.0, 1) if return_word_ids else (7, 1.0)
        return {"l": [[pair]], **options}

    def encode(self, text: str) -> str:
        return "local cond"

    def encode_from_tokens(self, tokens: Any, return_pooled: Any = False, return_dict: bool = False) -> Any:
        return {"cond": f"local, layer {self.layer}", "pooled_output": "local pooled"}
