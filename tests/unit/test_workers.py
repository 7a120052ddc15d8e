"""The worker pool with processes that a test plays and a clock that a test moves: nothing is started or waited for."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from luna_daemon.core import (
    Busy,
    ComfyRefused,
    DeadlineExceeded,
    ModelLoadError,
    OutOfMemory,
    PoisonRequest,
    Priority,
    RequestCancelled,
    ShuttingDown,
    WorkerCrashed,
    WorkerState,
)
from luna_daemon.wire import messages as m
from tests.unit.fake_processes import COMFY, Bench, spec
from tests.unit.fakes import Memory, Waiter


@pytest.fixture
def bench(tmp_path):
    """Makes benches."""
    return lambda **settings: Bench(tmp_path, **settings)


# --- a request's way ---------------------------------------------------------------------------------------------


def test_the_first_request_starts_a_worker_and_is_its_first_job(bench):
    """The caller hears of the start; the job goes out when the worker is ready; the answer reaches the caller."""
    bench = bench()
    work, waiter = bench.submit()
    assert waiter.seen == [("starting", 0, 0)] and len(bench.processes) == 1
    worker = bench.ready()
    assert bench.job(worker).model == work.spec and worker.state is WorkerState.LOADING
    bench.answer(worker)
    ((outcome, shared),) = waiter.outcomes
    assert outcome.result == {"by": 1} and not shared and worker.state is WorkerState.IDLE
    assert bench.heard == ["worker_started", "worker_ready", "model_loaded"]


def test_a_worker_is_told_where_to_dial_and_its_token_is_good_once(bench):
    """Whoever learns a token later cannot be taken for the worker."""
    bench = bench()

    async def main() -> None:
        bench.pool.open("127.0.0.1", 7)
        bench.submit()
        await bench.pool.close(0)

    asyncio.run(main())
    (process,) = bench.processes
    assert (process.config["host"], process.config["port"]) == ("127.0.0.1", 7)
    bench.pool.accepting = True
    bench.submit()
    bench.dial()
    assert bench.pool.adopt(bench.processes[-1].config["token"], object()) is None
    assert bench.pool.adopt("guessed", object()) is None


def test_one_worker_serves_all_kinds(bench):
    """The second model goes into the worker there is; a third request waits while it computes."""
    bench = bench()
    worker = bench.worker("a")
    bench.submit(spec("b", "clip"))
    _, waiting = bench.submit()
    assert len(bench.processes) == 1 and len(bench.pool.queue) == 1
    bench.answer(worker)
    bench.answer(worker)
    assert waiting.outcomes and bench.pool.in_flight == 0


def test_work_of_another_device_has_a_worker_of_its_own(bench):
    """However idle the other one is."""
    bench = bench()
    bench.worker("a")
    bench.submit(spec(device="cpu"))
    assert len(bench.processes) == 2


def test_progress_reaches_the_caller(bench):
    """Of the job that runs, and of no other."""
    bench = bench()
    worker = bench.worker("a")
    _, waiter = bench.submit()
    job = bench.job(worker).id
    bench.pool.received(worker, m.Progress(job, "tile", 1, 9), None)
    bench.pool.received(worker, m.Progress(job - 1, "tile", 2, 9), None)
    assert waiter.seen == [("tile", 1, 9)]


def test_waiting_callers_hear_a_sign_of_life(bench):
    """Every five seconds, those in the queue and those whose request runs; the worker is asked for one."""
    bench = bench()
    worker = bench.worker("a")
    (_, running), (_, queued) = bench.submit(), bench.submit()
    bench.tick(5.0)
    bench.tick(1.0)
    assert running.seen == [("running", 0, 0)] and queued.seen == [("queued", 0, 0)]
    assert len(bench.sent(worker, m.Request)) == 1
    bench.tick(4.0)
    assert len(queued.seen) == 2


def test_the_average_wait(bench):
    """Of requests that have been given to a worker."""
    bench = bench()
    assert bench.pool.queue.average_wait_s == 0
    worker = bench.worker("a")
    bench.submit()
    bench.submit()
    bench.clock.now += 6
    bench.answer(worker)
    assert bench.pool.queue.average_wait_s == pytest.approx(2.0)


# --- order -------------------------------------------------------------------------------------------------------


def test_clients_take_turns(bench):
    """A client with three requests does not hold up another's single one."""
    bench = bench(max_vae_workers=1)
    worker = bench.worker("a")
    waiters = [bench.submit(client=client)[1] for client in (1, 1, 1, 2)]
    order = []
    while bench.pool.in_flight:
        assert worker.work is not None
        order.append(waiters.index(worker.work.waiters[0]))
        bench.answer(worker)
    assert order == [0, 3, 1, 2]


def test_whoever_was_served_longest_ago_is_next(bench):
    """Between clients in the same turn; a client that has gone is forgotten."""
    bench = bench()
    worker = bench.worker("a")
    for client in (5, 6, 7):
        bench.submit(client=client)
        bench.clock.now += 1
        bench.answer(worker)
    bench.submit(client=9)
    bench.pool.forget(7)
    waiters = [bench.submit(client=client)[1] for client in (6, 5, 7)]
    for expected in (7, 5, 6):
        bench.answer(worker)
        assert worker.work is not None and worker.work.client == expected
    assert not waiters[0].outcomes


def test_priority_goes_first(bench):
    """Interactive work overtakes what came earlier."""
    bench = bench()
    worker = bench.worker("a")
    bench.submit()
    for priority in (Priority.BATCH, Priority.NORMAL, Priority.INTERACTIVE):
        bench.submit(priority=priority)
    order = []
    while bench.pool.queue:
        bench.answer(worker)
        order.append(worker.work.priority)
    assert order == [0, 1, 2]


def test_a_deadline_is_about_the_start(bench):
    """Past it a request is refused while it waits; one that was started before is tried again whenever that is."""
    bench = bench()
    worker = bench.worker("a")
    _, running = bench.submit(deadline_s=1.0)
    _, late = bench.submit(deadline_s=1.0)
    _, patient = bench.submit(deadline_s=9.0)
    bench.tick(2.0)
    (error,) = late.errors
    assert isinstance(error, DeadlineExceeded) and "waited 2.0 s" in error.message and not patient.errors
    bench.crash(worker)
    bench.clock.now += 20.0
    bench.ready()
    assert not running.errors and bench.pool.workers[0].work.waiters == [running]


# --- a full queue ------------------------------------------------------------------------------------------------


def test_the_greediest_makes_place(bench):
    """Its last request comes back later; the newcomer waits."""
    bench = bench(queue_limit=2)
    bench.worker("a")
    waiters = [bench.submit(client=client)[1] for client in (1, 1, 1, 2)]
    assert [bool(waiter.errors) for waiter in waiters] == [False, False, True, False]
    (error,) = waiters[2].errors
    assert isinstance(error, Busy) and error.retry_after_s >= 0.1 and "2 requests wait" in error.message
    assert len(bench.pool.queue) == 2


def test_a_newcomer_that_is_as_greedy_is_refused(bench):
    """It fills the queue itself."""
    bench = bench(queue_limit=2)
    bench.worker("a")
    for _ in range(3):
        bench.submit(client=1)
    with pytest.raises(Busy, match="the queue is full"):
        bench.submit(client=1)
    assert len(bench.pool.queue) == 2


# --- leaving and joining -----------------------------------------------------------------------------------------


def test_cancelling(bench):
    """Work that waits is dropped with its inputs; work that runs is stopped; others that wait for it keep it."""
    bench, memory = bench(), Memory()
    worker = bench.worker("a")
    running, first = bench.submit()
    queued, second = bench.submit(pieces=[memory.piece()])
    other = Waiter(2)
    running.waiters.append(other)
    bench.pool.cancel(queued, second)
    assert not bench.pool.queue and memory.live == 0
    bench.pool.cancel(running, first)
    assert not bench.sent(worker, m.Cancel)
    bench.pool.cancel(running, other)
    assert bench.sent(worker, m.Cancel) == [m.Cancel(bench.job(worker).id)]


def test_joining_what_is_being_cancelled(bench):
    """The worker gives up, and computes it again for the one who came meanwhile."""
    bench = bench()
    worker = bench.worker("a")
    work, first = bench.submit()
    bench.pool.cancel(work, first)
    late = Waiter(2)
    work.waiters.append(late)
    bench.fail(worker, "cancelled")
    assert worker.work is work and not late.errors
    bench.answer(worker)
    assert late.outcomes


def test_a_cancelled_request_is_told_so(bench):
    """Without another waiter nothing is computed again, and nothing is logged as a failure."""
    bench = bench()
    worker = bench.worker("a")
    work, waiter = bench.submit()
    bench.pool.cancel(work, waiter)
    bench.fail(worker, RequestCancelled.code)
    assert worker.work is None and not work.waiters and not bench.pool.events.last_errors


def test_finding_the_same(bench):
    """Work that waits or runs can be joined; work that everybody has left cannot."""
    bench = bench()
    bench.worker("a")
    running, _ = bench.submit()
    queued, _ = bench.submit(spec("b"))
    assert bench.pool.find_same(lambda work: work.spec.key == running.spec.key) is running
    assert bench.pool.find_same(lambda work: work.spec.key == queued.spec.key) is queued
    running.waiters.clear()
    assert bench.pool.find_same(lambda work: work.spec.key == running.spec.key) is None


# --- memory ------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_tried_again_with_the_rest_given_back(bench):
    """Once: the other models go, the job comes again; then the caller gets the error."""
    bench = bench()
    worker = bench.worker("a", "b")
    _, waiter = bench.submit(spec("a"))
    bench.fail(worker, "out_of_memory")
    assert bench.sent(worker, m.Unload) == [m.Unload(["vae:b:0"])] and len(bench.sent(worker, m.Job)) == 4
    assert not waiter.errors and bench.heard[-1] == "model_unloaded"
    bench.status(worker, a=1)
    bench.fail(worker, "out_of_memory")
    assert isinstance(waiter.errors[0], OutOfMemory) and len(bench.sent(worker, m.Job)) == 4


def test_out_of_memory_of_a_second_try_with_others_loaded_is_final(bench):
    """Even if a model has been loaded meanwhile: it could go on for ever."""
    bench = bench()
    worker = bench.worker("a", "b")
    _, waiter = bench.submit(spec("a"))
    bench.fail(worker, "out_of_memory")
    bench.status(worker, a=1, b=1)
    bench.fail(worker, "out_of_memory")
    assert isinstance(waiter.errors[0], OutOfMemory)


@pytest.mark.parametrize(("models", "pinned"), [(("a",), set()), (("a", "b"), {"vae:b:0"})])
def test_out_of_memory_with_nothing_to_give_back(bench, models, pinned):
    """Alone in the worker, or beside a pinned model: the caller gets the error at once."""
    bench = bench()
    worker = bench.worker(*models)
    bench.pool.pinned |= pinned
    _, waiter = bench.submit(spec("a"))
    bench.fail(worker, "out_of_memory")
    assert isinstance(waiter.errors[0], OutOfMemory) and not bench.sent(worker, m.Unload)


def test_the_least_recently_used_model_makes_room(bench):
    """The job says what goes first; models that need no loading evict nothing."""
    bench = bench(model_memory_gb=3)
    worker = bench.worker("a", "b")
    bench.status(worker, a=1 << 30, b=1 << 30)
    bench.clock.now += 1
    bench.submit(spec("a"))
    assert bench.job(worker).unload == []
    bench.answer(worker)
    bench.submit(spec("c"), load_bytes=2 << 30)
    assert bench.job(worker).unload == ["vae:b:0"] and "model_evicted" in bench.heard
    assert list(worker.models) == ["vae:a:0"]


def test_a_model_counts_what_it_took_the_last_time(bench):
    """Not what its files say: float16 on disk may be float32 in memory."""
    bench = bench(model_memory_gb=3)
    worker = bench.worker("a")
    bench.status(worker, a=2 << 30, b=2 << 30)
    bench.status(worker, a=2 << 30)
    bench.submit(spec("b"), load_bytes=1)
    assert bench.job(worker).unload == ["vae:a:0"]


def test_what_does_not_fit_beside_pinned_models_is_refused(bench):
    """With both sizes; the worker is free for others, and nothing was evicted."""
    bench = bench(model_memory_gb=3)
    worker = bench.worker("a")
    bench.status(worker, a=2 << 30)
    bench.pool.pinned.add("vae:a:0")
    _, waiter = bench.submit(spec("b"), load_bytes=2 << 30)
    (error,) = waiter.errors
    assert isinstance(error, OutOfMemory) and "2048 MB" in error.message and "3 GB" in error.message
    assert worker.work is None and list(worker.models) == ["vae:a:0"]


def test_pinning_and_unloading(bench):
    """What was loaded with ``pin`` is pinned until it is unloaded, by name or with all."""
    bench = bench()
    worker = bench.worker("a", "b")
    for name in ("a", "b"):
        bench.submit(spec(name), pin=True)
        bench.answer(worker)
    assert bench.pool.pinned == {"vae:a:0", "vae:b:0"}
    assert bench.pool.unload("vae:a:0") == 1 and bench.pool.pinned == {"vae:b:0"}
    assert bench.pool.unload(None) == 1 and not bench.pool.pinned and not worker.models
    assert bench.pool.unload(None) == 0


# --- more and fewer workers --------------------------------------------------------------------------------------


def queued(bench: Bench, count: int) -> None:
    """One request runs, ``count`` more wait."""
    for _ in range(count + 1):
        bench.submit()


def test_a_lasting_queue_starts_another_worker(bench):
    """After the oldest has waited for the delay, one at a time, and never more than allowed."""
    bench = bench(max_vae_workers=2, queue_threshold=2, scale_up_delay_sec=1.0)
    bench.worker("a")
    queued(bench, 2)
    bench.tick(0.9)
    bench.submit()
    assert len(bench.processes) == 1
    bench.tick(0.2)
    assert len(bench.processes) == 2
    bench.tick(5.0)
    assert len(bench.processes) == 2
    second = bench.ready()
    assert second.work is not None and len(bench.pool.queue) == 2
    bench.tick(60.0)
    assert len(bench.processes) == 2


def test_a_short_queue_starts_nothing(bench):
    """However long it waits."""
    bench = bench(max_vae_workers=2, queue_threshold=3, scale_up_delay_sec=1.0)
    bench.worker("a")
    queued(bench, 2)
    bench.tick(30.0)
    assert len(bench.processes) == 1


@pytest.mark.parametrize(("free_gb", "workers"), [(None, 2), (3, 2), (2, 1)])
def test_another_worker_needs_free_memory(bench, free_gb, workers):
    """The model and the margin must fit; what is not known is tried."""
    bench = bench(max_vae_workers=2, queue_threshold=1, scale_up_delay_sec=1.0, vram_safety_margin_gb=1)
    bench.free = None if free_gb is None else free_gb << 30
    bench.worker("a")
    for _ in range(2):
        bench.submit(load_bytes=2 << 30)
    bench.tick(2.0)
    assert len(bench.processes) == workers


def test_text_encoders_scale_by_their_own_limit(bench):
    """A limit of one VAE worker does not hold back the other kind."""
    bench = bench(max_vae_workers=1, max_clip_workers=2, queue_threshold=1, scale_up_delay_sec=1.0)
    bench.worker("a", model=spec("a", "clip"))
    for _ in range(2):
        bench.submit(spec("a", "clip"))
    bench.tick(2.0)
    assert len(bench.processes) == 2


def test_idle_stages(bench):
    """The last worker gives its models back, keeps its process, then ends; that is no crash."""
    bench = bench(idle_timeout_sec=10, worker_keep_sec=100)
    worker = bench.worker("a")
    bench.tick(9.0)
    assert not bench.sent(worker, m.Unload)
    bench.tick(2.0)
    assert bench.sent(worker, m.Unload) == [m.Unload(["vae:a:0"])] and bench.heard[-1] == "model_unloaded"
    bench.tick(80.0)
    assert worker.state is WorkerState.IDLE and len(bench.sent(worker, m.Unload)) == 1
    bench.tick(10.0)
    assert worker.state is WorkerState.STOPPING and worker.connection.closed
    bench.process(worker).code = 0
    bench.pool.lost(worker, "closed")
    assert not bench.pool.workers and bench.pool.events.crashes.total() == 0 and bench.heard[-1] == "worker_stopped"


def test_a_request_begins_the_idle_time_again(bench):
    """Idle is since the last answer."""
    bench = bench(idle_timeout_sec=10, worker_keep_sec=10)
    worker = bench.worker("a")
    bench.clock.now += 9
    bench.submit()
    bench.tick(9.0)
    bench.answer(worker)
    bench.tick(9.0)
    assert worker.state is WorkerState.IDLE and worker.models


def two_workers(bench: Bench) -> None:
    """Two idle workers of one key, each with the model."""
    bench.worker("a")
    queued(bench, 1)
    bench.tick(2.0)
    bench.ready()
    for worker in bench.pool.workers:
        bench.answer(worker)


SCALING = {"max_vae_workers": 2, "queue_threshold": 1, "scale_up_delay_sec": 1.0, "idle_timeout_sec": 10}


def test_extra_workers_end_first(bench):
    """After the idle timeout only one is left, and only that gives its memory back."""
    bench = bench(**SCALING)
    two_workers(bench)
    bench.tick(11.0)
    states = sorted(worker.state.value for worker in bench.pool.workers)
    assert "stopping" in states
    for worker in [worker for worker in bench.pool.workers if worker.state is WorkerState.STOPPING]:
        bench.pool.lost(worker, "closed")
    assert bench.pool.events.crashes.total() == 0


@pytest.mark.parametrize("kind", ["vae", "clip"])
def test_workers_that_stay(bench, kind):
    """As many as ``MIN_*_WORKERS`` says keep their models for ever."""
    bench = bench(idle_timeout_sec=10, worker_keep_sec=20, **{f"min_{kind}_workers": 1})
    worker = bench.worker("a", model=spec("a", kind))
    bench.tick(1000.0)
    assert worker.state is WorkerState.IDLE and worker.models and not bench.sent(worker, m.Unload)


def test_a_worker_of_the_other_kind_does_not_stay(bench):
    """A minimum of text encoder workers keeps no VAE."""
    bench = bench(idle_timeout_sec=10, worker_keep_sec=20, min_clip_workers=1)
    worker = bench.worker("a")
    bench.tick(30.0)
    assert worker.state is WorkerState.STOPPING


def test_a_pinned_model_outlasts_both_idle_limits(bench):
    """Its worker stays, and gives only the other models back."""
    bench = bench(idle_timeout_sec=10, worker_keep_sec=20)
    worker = bench.worker("a", "b")
    bench.pool.pinned.add("vae:a:0")
    bench.tick(30.0)
    assert worker.state is WorkerState.IDLE and list(worker.models) == ["vae:a:0"]
    bench.pool.unload(None)
    bench.tick(1.0)
    assert worker.state is WorkerState.STOPPING


# --- starts that fail --------------------------------------------------------------------------------------------


def test_a_process_that_cannot_be_started(bench):
    """The caller gets the reason; further ones too, without another try until the delay is over; it doubles."""
    bench = bench()
    bench.broken = FileNotFoundError("no such interpreter")
    _, waiter = bench.submit()
    assert isinstance(waiter.errors[0], WorkerCrashed) and "no such interpreter" in waiter.errors[0].message
    bench.broken = None
    bench.clock.now += 0.4
    with pytest.raises(WorkerCrashed, match="1 tries failed"):
        bench.submit()
    assert not bench.processes
    bench.clock.now += 0.1
    bench.broken = FileNotFoundError("still none")
    assert bench.submit()[1].errors
    bench.broken = None
    bench.clock.now += 0.9
    with pytest.raises(WorkerCrashed, match=r"2 tries failed.*still none"):
        bench.submit()
    bench.clock.now += 0.1
    bench.submit()
    assert len(bench.processes) == 1 and not bench.pool.events.crashes.total()


def test_all_that_wait_for_such_a_worker_fail(bench):
    """And nobody else."""
    bench = bench(worker_start_sec=10)
    (_, first), (_, second) = bench.submit(), bench.submit(spec("b"))
    _, other = bench.submit(spec(device="cpu"))
    bench.crash(bench.dial(0))
    assert [bool(waiter.errors) for waiter in (first, second, other)] == [True, True, False]


@pytest.mark.parametrize("code", [None, 1])
def test_a_start_that_ends_or_hangs(bench, code):
    """A process that ends is found at the next look, one that hangs after its time; its log's end says why."""
    bench = bench(worker_start_sec=10)
    _, waiter = bench.submit()
    (worker,) = bench.pool.workers
    worker.log.write_text("ImportError: no torch\n")
    bench.processes[0].code = code
    bench.tick(9.0)
    assert bool(waiter.errors) is (code is not None)
    bench.tick(2.0)
    (error,) = waiter.errors
    assert isinstance(error, WorkerCrashed) and "no torch" in error.message
    assert bench.processes[0].code is not None and not bench.pool.workers and bench.pool.events.crashes.total() == 1


def test_a_worker_says_why_it_cannot_start(bench):
    """Its own words count, not what else it has printed."""
    bench = bench()
    _, waiter = bench.submit()
    worker = bench.dial()
    worker.log.write_text("a warning of some library\n")
    bench.cannot_start(worker, "ImportError: no torch")
    (error,) = waiter.errors
    assert isinstance(error, WorkerCrashed) and error.message.endswith(": ImportError: no torch")
    assert worker.served == 0


def test_a_good_start_forgives(bench):
    """The next failure waits the first delay again."""
    bench = bench()
    bench.broken = OSError("x")
    bench.submit()
    bench.clock.now += 1
    bench.broken = None
    worker = bench.worker("a")
    bench.crash(worker)
    bench.broken = OSError("y")
    assert "1 tries failed" in bench.submit()[1].errors[0].message


def test_a_crash_of_a_worker_that_had_started_is_no_failed_start(bench):
    """The next request starts another at once."""
    bench = bench()
    bench.crash(bench.worker("a"))
    bench.submit()
    assert len(bench.processes) == 2 and bench.pool.events.crashes.total() == 1


def test_a_worker_that_runs_is_used_though_another_could_not_start(bench):
    """Back-off is about starts: none is tried before its time."""
    bench = bench(max_vae_workers=2, queue_threshold=1, scale_up_delay_sec=1.0)
    worker = bench.worker("a")
    queued(bench, 1)
    bench.broken = OSError("no more processes")
    bench.tick(2.0)
    bench.broken = None
    bench.tick(0.1)
    assert len(bench.processes) == 1
    _, waiter = bench.submit()
    assert not waiter.errors and len(bench.pool.queue) == 2
    bench.answer(worker)
    assert len(bench.pool.queue) == 1


# --- crashes -----------------------------------------------------------------------------------------------------


def test_a_request_is_tried_again_on_another_worker(bench):
    """Before those of its client that came later, and counted."""
    bench = bench()
    worker = bench.worker("a")
    (_, waiter), _ = bench.submit(), bench.submit()
    bench.crash(worker)
    second = bench.ready()
    assert second is not worker and second.work.waiters == [waiter]
    bench.answer(second)
    assert waiter.outcomes and (bench.pool.events.crashes.total(), bench.pool.retries) == (1, 1)


def test_a_request_that_crashed_two_workers_is_refused(bench):
    """It is named with the last pid; the others are served."""
    bench = bench()
    _, waiter = bench.submit()
    _, other = bench.submit()
    bench.crash(bench.ready())
    bench.crash(bench.ready())
    (error,) = waiter.errors
    assert isinstance(error, PoisonRequest) and "vae:a:0" in error.message and "pid 2" in error.message
    bench.answer(bench.ready())
    assert other.outcomes and (bench.pool.events.crashes.total(), bench.pool.retries) == (2, 1)


def test_a_request_that_everybody_left_is_not_tried_again(bench):
    """Its inputs are given back."""
    bench, memory = bench(), Memory()
    worker = bench.worker("a")
    work, waiter = bench.submit(pieces=[memory.piece()])
    bench.pool.cancel(work, waiter)
    bench.crash(worker)
    assert bench.pool.in_flight == 0 and memory.live == 0 and bench.pool.retries == 0


def test_a_silent_worker_is_lost(bench):
    """It is killed after a minute, and its request is tried again; silence of seconds is none."""
    bench = bench()
    worker = bench.worker("a")
    bench.submit()
    bench.clock.now += 59
    bench.pool.watch()
    assert bench.pool.workers == [worker]
    bench.clock.now += 2
    bench.pool.watch()
    assert bench.processes[0].code == -9 and worker.connection.closed and bench.pool.retries == 1


def test_memory_of_a_dead_worker_is_free_when_the_process_is(bench):
    """Until then the process may write there."""
    bench, memory = bench(), Memory()
    _, _ = bench.submit(reserve=memory.slot)
    worker = bench.ready(arena=True)
    assert memory.live == 1 and bench.job(worker).grant is not None
    bench.process(worker).kills = False
    bench.pool.lost(worker, "closed")
    bench.pool.watch()
    assert memory.live == 1
    bench.process(worker).code = -9
    bench.pool.watch()
    assert memory.live == 0


def test_a_lost_worker_is_lost_once(bench):
    """The connection's end after the kill counts nothing twice."""
    bench = bench()
    worker = bench.worker("a")
    bench.crash(worker)
    bench.pool.lost(worker, "closed")
    assert bench.pool.events.crashes.total() == 1


def test_a_failure_reaches_the_caller_and_the_page(bench):
    """Typed; the worker serves on."""
    bench = bench()
    _, waiter = bench.submit()
    worker = bench.ready()
    bench.fail(worker, "model_load")
    assert isinstance(waiter.errors[0], ModelLoadError) and worker.state is WorkerState.IDLE
    assert list(bench.pool.events.last_errors) == ["diffusers@cuda:0"]


# --- versions ----------------------------------------------------------------------------------------------------

OURS = {"comfyui": "0.8.0", "torch": "2.9"}
UPDATED = {"comfyui": "0.9.0", "torch": "2.9"}


def test_a_worker_of_other_versions_is_refused(bench):
    """Both versions are named; for a minute nobody starts another to find that out again."""
    bench = bench()
    _, waiter = bench.submit(spec(comfy=COMFY))
    worker = bench.ready(**UPDATED)
    (error,) = waiter.errors
    assert isinstance(error, ComfyRefused) and "0.8.0" in error.message and "0.9.0" in error.message
    bench.clock.now += 59
    with pytest.raises(ComfyRefused, match=r"0\.9\.0"):
        bench.submit(spec(comfy=COMFY))
    assert len(bench.processes) == 1 and worker.work is None
    bench.clock.now += 2
    bench.submit(spec(comfy=COMFY))
    assert len(bench.processes) == 2


def test_a_client_that_was_updated_too_is_served(bench):
    """By the worker that the other one was refused."""
    bench = bench()
    bench.submit(spec(comfy=COMFY))
    worker = bench.ready(**UPDATED)
    updated = msgspec.structs.replace(COMFY, version="0.9.0")
    _, waiter = bench.submit(spec(comfy=updated))
    bench.answer(worker)
    assert waiter.outcomes and len(bench.processes) == 1


def test_an_old_worker_serves_its_own_while_a_new_one_serves_the_others(bench):
    """An installation that was updated under a running worker: each client has the worker that it fits."""
    bench = bench()
    _, waiter = bench.submit(spec(comfy=COMFY))
    old = bench.ready(**OURS)
    bench.answer(old)
    assert waiter.outcomes
    updated = msgspec.structs.replace(COMFY, version="0.9.0")
    bench.submit(spec(comfy=updated))
    new = bench.ready(**UPDATED)
    assert new.work is not None and new is not old
    bench.submit(spec(comfy=COMFY))
    assert old.work is not None


# --- the end -----------------------------------------------------------------------------------------------------


def test_draining(bench):
    """What waits is refused, what runs is finished, what comes is refused; then every process ends."""
    bench = bench()
    worker = bench.worker("a")
    (_, running), (_, queued) = bench.submit(), bench.submit()

    def sleeping() -> None:
        if worker.work is not None and bench.clock.now > end - 3:
            bench.answer(worker)
        elif worker.connection.closed:
            bench.process(worker).code = 0

    bench.on_sleep = sleeping
    end = bench.clock.now + 5
    asyncio.run(bench.pool.close(5.0))
    assert isinstance(queued.errors[0], ShuttingDown) and running.outcomes
    assert bench.process(worker).code == 0 and not bench.pool.workers
    with pytest.raises(ShuttingDown):
        bench.submit()


def test_draining_has_an_end(bench):
    """Past it what runs gets its error, and its process is killed at once."""
    bench = bench()
    worker = bench.worker("a")
    _, running = bench.submit()
    before = bench.clock.now
    asyncio.run(bench.pool.close(5.0))
    assert isinstance(running.errors[0], ShuttingDown) and bench.process(worker).code == -9
    assert 5 <= bench.clock.now - before < 6


def test_a_worker_that_does_not_end_is_killed(bench):
    """An idle one has two seconds to end by itself."""
    bench = bench()
    worker = bench.worker("a")
    before = bench.clock.now
    asyncio.run(bench.pool.close(5.0))
    assert bench.process(worker).code == -9 and 2 <= bench.clock.now - before < 3


def test_a_worker_dies_while_draining(bench):
    """Another could not dial in: the caller learns it at once."""
    bench = bench()
    worker = bench.worker("a")
    _, running = bench.submit()
    bench.on_sleep = lambda: bench.crash(worker) if worker.work is not None else None
    asyncio.run(bench.pool.close(60.0))
    assert isinstance(running.errors[0], ShuttingDown) and len(bench.processes) == 1


def test_the_pool_looks_after_its_workers_by_itself(bench, caplog):
    """Again and again, and on after a look that failed."""
    bench, looks = bench(), []

    def look() -> None:
        looks.append(bench.clock.now)
        if len(looks) == 1:
            raise RuntimeError("a bug")

    async def main() -> None:
        bench.pool.watch = look
        bench.pool.open("127.0.0.1", 1)
        while len(looks) < 3:
            await asyncio.sleep(0)
        await bench.pool.close(0)

    async def sleep(seconds: float) -> None:
        bench.clock.now += seconds
        await asyncio.sleep(0)

    bench.pool._sleep = sleep
    asyncio.run(main())
    assert "a bug" in caplog.text
