"""What is counted, for how long it is remembered, who is told, and what is never shown."""

from __future__ import annotations

import pytest

from luna_daemon.pool.events import BOUNDS, Events, Histogram, base_name, model_name, without_folders
from tests.unit.fakes import Clock


def test_a_histogram_counts_up_to_its_bounds():
    """A value on a bound belongs to it; the last bucket holds all."""
    histogram = Histogram()
    for seconds in (0.0005, 0.001, 0.3, 1e6):
        histogram.add(seconds)
    buckets = dict(histogram.buckets())
    assert buckets["0.001"] == 2 and buckets["0.25"] == 2 and buckets["0.5"] == 3 and buckets["120.0"] == 3
    assert buckets["+Inf"] == 4 and histogram.total == pytest.approx(1000000.3015)
    assert list(BOUNDS) == sorted(BOUNDS)


def test_latency_is_of_the_last_minutes():
    """Median, percentile and mean of what is recent; failures are not among it."""
    clock = Clock()
    events = Events(clock)
    events.request("vae.decode", "a", 9.0)
    clock.now += 301
    for ms in range(1, 101):
        events.request("vae.decode", "b", ms / 1000)
    events.request("vae.decode", "b", 50.0, "out_of_memory")
    assert events.latency() == {"vae.decode": {"count": 100, "p50_ms": 50.0, "p95_ms": 95.0, "mean_ms": 50.5}}
    clock.now += 301
    assert events.latency() == {}
    assert events.results == {("vae.decode", "ok"): 101, ("vae.decode", "out_of_memory"): 1}


def test_one_answer_is_its_own_median():
    """No division by nothing, no index past the end."""
    events = Events(Clock())
    events.request("ping", "", 0.002)
    assert events.latency()["ping"] == {"count": 1, "p50_ms": 2.0, "p95_ms": 2.0, "mean_ms": 2.0}


def test_throughput_forgets_after_ten_seconds():
    """All results of work count, whoever only looks does not; after ten seconds none does."""
    clock = Clock()
    events = Events(clock)
    assert events.throughput_per_s == 0
    for _ in range(30):
        clock.now += 0.1
        events.request("vae.decode", "", 0.0)
        events.request("clip.encode", "", 0.0, "cancelled")
        events.request("info", "", 0.0)
    assert events.throughput_per_s == pytest.approx(6.0)
    clock.now += 8.5
    assert 0 < events.throughput_per_s < 6
    clock.now += 2
    assert events.throughput_per_s == 0


def test_models_past_the_first_hundred_share_a_label():
    """Labels do not grow for ever."""
    events = Events(Clock())
    for number in range(150):
        events.request("vae.decode", f"model {number}", 0.1)
    assert len(events.latencies) == 101 and sum(events.latencies["vae.decode", "other"].counts) == 50


def test_listeners_hear_everything_until_they_leave():
    """Requests, scaling, errors, with their facts."""
    heard = []
    events = Events(Clock())

    def listener(kind, data):
        heard.append((kind, data))

    events.listen(listener)
    events.request("clip.encode", "clip_l", 0.5)
    events.scaling("model_loaded", 3, "diffusers@cpu", model="clip_l")
    events.failed("busy", "the queue is full (2 requests wait)", "clip.encode", "clip_l")
    events.unlisten(listener)
    events.request("clip.encode", "clip_l", 0.5)
    assert [kind for kind, _ in heard] == ["request", "scaling", "error"]
    request, scaling, error = (data for _, data in heard)
    assert (request["op"], request["model"], request["seconds"], request["result"]) == (
        "clip.encode", "clip_l", 0.5, "ok",
    )  # fmt: skip
    assert (scaling["event"], scaling["worker"], scaling["key"], scaling["model"]) == (
        "model_loaded", 3, "diffusers@cpu", "clip_l",
    )  # fmt: skip
    assert error["message"] == "the queue is full (2 requests wait)" and error["code"] == "busy"


def test_what_may_quote_a_caller_is_not_shown():
    """Of a wrong argument only the code is told; of a worker's bug only that the log has it."""
    heard = []
    events = Events(Clock())
    events.listen(lambda kind, data: heard.append(data))
    events.failed("bad_request", "a prompt of mine is wrong", "clip.encode")
    events.worker_failed("diffusers@cpu", "internal", "KeyError: 'a prompt of mine'")
    assert heard[0]["message"] == "" and heard[0]["code"] == "bad_request"
    assert events.last_errors["diffusers@cpu"][0] == "internal: see the daemon's log"


def test_a_restart_is_a_start_after_a_crash_of_the_same_key():
    """A worker more is none; two crashes are two."""
    events = Events(Clock())
    events.scaling("worker_started", 1, "echo@cpu")
    events.worker_crashed(1, "echo@cpu", "killed /home/me/x.log")
    events.scaling("worker_started", 2, "diffusers@cpu")
    assert not events.restarts
    events.scaling("worker_started", 3, "echo@cpu")
    events.scaling("worker_started", 4, "echo@cpu")
    assert events.restarts == {"echo@cpu": 1} and events.crashes == {"echo@cpu": 1}
    assert events.last_errors["echo@cpu"][0] == "killed x.log"
    assert events.scalings["worker_crashed"] == 1


@pytest.mark.parametrize(
    "key, name", [("vae:sdxl_vae:0123", "sdxl_vae"), ("clip:a:b:c:0123", "a:b:c"), ("echo", "echo"), ("", "")]
)
def test_names_of_models(key, name):
    """The stem of the first file."""
    assert model_name(key) == name


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/me/a b/x.safetensors", "x.safetensors"), ("C:\\Users\\me\\x.pt", "x.pt"), ("style/x.pt", "style/x.pt"),
        ("x", "x"), ("", ""), ("\\\\server\\share\\x.pt", "x.pt"),
    ],
)  # fmt: skip
def test_base_names(text, shown):
    """Only absolute paths lose their folders: relative names are names."""
    assert base_name(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("model file '/home/me/my models/x.st' does not exist", "model file 'x.st' does not exist"),
        ('file "C:\\Users\\me\\x.st" is cut', 'file "x.st" is cut'),
        ("tried /a/b/x.st, /c/d/x.st", "tried x.st, x.st"),
        ("~/secret/x.st: gone (in /tmp/y)", "x.st: gone (in y)"),
        ("no path at all", "no path at all"),
        ("y" * 400, "y" * 297 + "..."),
    ],
)
def test_messages_without_folders(text, shown):
    """Each path becomes its last part, whatever surrounds it."""
    assert without_folders(text) == shown
