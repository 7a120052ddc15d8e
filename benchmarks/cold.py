"""What a first call costs: on a cold daemon, and after 60 s of idleness, against loading and calling locally."""

from __future__ import annotations

import time

from common import Peer, Result, client, daemon, make_models, median, result

from luna_daemon.proxy import DaemonCLIP

IDLE_S = 60


def measure() -> dict[str, Result]:
    make_models()
    start = time.perf_counter()
    own = Peer()
    own.ask(do="prompts", count=1, text="first")
    local_cold = time.perf_counter() - start
    local_warm = median([own.ask(do="prompts", count=1, text=f"warm {n}") for n in range(5)])
    own.close()
    with daemon(conditioning_cache_mb=0) as running, client(running) as one:
        clip = DaemonCLIP(clip_type="sdxl", client=one)
        cold = seconds(clip, "first")
        warm = median([seconds(clip, f"warm {n}") for n in range(5)])
        one.unload()
        loading = median([reload(one, clip, n) for n in range(3)]) - warm
        time.sleep(IDLE_S)
        idle = seconds(clip, "after a rest")
    return {
        "cold_first_call": result(cold / local_cold, "x", "", daemon_s=cold, local_load_and_call_s=local_cold),
        "after_60s_idle": result(
            idle / (local_warm + max(loading, 0.0)), "x", "<= 1.2", after_idle_s=idle, warm_local_call_s=local_warm,
            warm_daemon_call_s=warm, load_from_page_cache_s=loading,
        ),
    }  # fmt: skip


def seconds(clip: DaemonCLIP, text: str) -> float:
    start = time.perf_counter()
    clip.encode(text)
    return time.perf_counter() - start


def reload(one: object, clip: DaemonCLIP, number: int) -> float:
    """A call right after the models were unloaded: what loading from the page cache costs."""
    one.unload()  # type: ignore[attr-defined]
    return seconds(clip, f"reload {number}")


if __name__ == "__main__":
    for key, row in measure().items():
        print(key, row)
