"""The service behind the socket: who is connected, what they ask, and who answers it.

One ``Service`` lives in the control process. It authenticates connections, checks every descriptor, answers what
needs no model itself, and hands the rest to the worker pool.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from . import __version__
from .conditioning_cache import ConditioningCache
from .config import Settings
from .core import (
    PROTOCOL_VERSION,
    AuthenticationError,
    BadRequest,
    Busy,
    InternalError,
    LimitExceeded,
    LunaError,
    ModelKind,
    ModelLoadError,
    PatchMissing,
    Priority,
    ProtocolError,
    ServiceType,
    VersionMismatch,
    logger,
)
from .lora_cache import LoRACache, LoRAEntry
from .models import DigestUnknown, ModelResolver, load_bytes
from .pool.process import WorkerProcess
from .pool.work import Outcome, PatchSet, Piece, Work
from .session import ClientRequest, Session
from .wire import messages as m
from .wire.arena import Arena, Slot, process_space
from .wire.codec import check_ref
from .wire.connection import Connection
from .wire.frame import MAX_HEADER, decode_call, encode_call
from .workers import WorkerPool

__all__ = ["Service"]

_PATCH_BYTES, _PATCH_SETS = 2 << 30, 256
"""Patch sets kept for clients: what is dropped is put again when it is needed."""
_SIZES, _CALL_BYTES = 256, 512
_GREET_S = 5.0
_TRIM_S = 60.0
_STALL_S = 60.0
"""A peer that reads nothing for so long is cut off: what waits for it costs memory."""
_FULL_S = 1.0
_COMPARE = 1 << 20
_HELLO_BYTES = 64 << 10
"""Largest message before the greeting: strangers make nobody allocate."""
_MOST_TEXT = 1_000_000
"""Characters of a prompt; its tokens must fit a message."""


class Service:
    """Everything behind the socket.

    Args:
        settings: limits and caches.
        pool: computes.
        resolver: finds models.
        arena: shared memory, or ``None`` and why in ``arena_why``.
        token: what a client must present; ``token_place`` says where it lies.
        collect_info: makes the ``info`` answer.
        on_shutdown: called when a client asks the daemon to end.
    """

    def __init__(
        self,
        settings: Settings,
        pool: WorkerPool,
        resolver: ModelResolver,
        arena: Arena | None,
        arena_why: str,
        token: str,
        token_place: str,
        collect_info: Callable[[Service], dict[str, Any]],
        on_shutdown: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.resolver = resolver
        self.arena = arena
        self.arena_why = arena_why
        self.token = token
        self.token_place = token_place
        self.collect_info = collect_info
        self.on_shutdown = on_shutdown
        self.cache = ConditioningCache(settings.conditioning_cache_mb << 20)
        self.patches = LoRACache(_PATCH_BYTES, _PATCH_SETS)
        self.loras = LoRACache(int(settings.lora_cache_gb * (1 << 30)), settings.lora_cache_entries)
        self._sizes: dict[tuple[Any, ...], int] = {}
        self.sessions: dict[Connection, Session] = {}
        self.workers: dict[Connection, WorkerProcess] = {}
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.fallbacks = 0
        self.materialised = 0
        self.coalesced = 0
        self.ws_port: int | None = None
        """The status page's port, once it is there."""
        self.born = time.time()
        self.limits = m.Limits(
            settings.max_header_mb << 20, settings.max_tensor_mb << 20, settings.arena_client_mb << 20,
            settings.queue_limit, settings.max_clients,
        )  # fmt: skip
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._growing = asyncio.Lock()
        self._full_until = 0.0
        self._numbers = 0

    # --- connections ---

    def connect(self) -> Connection:
        """A connection for a socket that was just accepted."""
        connection = Connection(self, _HELLO_BYTES, self.limits.tensor_bytes)
        self._connections.add(connection)
        asyncio.get_running_loop().call_later(_GREET_S, self._expect_hello, connection)
        return connection

    def _expect_hello(self, connection: Connection) -> None:
        if connection in self._connections and connection not in self.sessions and connection not in self.workers:
            connection.close()

    def place(self, connection: Connection, nbytes: int) -> Slot:
        """Memory for an inline payload: shared if there is some, so that a worker need not get it by socket again."""
        if connection not in self.sessions and connection not in self.workers:
            raise AuthenticationError("tensors before a greeting")
        slot = self.arena.try_allocate(nbytes) if self.arena is not None else None
        if slot is None and self.arena is not None:
            self._spawn(self._grow(nbytes))
        return slot or Slot.on_heap(nbytes)

    def received(self, connection: Connection, message: m.Message, payload: Slot | None) -> None:
        """A frame of anybody."""
        worker, session = self.workers.get(connection), self.sessions.get(connection)
        if worker is not None and isinstance(message, m.Request):
            if payload is not None:
                payload.release()
            self._spawn(self._grant(worker, message))
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
        worker, session = self.workers.pop(connection, None), self.sessions.pop(connection, None)
        if worker is not None:
            self.pool.lost(worker, why)
        if session is not None:
            self.pool.forget(session.number)
            for request in list(session.requests.values()):
                if request.work is not None:
                    self.pool.cancel(request.work, request)
            if session.said_bye or not session.leases:
                session.leases.release_all()
            else:
                self._spawn(self._bury(session))

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
            self._check_token(hello.token)
            if len(self.sessions) >= self.settings.max_clients:
                raise Busy(f"{len(self.sessions)} clients are connected, the most allowed", "Raise max_clients", 5.0)
            self._numbers += 1
            self.sessions[connection] = Session(self._numbers, connection, hello)
            connection.max_header = self.limits.header_bytes
        info = m.ArenaInfo(str(self.arena.folder), "nonce") if self.arena is not None else None
        connection.send(m.Welcome(self._numbers, __version__, self.limits, info, self.arena_why))

    def _check_token(self, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            who = f"uid {os.getuid()}" if hasattr(os, "getuid") else "another user"
            raise AuthenticationError(
                f"the token is {'wrong' if token else 'missing'}: this daemon runs as {who} "
                f"and its token lies in {self.token_place}",
                "Run as that user, or set LUNA_TOKEN or LUNA_TOKEN_FILE",
            )

    def _spawn(self, coroutine: Any) -> None:
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
            else:
                raise ProtocolError(f"clients do not send {type(message).__name__}")
        finally:
            if payload is not None:
                payload.release()

    def _request(self, session: Session, message: m.Request, payload: Slot | None) -> None:
        if message.id < 1 or message.id in session.requests:
            raise ProtocolError(f"request id {message.id} is {'in use' if message.id > 0 else 'not positive'}")
        request = ClientRequest(session, message.id, self)
        try:
            call = _decode(message.call)
            request.op = str(type(call).__struct_config__.tag)
            handler = _HANDLERS.get(type(call))
            if handler is not None:
                handler(self, request, call, message, payload)
            else:
                self._compute(request, call, message, payload)
        except DigestUnknown as missing:
            self._spawn(self._hash_first(missing.path, session, message, payload.retain() if payload else None))
        except LunaError as error:
            request.fail(error)
        except Exception as error:
            logger.exception("request %s failed", request.op)
            if request.work is not None:
                self.pool.cancel(request.work, request)
            request.fail(InternalError(f"{type(error).__name__}: {error}", "The daemon's log has the traceback"))

    async def _hash_first(self, path: Path, session: Session, message: m.Request, payload: Slot | None) -> None:
        """A file was named by its content: hash it off the event loop, then take the request up again."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.resolver.hash, path)
            if session.connection in self.sessions:
                self._request(session, message, payload)
        except OSError as error:
            ClientRequest(session, message.id, self).fail(ModelLoadError(f"{path}: {error.strerror or error}"))
        except LunaError as error:
            ClientRequest(session, message.id, self).fail(error)
        finally:
            if payload is not None:
                payload.release()

    def _pieces(self, session: Session, refs: list[m.TensorRef], payload: Slot | None) -> list[Piece]:
        """Check descriptors and take a use of the memory behind each.

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
            for piece in pieces:
                piece.slot.release()
            raise
        return pieces

    # --- what needs a model ---

    def _compute(self, request: ClientRequest, call: m.Call, message: m.Request, payload: Slot | None) -> None:
        spec = self.resolver.resolve(_model_of(call))
        self._check_served(spec.kind)
        self._check_call(call)
        deadline = None if message.deadline_s is None else time.monotonic() + message.deadline_s
        priority = max(Priority.INTERACTIVE.value, message.priority)
        pieces = self._pieces(request.session, message.tensors, payload)
        key = self._cache_key(spec, call, pieces)
        if key is not None and (kept := self.cache.get(key)) is not None:
            for piece in pieces:
                piece.slot.release()
            request.finish(kept, shared=True)
            return
        same = self.pool.find_same(lambda work: _is_same(work, spec, message.call, pieces))
        if same is not None:
            for piece in pieces:
                piece.slot.release()
            self.coalesced += 1
            same.widen(priority, deadline)
            request.join(same)
            return
        try:
            room = load_bytes(spec)
            patches = self._patch_sets(call)
        except (LunaError, OSError):
            for piece in pieces:
                piece.slot.release()
            raise
        size_key = (spec.key, bytes(message.call)[:_CALL_BYTES], tuple(ref.shape for ref in message.tensors))
        work = Work(
            request.op, message.call, spec, pieces, priority, deadline, [], patches=patches, load_bytes=room,
            pin=isinstance(call, m.ModelLoad) and call.pin,
            keep=None if key is None else lambda outcome: self.cache.put(key, outcome),
            reserve=lambda: self._foretold(size_key), measured=lambda nbytes: self._learn(size_key, nbytes),
        )  # fmt: skip
        request.join(work)
        try:
            self.pool.submit(work)
        except LunaError as error:
            work.fail(error)

    def _foretold(self, size_key: tuple[Any, ...]) -> Slot | None:
        """A slot for a result like the last one of the same call."""
        nbytes = self._sizes.get(size_key, 0)
        return self.arena.try_allocate(nbytes) if self.arena is not None and nbytes else None

    def _learn(self, size_key: tuple[Any, ...], nbytes: int) -> None:
        self._sizes[size_key] = nbytes
        if len(self._sizes) > _SIZES:
            del self._sizes[next(iter(self._sizes))]

    def _patch_sets(self, call: m.Call) -> list[PatchSet]:
        """The patch sets that a call names, with a use of their memory each.

        Raises:
            PatchMissing: one is not kept (any more).
        """
        if not isinstance(call, m.ClipEncode):
            return []
        names = list(dict.fromkeys(use.name for use in [*call.patches, *call.hooks]))
        entries = {name: self.patches.get(name) for name in names}
        missing = [name for name, entry in entries.items() if entry is None]
        if missing:
            raise PatchMissing(f"patch sets {', '.join(missing)} are not kept", "Put them again")
        return [
            PatchSet(name, entry.packed, [Piece(piece.ref, piece.slot.retain()) for piece in entry.pieces])
            for name, entry in entries.items()
            if entry is not None
        ]

    def _check_served(self, kind: str) -> None:
        only = self.settings.service_type
        if (only is ServiceType.VAE_ONLY and kind == ModelKind.CLIP) or (
            only is ServiceType.CLIP_ONLY and kind == ModelKind.VAE
        ):
            raise BadRequest(f"this daemon serves {only.value} only", "Ask the daemon that serves the other kind")

    def _check_call(self, call: m.Call) -> None:
        if isinstance(call, m.Echo):
            if call.nbytes > self.limits.tensor_bytes:
                raise LimitExceeded(f"an echo of {call.nbytes} bytes; the limit is {self.limits.tensor_bytes}")
            if call.nbytes < 0 or call.nbytes % 4 or not 0 <= call.seconds < math.inf:
                raise BadRequest(f"echo of {call.nbytes} bytes in {call.seconds} s: must be whole float32, and a time")
        text = getattr(call, "text", None) or ""
        if len(text) > _MOST_TEXT:
            raise LimitExceeded(f"a prompt of {len(text)} characters; the limit is {_MOST_TEXT}")

    def _cache_key(self, spec: m.LoadSpec, call: m.Call, pieces: list[Piece]) -> bytes | None:
        """Everything that determines a conditioning, embeddings among its tokens too; ``None`` if it is not kept."""
        if not isinstance(call, m.ClipEncode) or not self.cache.max_bytes:
            return None
        if sum(piece.ref.nbytes for piece in pieces) > _COMPARE:
            return None  # too much to hash while others wait
        bare = msgspec.structs.replace(call, model=m.ModelRef(spec.kind))
        key = hashlib.blake2b(spec.key.encode() + b"\0" + bytes(encode_call(bare)), digest_size=16)
        for piece in pieces:
            key.update(f"\0{piece.ref.dtype}{list(piece.ref.shape)}".encode())
            key.update(piece.slot.view)
        return key.digest()

    # --- what needs none ---

    def _ping(self, request: ClientRequest, call: m.Ping, message: m.Request, payload: Slot | None) -> None:
        request.answer(None)

    def _info(self, request: ClientRequest, call: m.Info, message: m.Request, payload: Slot | None) -> None:
        request.answer(self.collect_info(self))

    def _prove(self, request: ClientRequest, call: m.ArenaProof, message: m.Request, payload: Slot | None) -> None:
        if self.arena is None or not hmac.compare_digest(call.nonce.encode(), self.arena.nonce.encode()):
            raise BadRequest("that is not the nonce of this daemon's shared memory", "Use TCP")
        if call.space != process_space():
            raise BadRequest("the client's processes cannot be seen from here: another container", "Use TCP")
        request.session.sees_arena = True
        request.answer(None)

    def _alloc(self, request: ClientRequest, call: m.Alloc, message: m.Request, payload: Slot | None) -> None:
        if not request.session.sees_arena:
            raise BadRequest("shared memory was not proved to be visible to this client", "Send tensors inline")
        if not 0 < call.nbytes <= self.limits.tensor_bytes:
            raise LimitExceeded(f"a slot of {call.nbytes} bytes; the limit is {self.limits.tensor_bytes}")
        held = request.session.leases.nbytes + request.session.reserving
        if held + call.nbytes > self.limits.arena_bytes_per_client:
            raise LimitExceeded(
                f"this client holds {held} bytes of shared memory; the limit is {self.limits.arena_bytes_per_client}",
                "Release tensors, or raise arena_client_mb",
            )
        request.session.reserving += call.nbytes
        self._spawn(self._alloc_later(request, call.nbytes))

    async def _alloc_later(self, request: ClientRequest, nbytes: int) -> None:
        try:
            slot = await self._allocate(nbytes)
        finally:
            request.session.reserving -= nbytes
        if slot is None:
            request.fail(LimitExceeded("shared memory is full", "Send tensors inline"))
        elif not self.is_connected(request.session):
            slot.release()
        else:
            request.answer(None, [self._lease(request.session.leases, slot)])

    def _models(self, request: ClientRequest, call: m.ModelsList, message: m.Request, payload: Slot | None) -> None:
        request.answer(
            {
                "named": {
                    name: {"type": model.type, "vae": model.vae, "clip": model.clip}
                    for name, model in self.resolver.named.items()
                },
                "loaded": {key: nbytes for worker in self.pool.workers for key, nbytes in worker.models.items()},
                "pinned": sorted(self.pool.pinned),
            }
        )

    def _unload(self, request: ClientRequest, call: m.ModelUnload, message: m.Request, payload: Slot | None) -> None:
        key = self.resolver.resolve(call.model).key if call.model is not None else None
        request.answer({"unloaded": self.pool.unload(key)})

    def _patch_put(self, request: ClientRequest, call: m.PatchPut, message: m.Request, payload: Slot | None) -> None:
        pieces = self._pieces(request.session, message.tensors, payload)
        self._keep(self.patches, call.name, LoRAEntry([], pieces, call.packed))
        request.answer(None)

    @staticmethod
    def _keep(cache: LoRACache, name: str, entry: LoRAEntry) -> None:
        try:
            cache.put(name, entry)
        except LunaError:
            for piece in entry.pieces:
                piece.slot.release()
            raise

    def _lora_put(self, request: ClientRequest, call: m.LoraPut, message: m.Request, payload: Slot | None) -> None:
        if len(call.keys) != len(message.tensors):
            raise BadRequest(f"{len(call.keys)} keys for {len(message.tensors)} tensors")
        pieces = self._pieces(request.session, message.tensors, payload)
        self._keep(self.loras, call.name, LoRAEntry(call.keys, pieces))
        request.answer({"success": True, "bytes": sum(piece.slot.nbytes for piece in pieces)})

    def _lora_get(self, request: ClientRequest, call: m.LoraGet, message: m.Request, payload: Slot | None) -> None:
        entry = self.loras.get(call.name)
        if entry is None:
            request.answer({"keys": None})
        else:
            request.finish(Outcome({"keys": entry.keys}, entry.pieces, []), shared=True)

    def _lora_check(self, request: ClientRequest, call: m.LoraCheck, message: m.Request, payload: Slot | None) -> None:
        request.answer({"exists": call.name in self.loras})

    def _lora_stats(self, request: ClientRequest, call: m.LoraStats, message: m.Request, payload: Slot | None) -> None:
        request.answer(self.loras.stats())

    def _register(self, request: ClientRequest, call: m.Register, message: m.Request, payload: Slot | None) -> None:
        request.answer({"success": True, "kind": call.kind, "type": call.type, "note": "models load by configuration"})

    def _report(self, request: ClientRequest, call: m.Report, message: m.Request, payload: Slot | None) -> None:
        self.fallbacks += max(0, call.fallbacks)
        self.materialised += max(0, call.materialised)
        request.answer(None)

    def _drain(self, request: ClientRequest, call: m.Drain, message: m.Request, payload: Slot | None) -> None:
        self.pool.accepting = False
        request.answer({"in_flight": self.pool.in_flight})

    def _shutdown(self, request: ClientRequest, call: m.Shutdown, message: m.Request, payload: Slot | None) -> None:
        request.answer({"in_flight": self.pool.in_flight})
        self.on_shutdown()

    # --- shared memory ---

    async def _allocate(self, nbytes: int) -> Slot | None:
        """A slot, growing the arena if need be; ``None`` when it is full."""
        if self.arena is None:
            return None
        slot = self.arena.try_allocate(nbytes)
        if slot is None:
            await self._grow(nbytes)
            slot = self.arena.try_allocate(nbytes)
        return slot

    async def _grow(self, nbytes: int) -> None:
        async with self._growing:
            if self.arena is None or time.monotonic() < self._full_until:
                return
            probe = self.arena.try_allocate(nbytes)
            if probe is not None:
                probe.release()
                return
            try:
                made = await asyncio.get_running_loop().run_in_executor(None, self.arena.grow, nbytes)
            except LimitExceeded as error:
                if self._full_until == 0.0:
                    logger.warning("%s: tensors go by the socket", error.message)
                # Not asked again at once: to find out costs as much as to fill what is left.
                self._full_until = time.monotonic() + _FULL_S
                return
            self._full_until = 0.0
            self.arena.add(*made)

    async def _grant(self, worker: WorkerProcess, message: m.Request) -> None:
        """A worker asks for a slot for its result; it waits for the answer, so it gets one."""
        assert worker.connection is not None
        slot = None
        try:
            call = decode_call(message.call)
            if isinstance(call, m.Alloc):
                slot = await self._allocate(call.nbytes)
        except Exception:
            logger.exception("no slot for worker %d", worker.number)
        if slot is None:
            worker.connection.send(m.Failure(message.id, LimitExceeded.code, "shared memory is full"))
        elif worker.connection not in self.workers:
            slot.release()
        else:
            worker.connection.send(m.Reply(message.id, None, [self._lease(worker.leases, slot)]))

    @staticmethod
    def _lease(leases: Any, slot: Slot) -> m.TensorRef:
        return m.TensorRef("uint8", (slot.nbytes,), slot.nbytes, slot.offset, leases.add(slot), slot.segment)

    def tidy(self) -> None:
        """Give unused shared memory back, cut off who does not read; called every few seconds."""
        if self.arena is not None:
            self.arena.trim(_TRIM_S)
        for connection in list(self._connections):
            if connection.stalled_s > _STALL_S:
                logger.warning("%s has read nothing for %.0f s and is cut off", connection.remote, connection.stalled_s)
                connection.abort()

    @property
    def unsent(self) -> bool:
        """Whether answers are still on their way to clients that read."""
        return any(connection.unsent and connection.stalled_s < _FULL_S for connection in self._connections)

    def close(self) -> None:
        """Close every connection and forget every cache."""
        self.cache.clear()
        self.patches.clear()
        self.loras.clear()
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


def _model_of(call: m.Call) -> m.ModelRef:
    model = getattr(call, "model", None)
    return model if isinstance(model, m.ModelRef) else m.ModelRef(ModelKind.ECHO)


def _is_same(work: Work, spec: m.LoadSpec, call: msgspec.Raw, pieces: list[Piece]) -> bool:
    """Whether other work computes exactly this."""
    if work.spec.key != spec.key or bytes(work.call) != bytes(call) or spec.kind == ModelKind.ECHO:
        return False
    if len(work.pieces) != len(pieces) or work.pin:
        return False
    return all(
        (a.ref.shape, a.ref.dtype, a.ref.order) == (b.ref.shape, b.ref.dtype, b.ref.order)
        and _equal(a.slot.view, b.slot.view)
        for a, b in zip(work.pieces, pieces)
    )


def _equal(a: memoryview, b: memoryview) -> bool:
    """Bytes compared in pieces: a memoryview's own comparison goes element by element."""
    return a.nbytes == b.nbytes and all(
        bytes(a[at : at + _COMPARE]) == bytes(b[at : at + _COMPARE]) for at in range(0, a.nbytes, _COMPARE)
    )


_HANDLERS: dict[type, Callable[..., None]] = {
    m.Ping: Service._ping, m.Info: Service._info, m.ArenaProof: Service._prove, m.Alloc: Service._alloc,
    m.ModelsList: Service._models, m.ModelUnload: Service._unload, m.PatchPut: Service._patch_put,
    m.LoraPut: Service._lora_put, m.LoraGet: Service._lora_get, m.LoraCheck: Service._lora_check, m.LoraStats: Service._lora_stats,
    m.Register: Service._register, m.Report: Service._report, m.Drain: Service._drain, m.Shutdown: Service._shutdown,
}  # fmt: skip
"""Ops that the control process answers itself; every other op is computed by a worker."""
