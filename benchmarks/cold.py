"""What a first call costs: on a cold daemon, and after 60 s of idleness, against loading and calling locally."""

from __future__ import annotations

import time

from common import Peer, Result, client, daemon, make_models, median, result

from luna_daemon.client import DaemonClient
from luna_daemon.proxy import DaemonCLIP

IDLE_S = 60
RUNS = 3
IDLE_RUNS = 2


def measure() -> dict[str, Result]:
    make_models()
    local_colds, local_warms = zip(*[local() for _ in range(RUNS)])
    colds = [cold_daemon() for _ in range(RUNS)]
    with daemon(conditioning_cache_mb=0) as running, client(running) as one:
        clip = DaemonCLIP(clip_type="sdxl", client=one)
        seconds(clip, "first")
        warm = median([seconds(clip, f"warm {n}") for n in range(5)])
        loading = max(median([reload(one, clip, n) for n in range(RUNS)]) - warm, 0.0)
        idles = [after_a_rest(clip, n) for n in range(IDLE_RUNS)]
    cold, local_cold, local_warm, idle = (
        median(colds),
        median(list(local_colds)),
        median(list(local_warms)),
        median(idles),
    )
    return {
        "cold_first_call": result(
            cold / local_cold, "x", daemon_s=cold, local_load_and_call_s=local_cold, runs=RUNS
        ),
        # At most 1.2 warm local calls and the load from the page cache: what is left after the load, over a call.
        "after_60s_idle": result(
            (idle - loading) / local_warm, "x", "<= 1.2", after_idle_s=idle,
            at_most_s=1.2 * local_warm + loading, warm_local_call_s=local_warm, load_from_page_cache_s=loading,
            warm_daemon_call_s=warm, each_after_idle_s=[round(each, 4) for each in idles], runs=IDLE_RUNS,
        ),
    }  # fmt: skip


def local() -> tuple[float, float]:
    """Seconds of a process' start with its first call, and of a warm call."""
    start = time.perf_counter()
    own = Peer()
    try:
        own.ask(do="prompts", count=1, text="first")
        cold = time.perf_counter() - start
        return cold, median([own.ask(do="prompts", count=1, text=f"warm {n}") for n in range(5)])
    finally:
        own.close()


def cold_daemon() -> float:
    """Seconds of the first call on a daemon that has no worker yet."""
    with daemon(conditioning_cache_mb=0) as running, client(running) as one:
        return seconds(DaemonCLIP(clip_type="sdxl", client=one), "first")


def after_a_rest(clip: DaemonCLIP, number: int) -> float:
    time.sleep(IDLE_S)
    return seconds(clip, f"after a rest {number}")


def seconds(clip: DaemonCLIP, text: str) -> float:
    start = time.perf_counter()
    clip.encode(text)
    return time.perf_counter() - start


def reload(one: DaemonClient, clip: DaemonCLIP, number: int) -> float:
    """A call right after the models were unloaded: what loading from the page cache costs."""
    one.unload()
    return seconds(clip, f"reload {number}")


if __name__ == "__main__":
    for key, row in measure().items():
        print(key, row)
