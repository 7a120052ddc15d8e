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

PRINTED = """2026-01-01 INFO it starts
2026-01-01 ERROR job 1 failed
Traceback (most recent call last):
  File "older.py", line 1, in run
ValueError: older
2026-01-01 ERROR job 7 failed
Traceback (most recent call last):
  File "compute.py", line 12, in run
    model[name]
KeyError: 'weights'
"""


def worker_with(log) -> WorkerProcess:
    """A worker that computes job 7."""
    worker = WorkerProcess(3, WorkerKey("diffusers", "cpu"), "cpu", 1, {}, log)
    spec = m.LoadSpec("vae:demo:0123", "vae", "sd3", (), "cpu", "auto")
    worker.work, worker.job = Work("vae.decode", msgspec.Raw(b""), spec, [], 1, None, [Waiter()]), 7
    return worker


def test_the_last_traceback(tmp_path):
    """The newest one, without the heading; nothing where there is none."""
    log = tmp_path / "worker.log"
    worker = worker_with(log)
    assert worker.trace() == worker.tail() == ""
    log.write_text("2026-01-01 INFO it starts\n")
    assert worker.trace() == "" and worker.tail() == "2026-01-01 INFO it starts"
    log.write_text("x" * 100_000 + "\n" + PRINTED)
    assert worker.trace() == "  File \"compute.py\", line 12, in run\n    model[name]\nKeyError: 'weights'"
    assert worker.tail() == "KeyError: 'weights'"


def test_a_bug_in_a_worker_reaches_the_log(tmp_path, caplog):
    """The caller gets the error, the log the traceback, the status page only that there is one."""
    (tmp_path / "worker.log").write_text(PRINTED)
    pool, worker = WorkerPool(load_settings({}, {}), tmp_path), worker_with(tmp_path / "worker.log")
    assert worker.work is not None
    (waiter,) = worker.work.waiters
    with caplog.at_level(logging.INFO):
        pool.received(worker, m.Failure(7, "internal", "KeyError: 'weights'"), None)
    (error,) = waiter.errors
    assert isinstance(error, InternalError)
    (record,) = caplog.records
    assert record.getMessage().startswith("worker 3: vae.decode on vae:demo:0123 failed: KeyError: 'weights'\n  File ")
    assert pool.events.last_errors["diffusers@cpu"][0] == "internal: see the daemon's log"


def test_a_wrong_argument_is_no_failure_of_the_worker(tmp_path, caplog):
    """It is the caller's to know: neither log nor page tell of it."""
    pool, worker = WorkerPool(load_settings({}, {}), tmp_path), worker_with(tmp_path / "worker.log")
    with caplog.at_level(logging.INFO):
        pool.received(worker, m.Failure(7, "bad_request", "latents have shape [1]"), None)
    assert not caplog.records and not pool.events.last_errors
