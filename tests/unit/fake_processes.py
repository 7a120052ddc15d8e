"""A worker pool without processes, sockets and waiting: its workers say and do what a test has them say and do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from luna_daemon.config import load_settings
from luna_daemon.pool.process import WorkerProcess
from luna_daemon.pool.work import Work
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot
from luna_daemon.wire.frame import encode_call
from luna_daemon.workers import WorkerPool
from tests.unit.fakes import Clock, Waiter

COMFY = m.ComfyId("/comfy", "/env/bin/python", "0.8.0", "2.9")


class Process:
    """A process that runs until it is killed or ``code`` is set."""

    def __init__(self, pid: int, config: dict[str, Any]) -> None:
        self.pid = pid
        self.config = config
        self.code: int | None = None
        self.kills = True
        """Whether a kill ends it: one that hangs in a driver goes on."""

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        if self.kills and self.code is None:
            self.code = -9


class Connection:
    """Keeps what is sent to a worker."""

    def __init__(self) -> None:
        self.sent: list[m.Message] = []
        self.closed = False

    def send(self, message: m.Message, slots: list[Slot] | None = None) -> None:
        self.sent.append(message)
        for slot in slots or []:
            slot.release()

    def close(self) -> None:
        self.closed = True


def spec(name: str = "a", kind: str = "vae", device: str = "cuda:0", comfy: m.ComfyId | None = None) -> m.LoadSpec:
    """A model."""
    return m.LoadSpec(f"{kind}:{name}:0", kind, "sdxl", (), device, "auto", False, comfy)


class Bench:
    """A pool, its clock and its processes."""

    def __init__(self, logs: Path, **settings: Any) -> None:
        self.clock = Clock()
        self.processes: list[Process] = []
        self.broken: OSError | None = None
        """What starting a process raises."""
        self.free: int | None = None
        """Free bytes of every GPU."""
        self.on_sleep: Callable[[], None] = lambda: None
        self.pool = WorkerPool(
            load_settings(settings, {}), logs, clock=self.clock, sleep=self._sleep, spawn=self._spawn,
            free_vram=lambda device: self.free,
        )  # fmt: skip
        self.pool.events.listen(lambda kind, data: self.heard.append(data.get("event", kind)))
        self.heard: list[str] = []

    def _spawn(self, interpreter: str, config: dict[str, Any], log: Path) -> Process:
        if self.broken is not None:
            raise self.broken
        self.processes.append(Process(len(self.processes) + 1, config))
        return self.processes[-1]

    def _sleep(self, seconds: float) -> Awaitable[None]:
        self.clock.now += seconds
        self.on_sleep()
        return _nothing()

    # --- the clients' side ---

    def submit(
        self, model: m.LoadSpec | None = None, client: int = 1, priority: int = 1, deadline_s: float | None = None,
        **more: Any,
    ) -> tuple[Work, Waiter]:  # fmt: skip
        """Queue a request of a client."""
        waiter = Waiter(client)
        deadline = None if deadline_s is None else self.clock() + deadline_s
        call = encode_call(m.VaeDecode(m.ModelRef("vae")))
        work = Work(
            "vae.decode", call, model or spec(), more.pop("pieces", []), priority, deadline, [waiter],
            born=self.clock(), **more,
        )  # fmt: skip
        self.pool.submit(work)
        return work, waiter

    # --- the workers' side ---

    def process(self, worker: WorkerProcess) -> Process:
        return self.processes[worker.pid - 1]

    def dial(self, index: int = -1) -> WorkerProcess:
        """A started process dials in."""
        worker = self.pool.adopt(self.processes[index].config["token"], Connection())  # type: ignore[arg-type]
        assert worker is not None
        return worker

    def ready(self, index: int = -1, arena: bool = False, **versions: str) -> WorkerProcess:
        """A started process dials in and has imported its backend."""
        worker = self.dial(index)
        self.pool.received(worker, m.WorkerReady("x", versions, ["cuda:0"], arena), None)
        return worker

    def worker(self, *models: str, model: m.LoadSpec | None = None) -> WorkerProcess:
        """A worker that has loaded these models, one request each."""
        started = len(self.processes)
        for key in models or ("a",):
            _, waiter = self.submit(model or spec(key))
            if len(self.processes) > started:
                started = len(self.processes)
                self.ready()
            self.answer(self.pool.workers[-1])
            assert waiter.outcomes
        return self.pool.workers[-1]

    def sent(self, worker: WorkerProcess, kind: type[m.Message]) -> list[Any]:
        """Messages of a kind that a worker got."""
        return [message for message in worker.connection.sent if isinstance(message, kind)]  # type: ignore[union-attr]

    def job(self, worker: WorkerProcess) -> m.Job:
        """The last job that a worker got."""
        return self.sent(worker, m.Job)[-1]

    def status(self, worker: WorkerProcess, **nbytes: int) -> None:
        """A worker tells what it holds."""
        models = {f"vae:{name}:0": size for name, size in nbytes.items()}
        self.pool.received(worker, m.WorkerStatus(models, 1), None)

    def answer(self, worker: WorkerProcess, nbytes: int = 1) -> None:
        """A worker has loaded the job's model, if it had not, and answers."""
        job = self.job(worker)
        held = {key: size for key, size in worker.models.items() if key not in job.unload}
        self.pool.received(worker, m.WorkerStatus({job.model.key: nbytes, **held}, 1), None)
        self.pool.received(worker, m.Reply(job.id, {"by": worker.number}), None)

    def fail(self, worker: WorkerProcess, code: str) -> None:
        """A worker answers with an error."""
        self.pool.received(worker, m.Failure(self.job(worker).id, code, "words"), None)

    def cannot_start(self, worker: WorkerProcess, message: str) -> None:
        """A worker's backend cannot be imported: it says so and ends."""
        self.pool.received(worker, m.Failure(0, "internal", message), None)
        self.crash(worker)

    def crash(self, worker: WorkerProcess) -> None:
        """A worker's process ends, and with it the connection."""
        self.process(worker).code = -11
        self.pool.lost(worker, "closed")

    def tick(self, seconds: float) -> None:
        """Time passes: the pool looks after its workers once, at the end."""
        self.clock.now += seconds
        for worker in self.pool.workers:
            if worker.connection is not None and self.process(worker).code is None:
                worker.heard = self.clock()
        self.pool.watch()
        self.pool.schedule()


async def _nothing() -> None: ...
