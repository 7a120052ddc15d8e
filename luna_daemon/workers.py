"""WorkerPool: queues work, gives it to worker processes, and retries it when a worker dies; see also ``pool/``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from .config import Settings
from .core import (
    BadRequest,
    LunaError,
    OutOfMemory,
    PoisonRequest,
    RequestCancelled,
    ShuttingDown,
    WorkerState,
    error_from_code,
    logger,
)
from .pool import launch
from .pool.events import Events
from .pool.fleet import Fleet
from .pool.process import WorkerProcess
from .pool.scheduling import Scheduler
from .pool.spawning import Spawn, spawn
from .pool.waiting import WorkQueue
from .pool.work import Waiter, Work
from .system.gpu import free_vram
from .wire import messages as m
from .wire.arena import Slot
from .wire.connection import Connection

__all__ = ["WorkerPool"]

_TICK_S = 0.1
_SIGN_OF_LIFE_S = 5.0
_LOCAL = "The local model can be used instead"


class WorkerPool:
    """All worker processes of a daemon, and the waiting work.

    Args:
        settings: limits, devices, timeouts; may be replaced while requests run.
        logs: folder for the output of workers.
        events: receives events of workers and models.
        clock: monotonic seconds.
        sleep: pauses between two checks of the workers.
        spawn: starts a worker's process.
        free_vram: free bytes of a GPU by its device; ``None`` where unknown.
    """

    def __init__(
        self,
        settings: Settings,
        logs: Path,
        events: Events | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        spawn: Spawn = spawn,
        free_vram: Callable[[str], int | None] = free_vram,
    ) -> None:
        self.settings = settings
        self.events = events or Events()
        self.queue = WorkQueue(clock)
        self.fleet = Fleet(logs, self.events, clock, sleep, spawn)
        self.workers = self.fleet.workers
        self.pinned: set[str] = set()
        self.retries = 0
        self.accepting = True
        self._scheduler = Scheduler(self.queue, self.fleet, self.pinned, self.events, clock, free_vram)
        self._clock, self._sleep = clock, sleep
        self._closing, self._next_sign = False, 0.0
        self._ticker: asyncio.Task[None] | None = None

    # --- life ---

    def open(self, host: str, port: int) -> None:
        """Start to supervise workers, which connect to ``host:port``; needs a running event loop."""
        self.fleet.address = (host, port)
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    async def close(self, drain_s: float) -> None:
        """Refuse waiting work, let running work finish within ``drain_s`` seconds, and stop every worker."""
        self.accepting, self._closing = False, True
        self.queue.fail(list(self.queue), ShuttingDown("the daemon is shutting down", _LOCAL))
        end = self._clock() + drain_s
        # The queue counts too: work that is retried after a worker ran out of memory is put back there.
        while self.in_flight and self._clock() < end:
            await self._sleep(0.02)
        late = ShuttingDown("the daemon had to stop before this request was done")
        self.queue.fail(list(self.queue), late)
        if self._ticker is not None:
            self._ticker.cancel()
        for worker in self.workers:
            if worker.work is not None:
                worker.work.fail(late)
                worker.work = None
                worker.kill()
        await self.fleet.stop()

    # --- requests ---

    def submit(self, work: Work) -> None:
        """Queue work; its waiters get the result or error.

        Raises:
            Busy: the queue is full.
            ShuttingDown: the daemon takes no new work.
            WorkerCrashed: workers for this work cannot be started now.
            ComfyRefused: a new worker would have other versions than the client.
        """
        if not self.accepting:
            raise ShuttingDown("the daemon is shutting down", _LOCAL)
        self.fleet.check(launch.worker_key(work.spec, self.settings), work.spec.comfy)
        self.queue.add(work, self.settings.queue_limit)
        self.schedule()

    def cancel(self, work: Work, waiter: Waiter) -> None:
        """Remove a waiter from its work; work without waiters is dropped, or stopped at its next tile."""
        if waiter in work.waiters:
            work.waiters.remove(waiter)
        if work.waiters:
            return
        if work in self.queue:
            self.queue.remove(work)
            work.release_inputs()
        for worker in self.workers:
            if worker.work is work:
                worker.cancel()

    def find_same(self, same: Callable[[Work], bool]) -> Work | None:
        """Return waiting or running work that has waiters and for which ``same`` is true."""
        running = [worker.work for worker in self.workers if worker.work is not None]
        return next((work for work in [*self.queue, *running] if work.waiters and same(work)), None)

    def unload(self, key: str | None) -> int:
        """Unload and unpin one model, or all; a busy worker unloads after its job.

        Args:
            key: the model's key; ``None`` for all models.

        Returns:
            Number of copies unloaded.
        """
        count = 0
        for worker in self.workers:
            keys = [name for name in worker.models if key in (None, name)]
            self.fleet.unload(worker, keys, "asked")
            count += len(keys)
        self.pinned -= {key} if key else set(self.pinned)
        return count

    def forget(self, client: int) -> None:
        """Drop the record of a client that has disconnected."""
        self.queue.forget(client)

    @property
    def in_flight(self) -> int:
        """Number of pieces of work that wait or are computed."""
        return len(self.queue) + sum(worker.work is not None for worker in self.workers)

    def schedule(self) -> None:
        """Give waiting work to free workers, and start workers for it."""
        self._scheduler.run(self.settings)

    # --- messages of workers ---

    def adopt(self, token: str, connection: Connection) -> WorkerProcess | None:
        """Return the worker that connected with this token, which is valid once; ``None`` for an unknown token."""
        return self.fleet.adopt(token, connection)

    def received(self, worker: WorkerProcess, message: m.Message, payload: Slot | None) -> None:
        """Handle a message of a worker; takes over the payload."""
        worker.heard = self._clock()
        if isinstance(message, m.WorkerReady):
            self.fleet.on_ready(worker, message)
            self._scheduler.refuse_outdated(worker, self.settings)
        elif isinstance(message, m.WorkerStatus):
            self.fleet.on_status(worker, message)
            self._scheduler.sizes.update(message.models)
        elif isinstance(message, m.Progress) and worker.work is not None and message.id == worker.job:
            worker.work.progress(message.stage, message.step, message.total)
        elif isinstance(message, m.Reply) and message.id and message.id == worker.job:
            self._finished(worker, message, payload)
            payload = None
        elif isinstance(message, m.Failure) and not message.id:
            worker.reason = message.message
        elif isinstance(message, m.Failure) and message.id == worker.job:
            self._failed(worker, error_from_code(message.code, message.message, message.hint), message.trace)
        if payload is not None:
            payload.release()
        if not isinstance(message, m.Progress):
            self.schedule()

    def _finished(self, worker: WorkerProcess, message: m.Reply, payload: Slot | None) -> None:
        outcome = worker.outcome(message, payload)
        work = worker.done()
        if work is None:
            outcome.release()
            return
        if len(outcome.pieces) == 1:
            work.measured(outcome.pieces[0].ref.nbytes)
        if work.pin:
            self.pinned.add(work.spec.key)
        work.finish(outcome)

    def _failed(self, worker: WorkerProcess, error: LunaError, trace: str) -> None:
        work = worker.done()
        if work is None:
            return
        others = [key for key in worker.models if key != work.spec.key]
        if isinstance(error, OutOfMemory) and others and not work.evicted_all and not self.pinned & set(others):
            # The memory budget is only an estimate: unload all other models and try once more.
            work.evicted_all = True
            self.fleet.unload(worker, others, "out of memory")
            self.queue.put_back(work)
        elif isinstance(error, RequestCancelled) and work.waiters:
            # A caller joined after the work was cancelled: compute it for that caller.
            self.queue.put_back(work)
        else:
            if not isinstance(error, (BadRequest, RequestCancelled)):
                what = f"{error.message}\n{trace}".rstrip()
                logger.warning("worker %d: %s on %s failed: %s", worker.number, work.op, work.spec.key, what)
                self.events.worker_failed(str(worker.key), error.code, error.message)
            work.fail(error)

    # --- workers that are lost ---

    def lost(self, worker: WorkerProcess, why: str) -> None:
        """Take a worker whose connection is closed out of service; its work is tried again."""
        if worker not in self.workers:
            return
        started, work = worker.state is not WorkerState.STARTING, worker.work
        why = self.fleet.remove(worker, why)
        if not started:
            self._scheduler.start_failed(worker.key, why, self.settings)
        if work is not None:
            self._retry(work, worker, why)
        self.schedule()

    def _retry(self, work: Work, worker: WorkerProcess, why: str) -> None:
        work.crashes += 1
        if not work.waiters:
            work.release_inputs()
        elif self._closing:
            # Another worker could not connect: the daemon no longer accepts connections.
            work.fail(ShuttingDown("a worker died while the daemon shuts down", _LOCAL))
        elif work.crashes < 2:
            self.retries += 1
            self.queue.put_back(work)
        else:
            work.fail(
                PoisonRequest(
                    f"{work.op} on {work.spec.key} crashed two workers, the last with pid {worker.pid}: {why}",
                    "It is not retried, not even locally: it would crash this process too",
                )
            )

    # --- time ---

    async def _tick(self) -> None:
        while True:
            await self._sleep(_TICK_S)
            try:
                self.watch()
                self.schedule()
            except Exception:
                logger.exception("the pool's tick failed")

    def watch(self) -> None:
        """Remove workers that are late or silent, stop idle workers, and send waiting callers a sign of life."""
        now = self._clock()
        signs = now >= self._next_sign
        if signs:
            self._next_sign = now + _SIGN_OF_LIFE_S
            for work in self.queue:
                work.progress("queued")
        self.fleet.reap()
        for worker in list(self.workers):
            if why := worker.failure(now, self.settings.worker_start_sec):
                self.lost(worker, why)
            elif signs and worker.state is not WorkerState.STARTING:
                worker.ping()
                if worker.work is not None:
                    worker.work.progress("running")
            if worker.is_free:
                self.fleet.rest(worker, self.settings, self.pinned)
