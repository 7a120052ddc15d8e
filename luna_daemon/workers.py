"""WorkerPool: queues work, starts and ends worker processes, routes, retries. Decisions are in ``pool/policy.py``."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable
from pathlib import Path

from .config import Settings
from .core import (
    BadRequest,
    Busy,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    LunaError,
    ModelKind,
    OutOfMemory,
    PoisonRequest,
    RequestCancelled,
    ShuttingDown,
    WorkerState,
    error_from_code,
    logger,
)
from .files.identity import load_bytes
from .pool import launch, policy
from .pool.events import Events, model_name
from .pool.process import Spawn, WorkerProcess, spawn
from .pool.supervisor import Backoff
from .pool.work import Waiter, Work
from .system.gpu import free_vram
from .wire import messages as m
from .wire.arena import Slot
from .wire.connection import Connection

__all__ = ["WorkerPool"]

_TICK_S = 0.1
_SIGN_OF_LIFE_S = 5.0
_SILENT_S = 60.0
"""A worker whose reader thread has not answered for so long is stuck; one that is stopped for seconds is not."""
_END_S = 2.0
_OUTDATED_S = 60.0
"""For so long no further worker is started to find that out again."""
_RECENT = 256


class WorkerPool:
    """All worker processes of a daemon.

    Args:
        settings: limits, devices, timeouts.
        logs: folder for what workers print.
        events: told of workers and models that come and go.
        clock: monotonic seconds.
        sleep: waits between two looks at the workers.
        spawn: starts a worker's process.
        free_vram: free bytes of a GPU, by device.
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
        self.logs = logs
        self.events = events or Events()
        self.workers: list[WorkerProcess] = []
        self.queue: list[Work] = []
        self.pinned: set[str] = set()
        self.waits: deque[float] = deque(maxlen=_RECENT)
        self.retries = 0
        self.crashes = 0
        self.accepting = True
        self._clock, self._sleep, self._launch, self._free_vram = clock, sleep, spawn, free_vram
        self._closing = False
        self._sizes: dict[str, int] = {}
        """Bytes of models that have been loaded before: float16 files may become float32 weights."""
        self._backoffs: dict[str, Backoff] = {}
        self._outdated: dict[m.ComfyId, float] = {}
        """ComfyUIs that run, but whose files were updated: when a new worker was found to be another."""
        self._by_token: dict[str, WorkerProcess] = {}
        self._ending: list[WorkerProcess] = []
        self._served: dict[int, float] = {}
        self._address = ("", 0)
        self._numbers = 0
        self._jobs = 0
        self._ticker: asyncio.Task[None] | None = None
        self._next_sign = 0.0

    # --- life ---

    def open(self, host: str, port: int) -> None:
        """Start serving; workers dial back to ``host:port``."""
        self._address = (host, port)
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    async def close(self, drain_s: float) -> None:
        """Refuse what waits, let what runs finish within ``drain_s``, end every worker."""
        self.accepting, self._closing = False, True
        for work in self._drop_all():
            work.fail(ShuttingDown("the daemon is shutting down", "The local model can step in"))
        end = self._clock() + drain_s
        # The queue too: a request that is tried again, after its worker ran out of memory, is there for a moment.
        while (self.queue or any(worker.work for worker in self.workers)) and self._clock() < end:
            await self._sleep(0.02)
        for work in self._drop_all():
            work.fail(ShuttingDown("the daemon had to stop before this request was done"))
        if self._ticker is not None:
            self._ticker.cancel()
        for worker in list(self.workers):
            if worker.work is not None:
                worker.work.fail(ShuttingDown("the daemon had to stop before this request was done"))
                worker.work = None
                worker.kill()
            worker.stop()
        everybody = [*self.workers, *self._ending]
        await self._until_ended(everybody)
        for worker in everybody:
            worker.kill()
        await self._until_ended(everybody)
        self.workers.clear()

    async def _until_ended(self, workers: list[WorkerProcess]) -> None:
        end = self._clock() + _END_S
        while not all(worker.exited() for worker in workers) and self._clock() < end:
            await self._sleep(0.01)

    # --- work ---

    def submit(self, work: Work) -> None:
        """Queue work; it is answered through its waiters.

        Raises:
            Busy: the queue is full.
            ShuttingDown: nothing new is taken.
            WorkerCrashed: workers of its kind cannot be started just now.
            ComfyRefused: a worker would not be of the client's versions.
        """
        if not self.accepting:
            raise ShuttingDown("the daemon is shutting down", "The local model can step in")
        key, comfy = self.key_of(work), work.spec.comfy
        backoff = self._backoffs.get(key)
        if backoff is not None and backoff.wait_s and not self._of_key(key):
            raise backoff.error()
        if comfy is not None and self._clock() - self._outdated.get(comfy, -math.inf) < _OUTDATED_S:
            raise launch.unlike(comfy, next((worker.versions for worker in self._of_key(key)), {}))
        if len(self.queue) >= self.settings.queue_limit:
            self._make_place(work)
        self.queue.append(work)
        self.schedule()

    def _make_place(self, work: Work) -> None:
        """A full queue: whoever has most of it comes back later, if that is not this one."""
        retry = max(0.1, self.average_wait_s)
        busy = Busy(f"the queue is full ({len(self.queue)} requests wait)", f"Ask again in {retry:.1f} s", retry)
        index = policy.displaced([waiting.client for waiting in self.queue], work.client)
        if index is None:
            raise busy
        self.queue.pop(index).fail(busy)

    def cancel(self, work: Work, waiter: Waiter) -> None:
        """One waiter has left; the last one takes the work with it."""
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
        """Work that waits or runs, has waiters, and for which ``same`` holds."""
        running = [worker.work for worker in self.workers if worker.work is not None]
        return next((work for work in [*self.queue, *running] if work.waiters and same(work)), None)

    def key_of(self, work: Work) -> str:
        """Which workers can take it."""
        return launch.worker_key(work.spec, self.settings)

    @property
    def in_flight(self) -> int:
        """Requests that wait or are computed."""
        return len(self.queue) + sum(worker.work is not None for worker in self.workers)

    @property
    def average_wait_s(self) -> float:
        """Mean queueing time of the last requests."""
        return sum(self.waits) / len(self.waits) if self.waits else 0.0

    def unload(self, key: str | None) -> int:
        """Give the memory of one model, or of all, back; busy workers follow when they are done. How many copies."""
        count = 0
        for worker in self.workers:
            keys = [name for name in worker.models if key in (None, name)]
            self._unload(worker, keys, "asked")
            count += len(keys)
        self.pinned -= {key} if key else set(self.pinned)
        return count

    def _unload(self, worker: WorkerProcess, keys: list[str], why: str) -> None:
        worker.unload(keys)
        for key in keys:
            self.events.scaling("model_unloaded", worker.number, worker.key, model=model_name(key), why=why)

    def forget(self, client: int) -> None:
        """A client has gone."""
        self._served.pop(client, None)

    # --- scheduling ---

    def schedule(self) -> None:
        """Hand out what can be handed out now."""
        if not self.queue:
            return
        now = self._clock()
        running = Counter(worker.work.client for worker in self.workers if worker.work is not None)
        pending = [policy.Pending(work.priority, work.client, now - work.born) for work in self.queue]
        queued = Counter(launch.same_place(work.spec) for work in self.queue)
        oldest: dict[Hashable, float] = {}
        for work in self.queue:
            model = launch.same_place(work.spec)
            oldest[model] = min(work.born, oldest.get(model, now))
        waiting: set[Hashable] = set()
        for work in [self.queue[index] for index in policy.fair_order(pending, running, self._served)]:
            model = launch.same_place(work.spec)
            if work.deadline is not None and now > work.deadline:
                if work in self.queue:  # else it has failed meanwhile: no worker could be started
                    self.queue.remove(work)
                    work.fail(DeadlineExceeded(f"the request waited {now - work.born:.1f} s, past its deadline"))
            # One of a model must wait: so must the rest, since nothing becomes free in this loop.
            elif model not in waiting and not self._place(work, now - oldest[model], queued[model]):
                waiting.add(model)

    def _place(self, work: Work, waited_s: float, queued: int) -> bool:
        """Give it to a worker, or start one; whether it has one now."""
        key, spec = self.key_of(work), work.spec
        facts = [self._facts(worker, spec) for worker in self.workers]
        limits = self._limits(spec.kind)
        where = policy.route(key, spec.key, spec.kind, waited_s, queued, facts, limits, lambda: self._has_room(work))
        if isinstance(where, int):
            self.queue.remove(work)
            self._give(self.workers[where], work)
            return True
        if where == "spawn" and not self._backoff(key).wait_s:
            self._spawn(key, work)
        return False

    def _facts(self, worker: WorkerProcess, spec: m.LoadSpec) -> policy.Facts:
        ready = worker.state is WorkerState.IDLE and worker.work is None
        key = worker.key if launch.fits(spec, worker.versions) else f"{worker.key} of other versions"
        return policy.Facts(key, ready, worker.used, frozenset(worker.kinds.values()))

    def _limits(self, kind: str) -> policy.Limits:
        s = self.settings
        most = s.max_clip_workers if kind == ModelKind.CLIP else s.max_vae_workers
        return policy.Limits(most, s.queue_threshold, s.scale_up_delay_sec)

    def _has_room(self, work: Work) -> bool:
        key = self.key_of(work)
        # "auto" is known once a worker of this key has looked at the machine.
        device = next((worker.device for worker in self.workers if worker.key == key), work.spec.device)
        used = [worker.threads for worker in self.workers if worker.device == "cpu"]
        free = self._free_vram(device)
        if free is not None:
            free -= int(self.settings.vram_safety_margin_gb * (1 << 30))
        threads = launch.threads_of(key, device, self.settings)
        return policy.has_room(device, launch.CORES, used, threads, free, work.load_bytes)

    def _backoff(self, key: str) -> Backoff:
        return self._backoffs.setdefault(key, Backoff(clock=self._clock))

    def _spawn(self, key: str, work: Work) -> None:
        self._numbers += 1
        log = self.logs / f"worker-{self._numbers}.log"
        worker = None
        try:
            worker, python = launch.new_worker(self._numbers, key, work.spec, self.settings, log, self._clock)
            worker.start(python, *self._address, self._launch)
        except (OSError, ConfigError) as error:
            if worker is not None:
                worker.kill()
            self._start_failed(key, str(error))
            return
        self.workers.append(worker)
        self._by_token[worker.token] = worker
        work.progress("starting")
        self.events.scaling("worker_started", worker.number, key, workers=len(self.workers))

    def _give(self, worker: WorkerProcess, work: Work) -> None:
        going: list[str] | None = []
        need = sum(self._size(work, spec) for key, spec in work.models.items() if key not in worker.models)
        if need:
            held = {key: (worker.used.get(key, 0.0), nbytes) for key, nbytes in worker.models.items()}
            budget = int(self.settings.model_memory_gb * (1 << 30))
            going = policy.choose_evictions(held, self.pinned | work.models.keys(), need, budget)
        if going is None:
            work.fail(
                OutOfMemory(
                    f"the model needs {need >> 20} MB, the budget is "
                    f"{self.settings.model_memory_gb:g} GB and pinned models hold the rest",
                    "Raise model_memory_gb or unpin a model",
                )
            )
            return
        self._jobs += 1
        self._served[work.client] = self._clock()
        self.waits.append(self._clock() - work.born)
        self.events.waits.add(self.waits[-1])
        for gone in going:
            self.events.scaling("model_evicted", worker.number, worker.key, model=model_name(gone))
        worker.give(work, self._jobs, going)
        work.deadline = None  # it was about the start: a retry does not break it

    def _size(self, work: Work, spec: m.LoadSpec) -> int:
        """Bytes that loading a model takes: as the last time, else about those of its files."""
        known = self._sizes.get(spec.key)
        if known is None and spec.key == work.spec.key:
            known = work.load_bytes
        try:
            return load_bytes(spec) if known is None else known
        except OSError:  # gone since it was named: the worker will say so
            return 0

    # --- what workers say ---

    def adopt(self, token: str, connection: Connection) -> WorkerProcess | None:
        """A worker has dialled in; its token is good once."""
        worker = self._by_token.pop(token, None)
        if worker is not None:
            worker.greeted(connection)
        return worker

    def received(self, worker: WorkerProcess, message: m.Message, payload: Slot | None) -> None:
        """A message of a worker; takes over the payload."""
        worker.heard = self._clock()
        if isinstance(message, m.WorkerReady):
            worker.ready(message)
            self.events.scaling("worker_ready", worker.number, worker.key, seconds=round(worker.started_s, 3))
            self._backoff(worker.key).succeeded()
            self._refuse_others(worker)
        elif isinstance(message, m.WorkerStatus):
            for key in message.models.keys() - worker.models.keys():
                self.events.scaling("model_loaded", worker.number, worker.key, model=model_name(key))
            worker.status(message)
            self._sizes.update(message.models)
        elif isinstance(message, m.Progress) and worker.work is not None and message.id == worker.job:
            worker.work.progress(message.stage, message.step, message.total)
        elif isinstance(message, m.Reply) and message.id and message.id == worker.job:
            self._finished(worker, message, payload)
            payload = None
        elif isinstance(message, m.Failure) and message.id == worker.job:
            self._failed(worker, error_from_code(message.code, message.message, message.hint))
        if payload is not None:
            payload.release()
        if not isinstance(message, m.Progress):
            self.schedule()

    def _refuse_others(self, worker: WorkerProcess) -> None:
        """A new worker is of other versions than a client: so would be the next one."""
        for work in [work for work in self.queue if self.key_of(work) == worker.key]:
            comfy = work.spec.comfy
            if comfy is not None and not any(launch.fits(work.spec, w.versions) for w in self._of_key(worker.key)):
                self._outdated[comfy] = self._clock()
                self.queue.remove(work)
                work.fail(launch.unlike(comfy, worker.versions))

    def _of_key(self, key: str) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.key == key]

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

    def _failed(self, worker: WorkerProcess, error: LunaError) -> None:
        others = [key for key in worker.models if worker.work is not None and key != worker.work.spec.key]
        work = worker.done()
        if work is None:
            return
        if isinstance(error, OutOfMemory) and others and not work.evicted_all and not self.pinned & set(others):
            # The budget is only an estimate: give everything else back and try once more.
            work.evicted_all = True
            self._unload(worker, others, "out of memory")
            self.queue.insert(0, work)
        elif isinstance(error, RequestCancelled) and work.waiters:
            # Cancelled for one caller while another joined: compute it for that one.
            self.queue.insert(0, work)
        else:
            if not isinstance(error, (BadRequest, RequestCancelled)):
                self._tell_failure(worker, work, error)
            work.fail(error)

    def _tell_failure(self, worker: WorkerProcess, work: Work, error: LunaError) -> None:
        trace = worker.trace() if isinstance(error, InternalError) else ""
        what = f"{error.message}\n{trace}" if trace else error.message
        logger.warning("worker %d: %s on %s failed: %s", worker.number, work.op, work.spec.key, what)
        self.events.worker_failed(worker.key, error.code, error.message)

    def lost(self, worker: WorkerProcess, why: str) -> None:
        """A worker's connection is gone: it ended, was killed, or crashed."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self._by_token.pop(worker.token, None)
        self._ending.append(worker)
        wanted = worker.state is WorkerState.STOPPING
        started = worker.state is not WorkerState.STARTING
        worker.state, work = WorkerState.DEAD, worker.work
        worker.work, worker.job = None, 0
        tail = worker.tail()
        worker.kill()
        if worker.connection is not None:
            worker.connection.close()
        self._reap()
        if not wanted:
            self.crashes += 1
            logger.error("worker %d (pid %d) died: %s; last words: %s", worker.number, worker.pid, why, tail or "none")
            self.events.worker_crashed(worker.number, worker.key, tail or why)
        else:
            self.events.scaling("worker_stopped", worker.number, worker.key, workers=len(self.workers))
        if not started:
            self._start_failed(worker.key, tail or why)
        if work is not None:
            self._retry(work, worker, tail or why)
        self.schedule()

    def _retry(self, work: Work, worker: WorkerProcess, why: str) -> None:
        work.crashes += 1
        if not work.waiters:
            work.release_inputs()
            return
        if self._closing:
            # Another worker could not dial in: nobody listens any more.
            work.fail(ShuttingDown("a worker died while the daemon shuts down", "The local model can step in"))
            return
        if work.crashes < 2:
            self.retries += 1
            self.queue.insert(0, work)
            return
        work.fail(
            PoisonRequest(
                f"{work.op} on {work.spec.key} crashed two workers, the last with pid {worker.pid}: {why}",
                "It is not tried again, and not locally: it would crash this process too",
            )
        )

    def _start_failed(self, key: str, why: str) -> None:
        backoff = self._backoff(key)
        backoff.failed(why)
        for work in [work for work in self.queue if self.key_of(work) == key]:
            if not any(worker.key == key for worker in self.workers):
                self.queue.remove(work)
                work.fail(backoff.error())

    def _reap(self) -> None:
        """Give back what ended workers held: not before they have, since until then they may write there."""
        for worker in [worker for worker in self._ending if worker.exited()]:
            self._ending.remove(worker)
            worker.leases.release_all()

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
        """Look after every worker: late, silent, idle; and give waiting callers a sign of life."""
        now = self._clock()
        signs = now >= self._next_sign
        if signs:
            self._next_sign = now + _SIGN_OF_LIFE_S
            for work in self.queue:
                work.progress("queued")
        self._reap()
        for worker in list(self.workers):
            if worker.state is WorkerState.STARTING:
                if worker.exited() or now - worker.born > self.settings.worker_start_sec:
                    self.lost(worker, "it did not start in time" if not worker.exited() else "it ended at its start")
            elif now - worker.heard > _SILENT_S:
                self.lost(worker, f"it has been silent for {now - worker.heard:.0f} s")
            elif signs:
                worker.ping()
                if worker.work is not None:
                    worker.work.progress("running")
            if worker.state is WorkerState.IDLE and worker.work is None:
                self._let_rest(worker, now)

    def _let_rest(self, worker: WorkerProcess, now: float) -> None:
        """Idle stages: extra workers end; the last gives its memory back, then ends too."""
        s = self.settings
        kinds = set(worker.kinds.values())
        least = max(
            s.min_vae_workers if ModelKind.VAE in kinds else 0, s.min_clip_workers if ModelKind.CLIP in kinds else 0
        )
        others = sum(other.key == worker.key and other is not worker for other in self.workers)
        keys = [key for key in worker.models if key not in self.pinned]
        action = policy.idle_action(now - worker.idle_since, others, least, s.idle_timeout_sec, s.worker_keep_sec)
        if action == "stop" and len(keys) == len(worker.models):
            worker.stop()
        elif action != "keep" and keys:
            self._unload(worker, keys, "idle")

    def _drop_all(self) -> list[Work]:
        dropped, self.queue = self.queue, []
        return dropped
