"""The worker process: connects to the daemon, loads models on demand, computes one job at a time.

The daemon starts this file as a script. The settings come as one JSON line on standard input, since the one-time token
in them must not show in the process list.
"""

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    from luna_daemon.system.script import run_as_module

    run_as_module("luna_daemon.pool.child")

import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from .. import __version__
from ..backends import make_backend
from ..backends.base import Backend
from ..core import (
    PROTOCOL_VERSION,
    BadRequest,
    ConfigError,
    DaemonConnectionError,
    InternalError,
    LunaError,
    ModelLoadError,
    OutOfMemory,
    RequestCancelled,
    logger,
)
from ..wire import messages as m
from ..wire.arena import ArenaUnavailable, ArenaView
from ..wire.channel import Channel
from ..wire.frame import decode_call, encode_call
from ..wire.layout import lay_out
from . import compute
from .devices import inner_device

_STATUS_S = 1.0
_TRACE_FRAMES = 20


@dataclass(frozen=True)
class WorkerConfig:
    """The settings of a worker, which the daemon writes to its standard input."""

    host: str
    port: int
    token: str
    backend: str
    threads: int = 0
    """CPU threads; 0 leaves the number to torch."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the backend: ComfyUI's folder and flags."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables, such as those that mask devices; set before torch is imported."""


class Worker:
    """A worker's connection, models and jobs.

    Raises:
        OSError: the daemon does not accept the connection.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.channel = Channel(socket.create_connection((config.host, config.port), timeout=10))
        self.arena: ArenaView | None = None
        self.models: dict[str, Any] = {}
        self._reported = 0.0
        self.cancelled: set[int] = set()
        self.jobs: queue.SimpleQueue[tuple[m.Job | m.Unload, memoryview] | None] = queue.SimpleQueue()
        self.grants: queue.SimpleQueue[m.Reply | m.Failure] = queue.SimpleQueue()

    def run(self) -> None:
        """Greet the daemon, import the backend, then serve jobs until the daemon closes the connection.

        Raises:
            DaemonConnectionError: the daemon refused this worker or has ended.
            SystemExit: the backend cannot be started; the reason was sent to the daemon.
        """
        self._greet()
        backend = self._start_backend()
        reader = threading.Thread(target=self._read, name="reader", daemon=True)
        reader.start()
        self.channel.send(m.WorkerReady(backend.name, backend.versions(), backend.devices(), self.arena is not None))
        while (item := self.jobs.get()) is not None:
            message, payload = item
            if isinstance(message, m.Unload):
                self._unload(message.keys)
            else:
                self._serve(backend, message, payload)
            self._report_status(message)

    def _greet(self) -> None:
        self.channel.send(
            m.Hello(PROTOCOL_VERSION, self.config.token, "worker", self.config.backend, os.getpid(), __version__)
        )
        received = self.channel.receive(10)
        if received is None or not isinstance(received[0], m.Welcome):
            raise DaemonConnectionError(f"the daemon refused this worker; its answer was {received and received[0]}")
        self._open_arena(received[0].arena)

    def _open_arena(self, info: m.ArenaInfo | None) -> None:
        if info is None:
            return
        view = ArenaView(Path(info.folder))
        try:
            view.prove()
            self.arena = view
        except ArenaUnavailable as error:
            logger.warning("this worker cannot use shared memory, tensors go over the socket: %s", error)

    def _start_backend(self) -> Backend:
        os.environ.update(self.config.variables)
        try:
            backend = make_backend(self.config.backend, self.config.options)
            if "torch" in backend.versions() and self.config.threads:
                import torch

                torch.set_num_threads(self.config.threads)
        except Exception as error:
            logger.exception("the %s backend cannot be started", self.config.backend)
            self._fail(0, error if isinstance(error, LunaError) else InternalError.of(error))
            raise SystemExit(1) from error
        return backend

    # --- the reader thread ---

    def _read(self) -> None:
        """Read messages while a job computes, so that a cancel or the daemon's end is noticed at once."""
        try:
            while True:
                received = self.channel.receive()
                assert received is not None
                self._dispatch(*received)
        except DaemonConnectionError:
            # The daemon has ended: nothing waits for the result, and nothing else ends this process.
            os._exit(0)
        except LunaError as error:
            logger.error("the worker exits: the daemon sent a bad message: %s", error)
            os._exit(1)

    def _dispatch(self, message: m.Message, payload: memoryview) -> None:
        if isinstance(message, (m.Job, m.Unload)):
            self.jobs.put((message, payload))
        elif isinstance(message, m.Cancel):
            self.cancelled.add(message.id)
        elif isinstance(message, (m.Reply, m.Failure)):
            self.grants.put(message)
        elif isinstance(message, m.Request):
            self.channel.send(m.Reply(message.id))

    # --- jobs ---

    def _serve(self, backend: Backend, job: m.Job, payload: memoryview) -> None:
        try:
            self._unload(job.unload)
            model = self._model(backend, job.id, job.model)
            inputs = [(ref, self._input(ref, payload)) for ref in job.tensors]
            step = partial(self._step, job.id)
            borrow = partial(self._model, backend, job.id)
            result = compute.run(decode_call(job.call), model, inputs, step, job.patches, borrow)
            self._reply(job, result)
        except LunaError as error:
            self._fail(job.id, error)
        except MemoryError as error:
            self._fail(job.id, OutOfMemory(f"not enough memory for the call: {str(error) or 'allocation failed'}"))
        except Exception as error:
            logger.exception("job %d failed", job.id)
            trace = "".join(traceback.format_tb(error.__traceback__, -_TRACE_FRAMES))
            self._fail(job.id, InternalError.of(error), trace)
        finally:
            self.cancelled.discard(job.id)
            compute.release_device_cache()

    def _model(self, backend: Backend, job: int, wanted: m.LoadSpec) -> Any:
        model = self.models.get(wanted.key)
        if model is None:
            self.channel.send(m.Progress(job, "loading"))
            spec = msgspec.structs.replace(wanted, device=inner_device(wanted.device))
            try:
                model = self.models[wanted.key] = backend.load(spec)
            except ConfigError as error:  # a family or device that this backend does not know
                raise ModelLoadError(error.message, error.hint) from error
            self._report_status()
            self.channel.send(m.Progress(job, "running"))
        return model

    def _unload(self, keys: list[str]) -> None:
        unloaded = [model for key in keys if (model := self.models.pop(key, None)) is not None]
        if unloaded:
            for model in self.models.values():
                if hasattr(model, "forget"):
                    model.forget(unloaded)
            unloaded.clear()
            compute.free_memory()

    def _input(self, ref: m.TensorRef, payload: memoryview) -> memoryview:
        if ref.slot == 0:
            return payload[ref.offset : ref.offset + ref.nbytes]
        if self.arena is None:
            raise BadRequest("a tensor lies in shared memory that this worker cannot use")
        return self.arena.slice(ref.segment, ref.offset, ref.nbytes)

    def _step(self, job: int, done: int, total: int) -> None:
        if job in self.cancelled:
            raise RequestCancelled("the caller cancelled the request")
        if total > 1:
            self.channel.send(m.Progress(job, "tile", done, total))

    # --- answers ---

    def _reply(self, job: m.Job, result: compute.Result) -> None:
        grant = job.grant

        def in_slot(ref: m.TensorRef, data: memoryview) -> m.TensorRef | None:
            nonlocal grant
            slot: m.TensorRef | None
            if grant is not None and grant.nbytes == ref.nbytes:
                slot, grant = grant, None  # the granted slot holds one tensor
            else:
                slot = self._reserve(ref.nbytes)
            if slot is None or self.arena is None:
                return None
            self.arena.slice(slot.segment, slot.offset, ref.nbytes)[:] = data
            return ref.placed(slot.offset, slot.slot, slot.segment)

        refs, payload = lay_out(result.tensors, in_slot)
        self.channel.send(m.Reply(job.id, result.value, refs, result.notes), payload)

    def _reserve(self, nbytes: int) -> m.TensorRef | None:
        """Ask the daemon for a slot for a result; ``None`` if there is none, so that the bytes go over the socket."""
        if self.arena is None:
            return None
        self.channel.send(m.Request(0, encode_call(m.Alloc(nbytes))))
        grant = self.grants.get()
        return grant.tensors[0] if isinstance(grant, m.Reply) else None

    def _fail(self, job: int, error: LunaError, trace: str = "") -> None:
        self.channel.send(m.Failure(job, error.code, error.message, error.hint, trace=trace))

    def _report_status(self, after: m.Message | None = None) -> None:
        """Send which models are loaded, and the memory used.

        Measuring memory is slow, so after a job that unloaded nothing a status is sent at most once a second.
        """
        now = time.monotonic()
        if isinstance(after, m.Job) and not after.unload and now - self._reported < _STATUS_S:
            return
        self._reported = now
        import psutil

        models = {key: int(model.nbytes) for key, model in self.models.items()}
        self.channel.send(m.WorkerStatus(models, int(psutil.Process().memory_info().rss)))


def main() -> None:
    """Read the settings from standard input and serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    config = WorkerConfig(**json.loads(sys.stdin.readline()))
    try:
        Worker(config).run()
    except DaemonConnectionError as error:
        logger.info("the worker exits: %s", error)


if __name__ == "__main__":
    main()
