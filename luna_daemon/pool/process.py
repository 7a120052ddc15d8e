"""One worker process, seen from the daemon: its start, its connection, its one job, its end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..core import WorkerState, logger
from ..wire import messages as m
from ..wire.arena import Leases, Slot
from ..wire.connection import Connection
from ..wire.frame import encode_call
from ..wire.layout import lay_out
from .spawning import Process, Spawn, spawn
from .work import Outcome, Piece, Work

_TAIL_BYTES = 4096
_SILENT_S = 60.0
"""Seconds without a message after which a worker counts as stuck; long enough for a process that is suspended."""


class WorkerKey(NamedTuple):
    """The kind of work that a worker is started for; the worker takes only work of an equal key."""

    backend: str
    device: str
    """The device as in the settings: ``auto`` stays ``auto`` after the worker has chosen a device."""
    comfy: str = ""
    """``ComfyId.key`` of the ComfyUI that a comfy worker runs."""

    def __str__(self) -> str:
        """Return the key as ``info``, metrics and log lines show it."""
        return f"{self.backend}-{self.comfy}@{self.device}" if self.comfy else f"{self.backend}@{self.device}"


class WorkerProcess:
    """A worker from its start to its end.

    Args:
        number: number of the worker in this daemon, from 1.
        device: where the worker computes; ``auto`` until it has chosen.
        threads: CPU threads that the worker uses.
        config: ``child.WorkerConfig`` as a dictionary, without address and token.
        log: file for the output of the process.
        clock: monotonic seconds.
    """

    def __init__(
        self, number: int, key: WorkerKey, device: str, threads: int, config: dict[str, Any], log: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.number = number
        self.key = key
        self.device = device
        self.threads = threads
        self.config = config
        self.log = log
        self.token = secrets.token_urlsafe(24)
        self._clock = clock
        self.state = WorkerState.STARTING
        self.born = clock()
        self.idle_since = self.born
        self.heard = self.born
        self.started_s = 0.0
        """Seconds from the start of the process until the worker was ready."""
        self.reason = ""
        """Why the backend could not be started, as the worker reported."""
        self.pid = 0
        self.served = 0
        self.rss = 0
        self.models: dict[str, int] = {}
        """Bytes of each loaded model, by key, as the worker last reported."""
        self.used: dict[str, float] = {}
        """Time of the last use of each loaded or loading model, by key."""
        self.kinds: dict[str, str] = {}
        """Kind of each loaded or loading model, by key."""
        self.versions: dict[str, str] = {}
        self.comfy: m.ComfyId | None = None
        """The ComfyUI that the worker runs, if any."""
        self.sees_arena = False
        self.work: Work | None = None
        self.job = 0
        self.leases = Leases()
        self.connection: Connection | None = None
        self._process: Process | None = None

    # --- life ---

    def start(self, interpreter: str, host: str, port: int, spawn: Spawn = spawn) -> None:
        """Start the process, which connects to ``host:port`` and sends its token.

        Raises:
            OSError: the interpreter cannot be run.
        """
        config = {**self.config, "host": host, "port": port, "token": self.token}
        self._process = spawn(interpreter, config, self.log)
        self.pid = self._process.pid
        logger.info("worker %d starts (%s, pid %d)", self.number, self.key, self.pid)

    def on_ready(self, message: m.WorkerReady) -> None:
        """Record that the worker has imported its backend and takes jobs."""
        self.versions, self.sees_arena = message.versions, message.arena
        if self.device == "auto" and message.devices:
            self.device = message.devices[0]
        self.state = WorkerState.IDLE
        self.idle_since = self._clock()
        self.started_s = self.idle_since - self.born
        logger.info("worker %d is ready after %.1f s", self.number, self.started_s)

    @property
    def is_free(self) -> bool:
        """Whether the worker is ready and computes nothing."""
        return self.state is WorkerState.IDLE and self.work is None

    def failure(self, now: float, start_s: float) -> str:
        """Return why the worker must be taken out of service; empty if it need not be.

        Args:
            now: monotonic seconds.
            start_s: how long a start may take.
        """
        if self.state is not WorkerState.STARTING:
            silent_s = now - self.heard
            return f"it has been silent for {silent_s:.0f} s" if silent_s > _SILENT_S else ""
        if self.exited():
            return "it exited during its start"
        return "it did not start in time" if now - self.born > start_s else ""

    def exited(self) -> bool:
        """Whether the process has ended."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """Kill the process; ``exited`` may stay false for a while if the process hangs in a driver."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def stop(self) -> None:
        """Close the connection, upon which the process exits; kill a process that has not connected yet."""
        self.state = WorkerState.STOPPING
        if self.connection is not None:
            self.connection.close()
        else:
            self.kill()

    def abandon(self) -> None:
        """Kill the process, close the connection and forget the job."""
        self.state = WorkerState.DEAD
        self.work, self.job = None, 0
        self.kill()
        if self.connection is not None:
            self.connection.close()

    def last_words(self) -> str:
        """Return why the process ended: the reason that the worker sent, else the last line of its log."""
        if self.reason:
            return self.reason
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                return log.read().decode(errors="replace").rstrip().rpartition("\n")[2].strip()
        except OSError:
            return ""

    # --- work ---

    def give(self, work: Work, job: int, unload: list[str]) -> None:
        """Send a job, which unloads the models ``unload`` first."""
        assert self.connection is not None
        self.work, self.job = work, job
        now = self._clock()
        key = work.spec.key
        self.state = WorkerState.BUSY if key in self.models else WorkerState.LOADING
        for evicted in unload:
            self._forget(evicted)
        for name, spec in work.models.items():
            self.used[name], self.kinds[name] = now, spec.kind
        patches = []
        pieces = list(work.pieces)
        for patch in work.patches:
            patches.append(m.Patch(patch.name, patch.packed, len(pieces), len(patch.pieces), patch.models))
            pieces += patch.pieces
        # above=-1: small inputs stay in shared memory too, where they already are; patches hold thousands of them.
        refs, inline = lay_out(((piece.ref, piece.slot) for piece in pieces), self._in_slot, above=-1)
        room = work.reserve() if self.sees_arena else None
        grant = self.leases.lend(room) if room is not None else None
        message = m.Job(job, work.call, work.spec, refs, unload, patches, grant)
        self.connection.send(message, [slot.retain() for slot in inline])

    def _in_slot(self, ref: m.TensorRef, slot: Slot) -> m.TensorRef | None:
        """Describe an input in shared memory, if this worker can use shared memory."""
        return ref.placed(slot.offset, slot.number, slot.segment) if slot.number and self.sees_arena else None

    def done(self) -> Work | None:
        """Record that the job has ended, with a result or an error, and return its work."""
        work, self.work, self.job = self.work, None, 0
        self.leases.release_all()  # slots that were granted and not used
        self.served += 1
        self.idle_since = self._clock()
        if self.state in (WorkerState.BUSY, WorkerState.LOADING):
            self.state = WorkerState.IDLE
        return work

    def outcome(self, message: m.Reply, payload: Slot | None) -> Outcome:
        """Return a reply with the memory behind each tensor; takes over the payload."""
        pieces = []
        for ref in message.tensors:
            if ref.slot:
                pieces.append(Piece(ref, self.leases.take(ref.slot)))
            elif payload is not None:
                pieces.append(Piece(ref, payload.part(ref.offset, ref.nbytes)))
            else:
                pieces.append(Piece(ref, Slot.on_heap(0)))
        if payload is not None:
            payload.release()
        return Outcome(message.result, pieces, message.notes)

    def cancel(self) -> None:
        """Ask the worker to stop its job at the next tile."""
        if self.connection is not None and self.job:
            self.connection.send(m.Cancel(self.job))

    def unload(self, keys: list[str]) -> None:
        """Ask the worker to unload models."""
        if self.connection is not None and keys:
            for key in keys:
                self._forget(key)
            self.connection.send(m.Unload(keys))

    def ping(self) -> None:
        """Ask for a sign of life; the worker's reader thread answers even while a job computes."""
        if self.connection is not None:
            self.connection.send(m.Request(0, encode_call(m.Ping())))

    def on_status(self, message: m.WorkerStatus) -> None:
        """Record which models the worker holds."""
        self.models, self.rss = message.models, message.rss
        busy = self.work.models if self.work is not None else {}
        for key in [key for key in self.used if key not in self.models and key not in busy]:
            self._forget(key)
        if self.state is WorkerState.LOADING and self.work is not None and self.work.spec.key in self.models:
            self.state = WorkerState.BUSY

    def _forget(self, key: str) -> None:
        self.models.pop(key, None)
        self.used.pop(key, None)
        self.kinds.pop(key, None)
