"""State of the daemon: settings, models, workers, caches, shared memory, sessions, counters."""

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
"""Limits of the patch sets kept for clients; clients send a dropped set again."""
_CONDITIONINGS = 1 << 16
"""Limit of entries: tokens are so small that a limit of bytes alone would keep millions of entries."""


class KeptPatches(NamedTuple):
    """A client's patch set: its structure, its tensors, and the models whose weights the patches name."""

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
    """Everything that handlers answer requests from, apart from the sockets.

    Args:
        collect_info: makes the answer to ``info``.
        on_shutdown: called when a client asks the daemon to end.
        on_reload: reloads the settings; returns the report of ``reloading.apply``.
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
        """Sessions of connected clients by number."""
        self.last_session = 0
        """Number of the newest session."""
        self.fallbacks = 0
        self.materialised = 0
        self.coalesced = 0
        self.gpus: list[dict[str, Any]] = []
        """Memory of the GPUs, read every few seconds."""
        self.ws_port: int | None = None
        """Port of the status page, once the page is served."""
        self.started_at = time.time()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- sessions ---

    def open_session(self, connection: Connection, hello: m.Hello) -> Session:
        """Register an authenticated client."""
        self.last_session += 1
        session = self.sessions[self.last_session] = Session(self.last_session, connection, hello)
        return session

    def is_connected(self, session: Session) -> bool:
        """Whether the session's connection is open."""
        return session.number in self.sessions

    def renew_token(self) -> int:
        """Replace the token, and end all sessions once their requests are answered; returns the number of sessions."""
        self.access.renew()
        for session in self.sessions.values():
            session.outdated = True
        asyncio.get_running_loop().call_soon(self.close_outdated)
        return len(self.sessions)

    def close_outdated(self) -> None:
        """Disconnect clients whose token was renewed and whose requests are all answered."""
        for session in list(self.sessions.values()):
            if session.outdated and not session.requests:
                session.connection.close()

    # --- models and tensors of requests ---

    def resolve(self, session: Session, ref: m.ModelRef) -> m.LoadSpec:
        """Find the model that a request names, and the ComfyUI that runs the model for this client.

        Raises:
            ComfyRefused: no worker may run the client's own ComfyUI.
            NeedsIO: files must be read first.
            ModelError: see ``ModelResolver.resolve``.
        """
        return self.resolver.resolve(ref, self.roots.for_client(ref.comfy, session.comfy, session.is_local))

    def pieces(self, session: Session, refs: list[m.TensorRef], payload: Slot | None) -> list[Piece]:
        """Check a request's tensor descriptors, and retain the memory of each tensor.

        Args:
            payload: the inline bytes of the message.

        Raises:
            BadRequest, LimitExceeded: a descriptor is inconsistent, or points outside the client's memory.
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
        """Memory for a payload that is about to arrive: shared if available, since workers can map shared memory."""
        slot = self.memory.try_allocate(nbytes)
        if slot is None:
            self.spawn(self.memory.grow(nbytes))
        return slot or Slot.on_heap(nbytes)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background; an exception of the coroutine is logged."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)

    def maintain(self) -> None:
        """Release unused memory, and disconnect clients with an old token; called every few seconds."""
        self.memory.tidy()
        self.close_outdated()
        self.lora_loader.keep_cached()

    def close(self) -> None:
        """Empty every cache."""
        self.conditionings.clear()
        self.patches.clear()
        self.lora_loader.close()
