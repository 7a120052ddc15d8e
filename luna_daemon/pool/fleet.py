"""The pool's worker processes: started with back-off, found by token or key, stopped when idle."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ..config import Settings
from ..core import ModelKind, WorkerState, logger
from ..wire import messages as m
from ..wire.connection import Connection
from . import launch, policy
from .events import Events, model_name
from .process import WorkerKey, WorkerProcess
from .spawning import Spawn
from .supervisor import Backoff

_EXIT_S = 2.0
_OUTDATED_S = 60.0
"""How long a client is refused without starting a worker, after a worker had other versions than the client."""


class Fleet:
    """All worker processes: those that serve, and those that have yet to exit.

    Args:
        logs: folder for what workers print.
        events: receives events of workers and models.
        clock: monotonic seconds.
        sleep: pauses while processes exit.
        spawn: starts a process.
    """

    def __init__(
        self,
        logs: Path,
        events: Events,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        spawn: Spawn,
    ) -> None:
        self.workers: list[WorkerProcess] = []
        self.address = ("", 0)
        """Host and port that workers dial."""
        self._logs, self._events, self._clock, self._sleep, self._spawn = logs, events, clock, sleep, spawn
        self._backoffs: dict[WorkerKey, Backoff] = {}
        self._outdated: dict[m.ComfyId, float] = {}
        """Clients' ComfyUIs whose files were updated while they ran, with the time when a new worker showed that."""
        self._by_token: dict[str, WorkerProcess] = {}
        self._exiting: list[WorkerProcess] = []
        self._numbers = 0

    def of_key(self, key: WorkerKey) -> list[WorkerProcess]:
        """Return the workers of a key."""
        return [worker for worker in self.workers if worker.key == key]

    # --- starting ---

    def backoff(self, key: WorkerKey) -> Backoff:
        """Return when a worker of this key may be started, and why not now."""
        return self._backoffs.setdefault(key, Backoff(clock=self._clock))

    def check(self, key: WorkerKey, comfy: m.ComfyId | None) -> None:
        """Check that a running worker may serve work of a key, or that a worker may be started for it.

        Raises:
            WorkerCrashed: no worker of the key runs, and the delay before the next start has not passed.
            ComfyRefused: a new worker would have other versions than the client.
        """
        workers = self.of_key(key)
        if not workers and self.backoff(key).wait_s:
            raise self.backoff(key).error()
        if comfy is not None and self._clock() - self._outdated.get(comfy, -math.inf) < _OUTDATED_S:
            raise launch.unlike(comfy, next((worker.versions for worker in workers), {}))

    def start(self, key: WorkerKey, spec: m.LoadSpec, settings: Settings) -> None:
        """Start a worker.

        Raises:
            OSError: the interpreter cannot be run.
            ConfigError: the settings do not say where ComfyUI is, or name a device that does not exist.
        """
        self._numbers += 1
        log = self._logs / f"worker-{self._numbers}.log"
        worker, interpreter = launch.new_worker(self._numbers, key, spec, settings, log, self._clock)
        worker.start(interpreter, *self.address, self._spawn)
        self.workers.append(worker)
        self._by_token[worker.token] = worker
        self._report("worker_started", worker, workers=len(self.workers))

    def adopt(self, token: str, connection: Connection) -> WorkerProcess | None:
        """Return the worker that connected with this token, which is valid once; ``None`` for an unknown token."""
        worker = self._by_token.pop(token, None)
        if worker is not None:
            worker.connection = connection
        return worker

    def on_ready(self, worker: WorkerProcess, message: m.WorkerReady) -> None:
        """Record that a worker has imported its backend."""
        worker.on_ready(message)
        self._report("worker_ready", worker, seconds=round(worker.started_s, 3))
        self.backoff(worker.key).succeeded()

    def refuses(self, worker: WorkerProcess, spec: m.LoadSpec) -> bool:
        """Return whether no worker has the versions that ``spec`` needs, and record this for ``check``."""
        if spec.comfy is None or any(launch.fits(spec, other.versions) for other in self.of_key(worker.key)):
            return False
        self._outdated[spec.comfy] = self._clock()
        return True

    # --- models ---

    def on_status(self, worker: WorkerProcess, message: m.WorkerStatus) -> None:
        """Record which models a worker holds."""
        for key in message.models.keys() - worker.models.keys():
            self._report("model_loaded", worker, model=model_name(key))
        worker.on_status(message)

    def evicted(self, worker: WorkerProcess, keys: list[str]) -> None:
        """Report the models that a worker unloads before its next job."""
        for key in keys:
            self._report("model_evicted", worker, model=model_name(key))

    def unload(self, worker: WorkerProcess, keys: list[str], why: str) -> None:
        """Ask a worker to unload models.

        Args:
            why: the reason, for the event.
        """
        worker.unload(keys)
        for key in keys:
            self._report("model_unloaded", worker, model=model_name(key), why=why)

    def rest(self, worker: WorkerProcess, settings: Settings, pinned: set[str]) -> None:
        """Stop a worker that has been idle too long; the last worker of a key first unloads its models."""
        kinds = worker.kinds.values()
        least = max(
            settings.min_vae_workers if ModelKind.VAE in kinds else 0,
            settings.min_clip_workers if ModelKind.CLIP in kinds else 0,
        )
        unpinned = [key for key in worker.models if key not in pinned]
        action = policy.idle_action(
            self._clock() - worker.idle_since, len(self.of_key(worker.key)) - 1, least,
            settings.idle_timeout_sec, settings.worker_keep_sec, len(unpinned) < len(worker.models),
        )  # fmt: skip
        if action == "stop":
            worker.stop()
        elif action == "unload" and unpinned:
            self.unload(worker, unpinned, "idle")

    # --- ending ---

    def remove(self, worker: WorkerProcess, why: str) -> str:
        """Take a worker out of service, kill its process and report a crash unless the pool had stopped the worker.

        Returns:
            Why the worker ended: its own message or last log line, else ``why``.
        """
        self.workers.remove(worker)
        self._by_token.pop(worker.token, None)
        self._exiting.append(worker)
        stopped, last_words = worker.state is WorkerState.STOPPING, worker.last_words()
        worker.abandon()
        self.reap()
        if stopped:
            self._report("worker_stopped", worker, workers=len(self.workers))
        else:
            attributes = (worker.number, worker.pid, why, last_words or "none")
            logger.error("worker %d (pid %d) died: %s; its last message: %s", *attributes)
            self._events.worker_crashed(worker.number, str(worker.key), last_words or why)
        return last_words or why

    def reap(self) -> None:
        """Release the shared memory of workers that have exited; before its exit a process may write there."""
        for worker in [worker for worker in self._exiting if worker.exited()]:
            self._exiting.remove(worker)
            worker.leases.release_all()

    async def stop(self) -> None:
        """Stop every worker; kill those that do not exit within two seconds."""
        workers = [*self.workers, *self._exiting]
        for worker in self.workers:
            worker.stop()
        await self._wait_for_exit(workers)
        for worker in workers:
            worker.kill()
        await self._wait_for_exit(workers)
        self.workers.clear()

    async def _wait_for_exit(self, workers: list[WorkerProcess]) -> None:
        end = self._clock() + _EXIT_S
        while not all(worker.exited() for worker in workers) and self._clock() < end:
            await self._sleep(0.01)

    def _report(self, event: str, worker: WorkerProcess, **attributes: Any) -> None:
        self._events.scaling(event, worker.number, str(worker.key), **attributes)
