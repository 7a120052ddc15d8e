"""What requests are answered from: settings, models, workers, caches, shared memory, sessions, counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from ..config import Settings
from ..core import BadRequest, LimitExceeded, LunaError, logger
from ..files.resolver import ModelResolver
from ..lora.loader import LoRALoader
from ..lora_cache import LoRACache
from ..pool.work import Outcome, Piece, release
from ..wire import messages as m
from ..wire.arena import Slot
from ..wire.codec import check_ref
from ..wire.connection import Connection
from ..wire.shared_memory import SharedMemory
from ..workers import WorkerPool
from .access import Access
from .pieces_cache import PiecesCache
from .roots import ComfyRoots
from .session import Session

_PATCH_BYTES, _PATCH_SETS = 2 << 30, 256
"""Most patch sets kept for clients: one that was dropped is put again when it is needed."""
_CONDITIONINGS = 1 << 16
"""Tokens take so few bytes that a limit of bytes alone would keep millions of them."""


class KeptPatches(NamedTuple):
    """A patch set of a client: how its tensors belong together, the tensors, and whose weights the patches name."""

    packed: Any
    pieces: list[Piece]
    models: list[m.ModelRef]


def limits_of(settings: Settings) -> m.Limits:
    """Limits that the daemon announces to clients."""
    return m.Limits(
        settings.max_header_mb << 20, settings.max_tensor_mb << 20, settings.arena_client_mb << 20,
        settings.queue_limit, settings.max_clients,
    )  # fmt: skip


class State:
    """Everything that requests need to be answered; knows no socket.

    Args:
        settings: limits and caches.
        pool: computes.
        resolver: finds models.
        memory: shared memory, if there is any.
        access: checks tokens.
        collect_info: makes the ``info`` answer.
        on_shutdown: called when a client asks the daemon to end.
        on_reload: reads the settings again; returns which were taken.
    """

    def __init__(
        self,
        settings: Settings,
        pool: WorkerPool,
        resolver: ModelResolver,
        memory: SharedMemory,
        access: Access,
        collect_info: Callable[[State], dict[str, Any]],
        on_shutdown: Callable[[], None],
        on_reload: Callable[[], dict[str, Any]],
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.events = pool.events
        self.resolver = resolver
        self.memory = memory
        self.access = access
        self.collect_info = collect_info
        self.on_shutdown = on_shutdown
        self.on_reload = on_reload
        self.roots = ComfyRoots(settings)
        self.limits = limits_of(settings)
        self.conditionings: PiecesCache[bytes, Outcome] = PiecesCache(
            settings.conditioning_cache_mb << 20, _CONDITIONINGS, Outcome.release
        )
        self.patches: PiecesCache[str, KeptPatches] = PiecesCache(
            _PATCH_BYTES, _PATCH_SETS, lambda kept: release(kept.pieces)
        )
        self.loras = LoRACache(int(settings.lora_cache_gb * (1 << 30)), settings.lora_cache_entries)
        self.lora_loader = LoRALoader(settings, self.loras, memory, self.limits.tensor_bytes)
        self.sessions: dict[int, Session] = {}
        """Connected clients by the numbers of their sessions."""
        self.last_session = 0
        """The highest number that a session was given."""
        self.fallbacks = 0
        self.materialised = 0
        self.coalesced = 0
        self.gpus: list[dict[str, Any]] = []
        """Memory of the GPUs, as it was a few seconds ago."""
        self.ws_port: int | None = None
        """The status page's port, once the page is served."""
        self.born = time.time()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- sessions ---

    def open_session(self, connection: Connection, hello: m.Hello) -> Session:
        """Register a client that has been let in."""
        self.last_session += 1
        session = self.sessions[self.last_session] = Session(self.last_session, connection, hello)
        return session

    def is_connected(self, session: Session) -> bool:
        """Whether answers still reach this client."""
        return session.number in self.sessions

    def renew_token(self) -> int:
        """Let nobody in with the old token, and nobody stay with it; returns how many sessions that ends."""
        self.access.renew()
        for session in self.sessions.values():
            session.outdated = True
        asyncio.get_running_loop().call_soon(self.close_outdated)
        return len(self.sessions)

    def close_outdated(self) -> None:
        """Disconnect clients whose token was renewed, once all that they asked for is answered."""
        for session in list(self.sessions.values()):
            if session.outdated and not session.requests:
                session.connection.close()

    # --- what a request names ---

    def resolve(self, session: Session, ref: m.ModelRef) -> m.LoadSpec:
        """Find the model that a request names, and the ComfyUI that computes it for this client.

        Raises:
            ComfyRefused: no worker runs the client's own ComfyUI.
            NeedsIO: files must be read first.
            ModelError: see ``ModelResolver.resolve``.
        """
        return self.resolver.resolve(ref, self.roots.for_client(ref.comfy, session.comfy, session.is_here))

    def pieces(self, session: Session, refs: list[m.TensorRef], payload: Slot | None) -> list[Piece]:
        """Check a request's descriptors and take a use of the memory behind each.

        Args:
            payload: the bytes that came with the message.

        Raises:
            BadRequest, LimitExceeded: a descriptor contradicts itself or points outside what the client holds.
        """
        total = sum(max(0, ref.nbytes) for ref in refs)
        if total > self.limits.tensor_bytes:
            raise LimitExceeded(f"tensors of {total} bytes; the limit is {self.limits.tensor_bytes}")
        pieces: list[Piece] = []
        try:
            for ref in refs:
                check_ref(ref, self.limits.tensor_bytes)
                source = session.leases.get(ref.slot) if ref.slot else (payload or Slot.on_heap(0))
                start = 0 if ref.slot else ref.offset
                if start + ref.nbytes > source.nbytes:
                    raise BadRequest(f"tensor at {start}..{start + ref.nbytes} is outside its {source.nbytes} bytes")
                pieces.append(Piece(ref, source.part(start, ref.nbytes)))
        except LunaError:
            release(pieces)
            raise
        return pieces

    # --- memory, tasks, end ---

    def place(self, nbytes: int) -> Slot:
        """Memory for bytes that are about to arrive: shared where there is some, which workers need not be sent."""
        slot = self.memory.try_allocate(nbytes)
        if slot is None:
            self.spawn(self.memory.grow(nbytes))
        return slot or Slot.on_heap(nbytes)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background; what goes wrong in it is logged."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)

    def tidy(self) -> None:
        """Give back memory that is not used, and disconnect clients with an old token; called every few seconds."""
        self.memory.tidy()
        self.close_outdated()
        self.lora_loader.tidy()

    def close(self) -> None:
        """Empty every cache."""
        self.conditionings.clear()
        self.patches.clear()
        self.lora_loader.close()
