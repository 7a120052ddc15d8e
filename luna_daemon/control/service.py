"""The service behind the socket: who is connected, what they ask, and who answers it.

One ``Service`` lives in the control process. It authenticates connections, checks every descriptor, answers what
needs no model itself, and hands the rest to the worker pool.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import psutil

from .. import __version__
from ..config import Settings
from ..core import (
    PROTOCOL_VERSION,
    AuthenticationError,
    BadRequest,
    Busy,
    InternalError,
    LimitExceeded,
    LunaError,
    ModelLoadError,
    ProtocolError,
    VersionMismatch,
    logger,
)
from ..files.resolver import LookFirst, ModelResolver
from ..lora.loader import LoRALoader
from ..lora_cache import LoRACache
from ..pool.process import WorkerProcess
from ..pool.work import Piece, release
from ..wire import messages as m
from ..wire.arena import Slot
from ..wire.codec import check_ref
from ..wire.connection import Connection
from ..wire.frame import MAX_HEADER, decode_call
from ..wire.shared_memory import SharedMemory
from ..workers import WorkerPool
from .computing import compute
from .conditioning_cache import ConditioningCache
from .ops import HANDLERS
from .patch_sets import PatchSets
from .roots import ComfyRoots
from .session import ClientRequest, Session

_PATCH_BYTES, _PATCH_SETS = 2 << 30, 256
"""Patch sets kept for clients: what is dropped is put again when it is needed."""
_GREET_S = 5.0
_STALL_S = 60.0
"""A peer that reads nothing for so long is cut off: what waits for it costs memory."""
_READS_S = 1.0
_MOST_STRANGERS = 256
"""Connections that have not greeted yet; the oldest goes first. A client greets within milliseconds."""
_HELLO_BYTES = 64 << 10
"""Largest message before the greeting: strangers make nobody allocate."""


class Service:
    """Everything behind the socket.

    Args:
        settings: limits and caches.
        pool: computes.
        resolver: finds models.
        memory: shared memory, if there is any.
        token: what a client must present; ``token_place`` says where it lies.
        collect_info: makes the ``info`` answer.
        on_shutdown: called when a client asks the daemon to end.
        on_reload: reads the settings anew; what it took is the answer.
        make_token: makes another token and leaves it where clients find it.
    """

    def __init__(
        self,
        settings: Settings,
        pool: WorkerPool,
        resolver: ModelResolver,
        memory: SharedMemory,
        token: str,
        token_place: str,
        collect_info: Callable[[Service], dict[str, Any]],
        on_shutdown: Callable[[], None],
        on_reload: Callable[[], dict[str, Any]],
        make_token: Callable[[], str],
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.events = pool.events
        self.resolver = resolver
        self.memory = memory
        self.token = token
        self.token_place = token_place
        self.collect_info = collect_info
        self.on_shutdown = on_shutdown
        self.on_reload = on_reload
        self.make_token = make_token
        self.roots = ComfyRoots(settings)
        self.cache = ConditioningCache(settings.conditioning_cache_mb << 20)
        self.patches = PatchSets(_PATCH_BYTES, _PATCH_SETS)
        self.loras = LoRACache(int(settings.lora_cache_gb * (1 << 30)), settings.lora_cache_entries)
        self.sessions: dict[Connection, Session] = {}
        self.workers: dict[Connection, WorkerProcess] = {}
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.fallbacks = 0
        self.materialised = 0
        self.coalesced = 0
        self.gpus: list[dict[str, Any]] = []
        """Memory of the GPUs, as it was a few seconds ago."""
        self.ws_port: int | None = None
        """The status page's port, once it is there."""
        self.born = time.time()
        self.limits = m.Limits(
            settings.max_header_mb << 20, settings.max_tensor_mb << 20, settings.arena_client_mb << 20,
            settings.queue_limit, settings.max_clients,
        )  # fmt: skip
        self.lora_loader = LoRALoader(settings, self.loras, memory, self.limits.tensor_bytes)
        self._connections: set[Connection] = set()
        self._strangers: dict[Connection, asyncio.TimerHandle] = {}
        """Those that have not greeted, oldest first, and the alarm that ends them."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = 0

    # --- connections ---

    def connect(self) -> Connection:
        """A connection for a socket that was just accepted."""
        connection = Connection(self, _HELLO_BYTES, self.limits.tensor_bytes)
        self._connections.add(connection)
        alarm = asyncio.get_running_loop().call_later(_GREET_S, self._turn_away, connection)
        self._strangers[connection] = alarm
        if len(self._strangers) > _MOST_STRANGERS:
            self._turn_away(next(iter(self._strangers)))
        return connection

    def _turn_away(self, stranger: Connection) -> None:
        self._known(stranger)
        stranger.abort()

    def _known(self, connection: Connection) -> None:
        """It has greeted, or is gone: its alarm would keep it, and its buffer, until then."""
        if (alarm := self._strangers.pop(connection, None)) is not None:
            alarm.cancel()

    def place(self, connection: Connection, nbytes: int) -> Slot:
        """Memory for an inline payload: shared if there is some, so that a worker need not get it by socket again."""
        if connection not in self.sessions and connection not in self.workers:
            raise AuthenticationError("tensors before a greeting")
        slot = self.memory.try_allocate(nbytes)
        if slot is None:
            self.spawn(self.memory.grow(nbytes))
        return slot or Slot.on_heap(nbytes)

    def received(self, connection: Connection, message: m.Message, payload: Slot | None) -> None:
        """A frame of anybody."""
        worker, session = self.workers.get(connection), self.sessions.get(connection)
        if worker is not None and isinstance(message, m.Request):
            if payload is not None:
                payload.release()
            self.spawn(self._grant(worker, message))
        elif worker is not None:
            self.pool.received(worker, message, payload)
        elif session is not None:
            self._from_client(session, message, payload)
        elif isinstance(message, m.Hello):
            self._greet(connection, message)
        else:
            raise ProtocolError(f"the first message must be hello, not {type(message).__name__}")

    def lost(self, connection: Connection, why: str) -> None:
        """A connection is gone: nobody computes for its requests any more, and its memory is free."""
        self._connections.discard(connection)
        self._known(connection)
        worker, session = self.workers.pop(connection, None), self.sessions.pop(connection, None)
        if worker is not None:
            self.pool.lost(worker, why)
        if session is not None:
            self.pool.forget(session.number)
            for request in list(session.requests.values()):
                if request.work is not None:
                    self.pool.cancel(request.work, request)
                    request.give_up()
            if session.said_bye or not session.leases:
                session.leases.release_all()
            else:
                self.spawn(self._bury(session))

    async def _bury(self, session: Session) -> None:
        """Keep what a client without a connection holds until its process has ended: tensors of it may lie there."""
        pause = 0.05
        while _is_alive(session.pid, session.since):
            await asyncio.sleep(pause)
            pause = min(5.0, pause * 1.5)
        session.leases.release_all()

    def is_connected(self, session: Session) -> bool:
        """Whether answers still reach this client."""
        return self.sessions.get(session.connection) is session

    def _greet(self, connection: Connection, hello: m.Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            raise VersionMismatch(
                f"client {hello.version or '?'} speaks LDP/{hello.protocol}, "
                f"daemon {__version__} speaks LDP/{PROTOCOL_VERSION}",
                "Update the older of the two",
            )
        if hello.role == "worker":
            worker = self.pool.adopt(hello.token, connection)
            if worker is None:
                raise AuthenticationError("this worker's token is not known")
            self.workers[connection] = worker
            connection.max_header = MAX_HEADER
        else:
            self.check_token(hello.token)
            if len(self.sessions) >= self.settings.max_clients:
                raise Busy(f"{len(self.sessions)} clients are connected, the most allowed", "Raise max_clients", 5.0)
            self.enter(connection, hello)
            connection.max_header = self.limits.header_bytes
        self._known(connection)
        connection.send(m.Welcome(self._numbers, __version__, self.limits, self.memory.info, self.memory.why))

    def enter(self, connection: Connection, hello: m.Hello) -> None:
        """Open a session for a client that has been let in."""
        self._numbers += 1
        self.sessions[connection] = Session(self._numbers, connection, hello)

    def check_token(self, token: str) -> None:
        """Compare in constant time.

        Raises:
            AuthenticationError: says where the token lies.
        """
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            who = f"uid {os.getuid()}" if hasattr(os, "getuid") else "another user"
            raise AuthenticationError(
                f"the token is {'wrong' if token else 'missing'}: this daemon runs as {who} "
                f"and its token lies in {self.token_place}",
                "Run as that user, or set LUNA_TOKEN or LUNA_TOKEN_FILE",
            )

    def renew_token(self) -> int:
        """Let nobody in with the old token, and nobody stay with it; how many connections that ends."""
        self.token = self.make_token()
        for session in self.sessions.values():
            session.outdated = True
        asyncio.get_running_loop().call_soon(self._close_outdated)
        return len(self.sessions)

    def _close_outdated(self) -> None:
        """Those that wait for an answer get it first."""
        for session in list(self.sessions.values()):
            if session.outdated and not session.requests:
                session.connection.close()

    def spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)

    # --- requests ---

    def _from_client(self, session: Session, message: m.Message, payload: Slot | None) -> None:
        try:
            if isinstance(message, m.Request):
                self._request(session, message, payload)
            elif isinstance(message, m.Release):
                for number in message.slots:
                    session.leases.release(number)
            elif isinstance(message, m.Bye):
                session.said_bye = True
            elif isinstance(message, m.Cancel):
                request = session.requests.get(message.id)
                if request is not None and request.work is not None:
                    session.requests.pop(message.id)
                    self.pool.cancel(request.work, request)
                    request.give_up()
            else:
                raise ProtocolError(f"clients do not send {type(message).__name__}")
        finally:
            if payload is not None:
                payload.release()

    def _request(self, session: Session, message: m.Request, payload: Slot | None) -> None:
        if message.id < 1 or message.id in session.requests:
            raise ProtocolError(f"request id {message.id} is {'in use' if message.id > 0 else 'not positive'}")
        request = ClientRequest(session, message, payload, self)
        try:
            if session.outdated:
                raise AuthenticationError("the token was renewed", "Connect anew with the new one")
            call = _decode(message.call)
            request.op = str(type(call).__struct_config__.tag)
            HANDLERS.get(type(call), compute)(self, request, call)
        except LookFirst as missing:
            self.spawn(self._look_first(missing.look, session, message, payload.retain() if payload else None))
        except LunaError as error:
            request.fail(error)
        except Exception as error:
            logger.exception("request %s failed", request.op)
            if request.work is not None:
                self.pool.cancel(request.work, request)
            request.fail(InternalError.of(error))

    async def _look_first(
        self, look: Callable[[], object], session: Session, message: m.Request, payload: Slot | None
    ) -> None:
        """Hash a file or look at a ComfyUI, off the event loop; then take the request up again."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, look)
            if session.connection in self.sessions:
                self._request(session, message, payload)
        except OSError as error:
            why = f"{error.filename}: {error.strerror or error}"
            ClientRequest(session, message, None, self).fail(ModelLoadError(why))
        except LunaError as error:
            ClientRequest(session, message, None, self).fail(error)
        finally:
            if payload is not None:
                payload.release()

    def resolve(self, request: ClientRequest, ref: m.ModelRef) -> m.LoadSpec:
        """The model that a request names, and the ComfyUI that computes it for this client.

        Raises:
            ComfyRefused: no worker runs the client's own.
            LookFirst: it was not looked at yet.
            ModelError: see ``ModelResolver.resolve``.
        """
        session = request.session
        return self.resolver.resolve(ref, self.roots.for_client(ref.comfy, session.comfy, session.is_here))

    def pieces(self, request: ClientRequest) -> list[Piece]:
        """Check a request's descriptors and take a use of the memory behind each.

        Raises:
            BadRequest, LimitExceeded: a descriptor contradicts itself or points outside what the client holds.
        """
        refs, leases, payload = request.message.tensors, request.session.leases, request.payload
        total = sum(max(0, ref.nbytes) for ref in refs)
        if total > self.limits.tensor_bytes:
            raise LimitExceeded(f"tensors of {total} bytes; the limit is {self.limits.tensor_bytes}")
        pieces: list[Piece] = []
        try:
            for ref in refs:
                check_ref(ref, self.limits.tensor_bytes)
                source = leases.get(ref.slot) if ref.slot else (payload or Slot.on_heap(0))
                start = 0 if ref.slot else ref.offset
                if start + ref.nbytes > source.nbytes:
                    raise BadRequest(f"tensor at {start}..{start + ref.nbytes} is outside its {source.nbytes} bytes")
                pieces.append(Piece(ref, source.part(start, ref.nbytes)))
        except LunaError:
            release(pieces)
            raise
        return pieces

    async def _grant(self, worker: WorkerProcess, message: m.Request) -> None:
        """A worker asks for a slot for its result; it waits for the answer, so it gets one."""
        assert worker.connection is not None
        slot = None
        try:
            call = decode_call(message.call)
            if isinstance(call, m.Alloc):
                slot = await self.memory.allocate(call.nbytes)
        except Exception:
            logger.exception("no slot for worker %d", worker.number)
        if slot is None:
            worker.connection.send(m.Failure(message.id, LimitExceeded.code, "shared memory is full"))
        elif worker.connection not in self.workers:
            slot.release()
        else:
            worker.connection.send(m.Reply(message.id, None, [worker.leases.lend(slot)]))

    def tidy(self) -> None:
        """Give unused shared memory back, cut off who does not read; called every few seconds."""
        self.memory.tidy()
        self._close_outdated()
        self.lora_loader.tidy()
        for connection in list(self._connections):
            if connection.stalled_s > _STALL_S:
                logger.warning("%s has read nothing for %.0f s and is cut off", connection.remote, connection.stalled_s)
                connection.abort()

    @property
    def unsent(self) -> bool:
        """Whether answers are still on their way to clients that read."""
        return any(connection.unsent and connection.stalled_s < _READS_S for connection in self._connections)

    def close(self) -> None:
        """Close every connection and forget every cache."""
        self.cache.clear()
        self.patches.clear()
        self.lora_loader.close()
        for connection in list(self._connections):
            connection.close()


def _decode(raw: msgspec.Raw) -> m.Call:
    try:
        return decode_call(raw)
    except ProtocolError as error:
        raise BadRequest(error.message, "See docs/protocol.md for the ops and their fields") from error


def _is_alive(pid: int, since: float) -> bool:
    """Whether the process that said hello at ``since`` still runs, and is not another with its number."""
    try:
        process = psutil.Process(pid)
        # Start times are known to a second or so.
        return bool(process.create_time() <= since + 2 and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError, OverflowError):
        return False
