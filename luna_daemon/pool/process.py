"""One worker process, seen from the daemon: its start, its connection, its one job, its end."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..core import WorkerState, logger
from ..wire import messages as m
from ..wire.arena import Leases, Slot
from ..wire.connection import Connection
from ..wire.frame import encode_call
from .orphans import hold
from .work import Outcome, Piece, Work

_TAIL_BYTES, _TRACE_BYTES = 4096, 32 << 10
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""Threads that spin while they wait slow everybody on busy cores, themselves most; those that sleep at once are slower
on idle ones. So they spin for half a millisecond at most. No bit depends on it. Record 4 has the figures."""


class Process(Protocol):
    """What is asked of a started process; ``subprocess.Popen`` is one."""

    pid: int

    def poll(self) -> int | None:
        """Return its exit code, or ``None`` while it runs."""
        ...

    def kill(self) -> None:
        """Ask the system to end it now."""
        ...


Spawn = Callable[[str, dict[str, Any], Path], Process]
"""Starts a worker's process: interpreter, settings for its standard input, log file. Raises ``OSError``."""


def spawn(interpreter: str, config: dict[str, Any], log: Path) -> Process:
    """Start a worker's process.

    Args:
        config: written to its standard input as one JSON line.
        log: what it prints is appended here.

    Raises:
        OSError: the interpreter cannot be run.
    """
    script = Path(__file__).resolve().with_name("child.py")
    environment = {**_waiting(), **os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [interpreter, str(script)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            # Of its own, so that Ctrl-C in the daemon's terminal drains instead of killing what computes.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    try:
        hold(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(config).encode() + b"\n")
        process.stdin.close()
    except OSError:
        process.kill()
        raise
    return process


class WorkerProcess:
    """A worker from its start to its end.

    Args:
        key: backend and device, with ComfyUI its folder, interpreter and flags; work is routed by it.
        config: what the child reads from standard input, without address and token.
        log: file for what the child prints.
        clock: monotonic seconds.
    """

    def __init__(
        self, number: int, key: str, device: str, threads: int, config: dict[str, Any], log: Path,
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
        """How long its start took."""
        self.pid = 0
        self.served = 0
        self.rss = 0
        self.models: dict[str, int] = {}
        """Loaded models and their bytes."""
        self.used: dict[str, float] = {}
        """Per loaded or loading model the time of its last use."""
        self.kinds: dict[str, str] = {}
        """Per such model its kind."""
        self.versions: dict[str, str] = {}
        self.comfy: m.ComfyId | None = None
        """The ComfyUI that it runs, if any."""
        self.devices: list[str] = []
        self.sees_arena = False
        self.work: Work | None = None
        self.job = 0
        self.leases = Leases()
        self.connection: Connection | None = None
        self._process: Process | None = None

    # --- life ---

    def start(self, interpreter: str, host: str, port: int, spawn: Spawn = spawn) -> None:
        """Start the process; it dials back to ``host:port`` with its token.

        Raises:
            OSError: the interpreter cannot be run.
        """
        config = {**self.config, "host": host, "port": port, "token": self.token}
        self._process = spawn(interpreter, config, self.log)
        self.pid = self._process.pid
        logger.info("worker %d starts (%s, pid %d)", self.number, self.key, self.pid)

    def greeted(self, connection: Connection) -> None:
        """Its connection is here."""
        self.connection = connection

    def ready(self, message: m.WorkerReady) -> None:
        """It has imported its backend."""
        self.versions, self.devices, self.sees_arena = message.versions, message.devices, message.arena
        if self.device == "auto" and message.devices:
            self.device = message.devices[0]
        self.state = WorkerState.IDLE
        self.idle_since = self._clock()
        self.started_s = self.idle_since - self.born
        logger.info("worker %d is ready after %.1f s", self.number, self.started_s)

    def exited(self) -> bool:
        """Whether the process has ended."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """End it now; ``exited`` tells when it has (one that hangs in a driver takes its time)."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def stop(self) -> None:
        """Let it end: it exits when its connection closes."""
        self.state = WorkerState.STOPPING
        if self.connection is not None:
            self.connection.close()
        else:
            self.kill()

    def tail(self) -> str:
        """The last thing it printed: why a start failed."""
        lines = self._printed(_TAIL_BYTES).splitlines()
        return lines[-1].strip() if lines else ""

    def trace(self) -> str:
        """The traceback that it printed last, without its heading; empty if there is none."""
        _, heading, trace = self._printed(_TRACE_BYTES).rpartition("Traceback (most recent call last):\n")
        return trace if heading else ""

    def _printed(self, nbytes: int) -> str:
        """The end of its log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - nbytes))
                return log.read().decode(errors="replace").rstrip()
        except OSError:
            return ""

    # --- work ---

    def give(self, work: Work, job: int, unload: list[str]) -> None:
        """Send it a job."""
        assert self.connection is not None
        self.work, self.job = work, job
        work.started = self._clock()
        key = work.spec.key
        self.state = WorkerState.BUSY if key in self.models else WorkerState.LOADING
        for gone in unload:
            self._forget(gone)
        for name, spec in work.models.items():
            self.used[name], self.kinds[name] = work.started, spec.kind
        patches = []
        pieces = list(work.pieces)
        for patch in work.patches:
            patches.append(m.Patch(patch.name, patch.packed, len(pieces), len(patch.pieces), patch.models))
            pieces += patch.pieces
        refs, inline = self._placed(pieces)
        slot = work.reserve() if self.sees_arena else None
        grant = self.leases.lend(slot) if slot is not None else None
        self.connection.send(m.Job(job, work.call, work.spec, refs, unload, patches, grant), inline)

    def _placed(self, pieces: list[Piece]) -> tuple[list[m.TensorRef], list[Slot]]:
        """Descriptors for this worker, and the slots that must travel with the job."""
        refs: list[m.TensorRef] = []
        inline: list[Slot] = []
        at = 0
        for piece in pieces:
            ref, slot = piece.ref, piece.slot
            if slot.number and self.sees_arena:
                refs.append(ref.placed(slot.offset, slot.number, slot.segment))
            else:
                refs.append(ref.placed(at))
                inline.append(slot.retain())
                at += ref.nbytes
        return refs, inline

    def done(self) -> Work | None:
        """Its job has ended, one way or the other."""
        work, self.work, self.job = self.work, None, 0
        self.leases.release_all()  # slots that it was granted and did not use
        self.served += 1
        self.idle_since = self._clock()
        if self.state in (WorkerState.BUSY, WorkerState.LOADING):
            self.state = WorkerState.IDLE
        return work

    def outcome(self, message: m.Reply, payload: Slot | None) -> Outcome:
        """Its answer with the memory behind each tensor; takes over the payload."""
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
        """Stop its job at the next tile."""
        if self.connection is not None and self.job:
            self.connection.send(m.Cancel(self.job))

    def unload(self, keys: list[str]) -> None:
        """Have it give models' memory back."""
        if self.connection is not None and keys:
            for key in keys:
                self._forget(key)
            self.connection.send(m.Unload(keys))

    def ping(self) -> None:
        """Ask for a sign of life; its reader thread answers even while a job computes."""
        if self.connection is not None:
            self.connection.send(m.Request(0, encode_call(m.Ping())))

    def status(self, message: m.WorkerStatus) -> None:
        """It told what it holds."""
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


def _waiting() -> dict[str, str]:
    """How the threads of a worker wait for each other, unless somebody has decided about it."""
    return {} if WAITING.keys() & os.environ.keys() else WAITING
