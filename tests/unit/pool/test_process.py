"""A worker's own words: where they go when it fails."""

from __future__ import annotations

import logging

import msgspec

from luna_daemon.config import load_settings
from luna_daemon.core import InternalError
from luna_daemon.pool.process import WorkerKey, WorkerProcess
from luna_daemon.pool.work import Work
from luna_daemon.wire import messages as m
from luna_daemon.workers import WorkerPool
from tests.unit.fakes import Waiter

STACK = '  File "compute.py", line 12, in run\n    model[name]\n'


def worker_with(log) -> WorkerProcess:
    """A worker that computes job 7."""
    worker = WorkerProcess(3, WorkerKey("diffusers", "cpu"), "cpu", 1, {}, log)
    spec = m.LoadSpec("vae:demo:0123", "vae", "sd3", (), "cpu", "auto")
    worker.work, worker.job = Work("vae.decode", msgspec.Raw(b""), spec, [], 1, None, [Waiter()]), 7
    return worker


def test_last_words(tmp_path):
    """What the worker sent, else the last line that it printed; nothing where there is none."""
    worker = worker_with(tmp_path / "worker.log")
    assert worker.last_words() == ""
    worker.log.write_text("x" * 100_000 + "\n2026-01-01 INFO it starts\n  Segmentation fault \n")
    assert worker.last_words() == "Segmentation fault"
    worker.reason = "ImportError: no torch"
    assert worker.last_words() == "ImportError: no torch"


def test_a_bug_in_a_worker_reaches_the_log(tmp_path, caplog):
    """The caller gets the error, the log the traceback, the status page only that there is one."""
    pool, worker = WorkerPool(load_settings({}, {}), tmp_path), worker_with(tmp_path / "worker.log")
    assert worker.work is not None
    (waiter,) = worker.work.waiters
    with caplog.at_level(logging.INFO):
        pool.received(worker, m.Failure(7, "internal", "KeyError: 'weights'", trace=STACK), None)
    (error,) = waiter.errors
    assert isinstance(error, InternalError)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"worker 3: vae.decode on vae:demo:0123 failed: KeyError: 'weights'\n{STACK.rstrip()}"
    )
    assert pool.events.last_errors["diffusers@cpu"][0] == "internal: see the daemon's log"


def test_a_wrong_argument_is_no_failure_of_the_worker(tmp_path, caplog):
    """It is the caller's to know: neither log nor page tell of it."""
    pool, worker = WorkerPool(load_settings({}, {}), tmp_path), worker_with(tmp_path / "worker.log")
    with caplog.at_level(logging.INFO):
        pool.received(worker, m.Failure(7, "bad_request", "latents have shape [1]"), None)
    assert not caplog.records and not pool.events.last_errors
