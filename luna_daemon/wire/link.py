"""A client's connection, from ``hello`` to its end; ``Caller`` opens a new connection after a failure.

Requests are multiplexed by id. There is no reader thread: a waiting thread reads for all threads, which saves a thread
switch per call. Results in shared memory become tensors that own a slot, and release the slot when they are deleted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import (
    BadRequest,
    DaemonConnectionError,
    LunaError,
    Priority,
    RequestCancelled,
    error_from_code,
)
from . import messages as m
from .arena import ArenaUnavailable, ArenaView, process_space
from .buffers import Buffers
from .codec import check_ref, describe, tensor_bytes, tensor_from
from .dial import greet
from .frame import encode_call
from .layout import RESERVE_BYTES, lay_out

if TYPE_CHECKING:
    import torch

_SILENCE_S = 60.0
_PROBE_S = 0.1
"""How often a waiting call polls ``is_cancelled``, in seconds."""

OnProgress = Callable[[m.Progress], None]
IsCancelled = Callable[[], bool]


class Answer:
    """Result of a call: ``result`` (plain data), ``tensors``, and ``notes`` for the user."""

    __slots__ = ("notes", "result", "tensors")

    def __init__(self, result: Any, tensors: list[torch.Tensor], notes: list[str]) -> None:
        self.result = result
        self.tensors = tensors
        self.notes = notes


class Unopened:
    """An answer with descriptors instead of tensors; its slots are held until ``Link.give_back``."""

    __slots__ = ("payload", "refs", "result")

    def __init__(self, result: Any, refs: list[m.TensorRef], payload: memoryview) -> None:
        self.result = result
        self.refs = refs
        self.payload = payload


class _Waiting:
    """State of a request that waits for its outcome."""

    __slots__ = ("event", "heard", "outcome", "payload", "progress")

    def __init__(self) -> None:
        self.event = threading.Event()
        self.outcome: m.Reply | m.Failure | DaemonConnectionError | None = None
        self.payload = memoryview(b"")
        self.progress: deque[m.Progress] = deque()
        self.heard = time.monotonic()


class Link:
    """One connection to the daemon, used by any number of threads; not reusable after a failure.

    Args:
        use_arena: take tensors through shared memory where both sides see it.
        tls_ca: trusted authority, as for ``wire.tls.client_context``; if empty, the certificate of the runtime folder.
    """

    def __init__(
        self, host: str, port: int, runtime_dir: Path | None, name: str, use_arena: bool, tls_ca: str = ""
    ) -> None:
        self.use_arena = use_arena
        self.waiting: dict[int, _Waiting] = {}
        self.released: deque[int] = deque()
        self._leased: dict[int, int] = {}
        self._broken: DaemonConnectionError | None = None
        self._closed = False
        self._open = True
        self._calls = 0
        self._used = time.monotonic()
        self._pid = os.getpid()
        self._reading = threading.Lock()
        self._buffers = Buffers()
        self._next_id = 1
        self._id_lock = threading.Lock()
        self.arena: ArenaView | None = None
        self.channel, self.welcome = greet(host, port, runtime_dir, name, tls_ca)
        self.transport, self.transport_why = "tcp", self.welcome.arena_why
        if use_arena:
            try:
                self._try_arena()
            except BaseException:
                self.channel.close()
                raise
        else:
            self.transport_why = "shared memory is switched off in the client"

    @property
    def broken(self) -> DaemonConnectionError | None:
        """Why the connection broke, or ``None``. Checks an idle connection: the daemon may have been restarted."""
        idle = not self.waiting and time.monotonic() - self._used > _PROBE_S
        if self._broken is None and idle and self.channel.ended():
            self._break(DaemonConnectionError("the daemon closed the connection"))
        return self._broken

    def _try_arena(self) -> None:
        info = self.welcome.arena
        if info is None:
            return
        view = ArenaView(Path(info.folder))
        try:
            nonce = view.prove()
        except (ArenaUnavailable, UnicodeDecodeError) as error:
            self.transport_why = f"the daemon's shared memory is not visible here: {error}"
            return
        try:
            self.call(m.ArenaProof(nonce, process_space()), [], None, Priority.NORMAL, None, None)
        except BadRequest:
            self.transport_why = f"{view.folder} is not the daemon's shared memory: another container or machine"
            return
        self.arena = view
        self.transport, self.transport_why = "shared memory", "client and daemon share memory"

    # --- calls ---

    def call(
        self,
        call: m.Call,
        tensors: Sequence[torch.Tensor],
        deadline_s: float | None,
        priority: int,
        on_progress: OnProgress | None,
        is_cancelled: IsCancelled | None,
    ) -> Answer:
        """Make a call; ``Caller.call`` describes arguments and errors."""
        slots: list[int] = []
        with self._id_lock:
            self._calls += 1
        try:
            try:
                refs, payload = self._place(tensors, slots)
                waiting = self._ask(call, refs, payload, deadline_s, priority, on_progress, is_cancelled)
            finally:
                if slots:
                    self.released.extend(slots)
                    self._flush_releases()
            return self._unpack(waiting)
        finally:
            with self._id_lock:
                self._calls -= 1
            self._used = time.monotonic()
            self._hang_up_if_done()

    def call_for_refs(
        self, call: m.Call, on_progress: OnProgress | None = None, is_cancelled: IsCancelled | None = None
    ) -> Unopened:
        """Make a call without tensors; returns the answer's descriptors, for a caller that maps the memory itself."""
        with self._id_lock:
            self._calls += 1
        try:
            waiting = self._ask(call, [], [], on_progress=on_progress, is_cancelled=is_cancelled)
            reply = _reply(waiting)
            for ref in reply.tensors:
                if ref.slot:
                    self._leased.setdefault(ref.slot, 0)
            return Unopened(reply.result, reply.tensors, waiting.payload)
        finally:
            with self._id_lock:
                self._calls -= 1
            self._used = time.monotonic()
            self._hang_up_if_done()

    def tensors(self, answer: Unopened) -> list[torch.Tensor]:
        """The tensors of ``answer``, as ``call`` would return them."""
        return self._open_all(answer.refs, answer.payload)

    def give_back(self, answer: Unopened) -> None:
        """Release the answer's slots. May run in any thread and in a finalizer."""
        for ref in answer.refs:
            if ref.slot:
                self._let_go(ref.slot)

    def _ask(
        self,
        call: m.Call,
        refs: list[m.TensorRef],
        payload: list[memoryview],
        deadline_s: float | None = None,
        priority: int = Priority.NORMAL,
        on_progress: OnProgress | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> _Waiting:
        """Send a request and wait for its outcome."""
        with self._id_lock:
            number, self._next_id = self._next_id, self._next_id + 1
        waiting = self.waiting[number] = _Waiting()
        try:
            self._send(m.Request(number, encode_call(call), refs, deadline_s, int(priority)), payload)
            self._wait(number, waiting, on_progress, is_cancelled)
        except BaseException:
            # The call ends without its answer (cancelled, or Ctrl-C): the daemon need not go on.
            if waiting.outcome is None and self._open:
                with contextlib.suppress(DaemonConnectionError):
                    self.channel.send(m.Cancel(number))
            raise
        finally:
            self.waiting.pop(number, None)
            self._wake_next_reader()
        return waiting

    def _place(self, tensors: Sequence[torch.Tensor], slots: list[int]) -> tuple[list[m.TensorRef], list[memoryview]]:
        """Write large tensors into arena slots, appended to ``slots``; other tensors are sent with the request."""
        described = [(describe(tensor), tensor_bytes(tensor)) for tensor in tensors]
        for ref, _ in described:
            check_ref(ref, self.welcome.limits.tensor_bytes)

        def in_slot(ref: m.TensorRef, data: memoryview) -> m.TensorRef | None:
            slot = self._reserve(ref.nbytes)
            if slot is None or self.arena is None:
                return None
            slots.append(slot.slot)
            self.arena.slice(slot.segment, slot.offset, ref.nbytes)[:] = data
            return ref.placed(slot.offset, slot.slot, slot.segment)

        return lay_out(described, in_slot, above=RESERVE_BYTES)

    def _reserve(self, nbytes: int) -> m.TensorRef | None:
        """Reserve a slot for an input; ``None`` if there is no shared memory or it is full."""
        if self.arena is None:
            return None
        waiting = self._ask(m.Alloc(nbytes), [], [])
        return waiting.outcome.tensors[0] if isinstance(waiting.outcome, m.Reply) else None

    def _send(self, message: m.Message, payload: list[memoryview]) -> None:
        if self._broken is not None:
            raise self._broken
        try:
            self.channel.send(message, payload)
        except DaemonConnectionError as error:
            self._break(error)
            raise
        self._flush_releases()

    def _wait(
        self, number: int, waiting: _Waiting, on_progress: OnProgress | None, is_cancelled: IsCancelled | None
    ) -> None:
        """Wait for the outcome. One waiting thread reads for all threads; the others sleep on their event."""
        probe = _PROBE_S if is_cancelled is not None else 1.0
        while waiting.outcome is None:
            if self._reading.acquire(blocking=False):
                try:
                    self._read_until(waiting, probe)
                finally:
                    self._reading.release()
                    self._wake_next_reader()
            else:
                waiting.event.wait(probe)
                waiting.event.clear()
            while waiting.progress:
                progress = waiting.progress.popleft()
                if on_progress is not None:
                    on_progress(progress)
            if waiting.outcome is None:
                self._check_alive(number, waiting, is_cancelled)

    def _read_until(self, waiting: _Waiting, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while waiting.outcome is None and not waiting.progress:
            left = end - time.monotonic()
            if left <= 0:
                return
            try:
                received = self.channel.receive(left)
            except LunaError as error:
                self._break(error)
                return
            if received is not None:
                self._deliver(*received)

    def _deliver(self, message: m.Message, payload: memoryview) -> None:
        if isinstance(message, m.Failure) and message.id == 0:
            self._break(error_from_code(message.code, message.message, message.hint))
            return
        if not isinstance(message, (m.Reply, m.Failure, m.Progress)):
            return
        waiting = self.waiting.get(message.id)
        if waiting is None:
            if isinstance(message, m.Reply):
                self._drop(message.tensors)
            return
        waiting.heard = time.monotonic()
        if isinstance(message, m.Progress):
            waiting.progress.append(message)
        else:
            waiting.outcome, waiting.payload = message, payload
        waiting.event.set()

    def _wake_next_reader(self) -> None:
        for other in list(self.waiting.values()):
            if other.outcome is None:
                other.event.set()
                return

    def _check_alive(self, number: int, waiting: _Waiting, is_cancelled: IsCancelled | None) -> None:
        if is_cancelled is not None and is_cancelled():
            raise RequestCancelled("the caller cancelled the request")
        silent = time.monotonic() - waiting.heard
        if silent > _SILENCE_S:
            self._break(DaemonConnectionError(f"the daemon has been silent for {silent:.0f} s"))

    def _unpack(self, waiting: _Waiting) -> Answer:
        reply = _reply(waiting)
        return Answer(reply.result, self._open_all(reply.tensors, waiting.payload), reply.notes)

    def _open_all(self, refs: list[m.TensorRef], payload: memoryview) -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        try:
            for ref in refs:
                tensors.append(self._tensor(ref, payload))  # noqa: PERF401 (the part made before an error counts)
        except BaseException:
            self._drop(refs[len(tensors) :])
            raise
        return tensors

    def _drop(self, refs: Sequence[m.TensorRef]) -> None:
        """Release the slots of results that are not used."""
        self.released.extend(ref.slot for ref in refs if ref.slot)
        self._flush_releases()

    def _tensor(self, ref: m.TensorRef, payload: memoryview) -> torch.Tensor:
        """A tensor that belongs to the caller: over the slot, which the tensor then owns, or over a copy."""
        check_ref(ref, 1 << 62)
        if ref.slot == 0:
            return tensor_from(ref, payload[ref.offset : ref.offset + ref.nbytes])
        assert self.arena is not None
        try:
            view = self.arena.slice(ref.segment, ref.offset, ref.nbytes)
        except BadRequest as error:
            # The segment was removed, or no address space is left: the next connection negotiates its transport again.
            self._break(DaemonConnectionError(f"a result in shared memory cannot be read: {error.message}"))
            raise self._broken or error from error
        leased = sum(list(self._leased.values())) + ref.nbytes
        if ref.shared or leased > self.welcome.limits.arena_bytes_per_client * 3 // 4:
            own = self._buffers.take(ref.nbytes)
            own[:] = view
            self._let_go(ref.slot)
            return tensor_from(ref, own)
        self._leased[ref.slot] = ref.nbytes
        weakref.finalize(view, self._let_go, ref.slot).atexit = False
        return tensor_from(ref, view)

    # --- releasing slots ---

    def _let_go(self, slot: int) -> None:
        """Release a slot whose tensor was deleted. May run in any thread and in a finalizer, so never waits."""
        self._leased.pop(slot, None)
        self.released.append(slot)
        self._flush_releases()
        self._hang_up_if_done()

    def _flush_releases(self) -> None:
        """Report released slots to the daemon; if a send is in progress, the sending thread reports them afterwards."""
        while self.released and self._open and self._is_owner:
            slots: list[int] = []
            with contextlib.suppress(IndexError):
                while True:
                    slots.append(self.released.popleft())
            try:
                if slots and not self.channel.try_send(m.Release(slots)):
                    self.released.extend(slots)
                    if self.channel.sending:
                        return
            except DaemonConnectionError:
                return

    # --- the end ---

    @property
    def _is_owner(self) -> bool:
        """Whether this process opened the connection; a forked child must not use its parent's socket and slots."""
        return os.getpid() == self._pid

    def _break(self, error: LunaError) -> None:
        """Close the connection; all waiting calls raise ``error``, and the next call connects again."""
        self._fail_all(error)
        self._open = False
        if self._is_owner:
            self.channel.close()
        else:
            self.channel.abandon()

    def _fail_all(self, error: LunaError) -> None:
        lost = error if isinstance(error, DaemonConnectionError) else DaemonConnectionError(error.message, error.hint)
        if self._broken is None:
            self._broken = lost
        for waiting in list(self.waiting.values()):
            if waiting.outcome is None:
                waiting.outcome = self._broken
                waiting.event.set()

    def close(self) -> None:
        """Cancel all calls. The socket stays open until the last tensor in a slot is deleted."""
        if self._open and self._is_owner:
            for number, waiting in list(self.waiting.items()):
                if waiting.outcome is None:
                    with contextlib.suppress(DaemonConnectionError):
                        self.channel.send(m.Cancel(number))
        self._fail_all(DaemonConnectionError("the client was closed"))
        self._closed = True
        self._hang_up_if_done()

    def _hang_up_if_done(self) -> None:
        if not self._closed or not self._open or (self._is_owner and (self._calls or self._leased)):
            return
        if self._is_owner:
            with contextlib.suppress(DaemonConnectionError):
                self.channel.try_send(m.Bye())
        self._break(DaemonConnectionError("the client was closed"))


def _reply(waiting: _Waiting) -> m.Reply:
    """The outcome of a request; an outcome that is an error is raised."""
    outcome = waiting.outcome
    if isinstance(outcome, m.Failure):
        raise error_from_code(outcome.code, outcome.message, outcome.hint, outcome.retry_after_s)
    if not isinstance(outcome, m.Reply):
        assert outcome is not None
        raise outcome
    return outcome
