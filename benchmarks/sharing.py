"""What sharing saves: memory of several clients, and prompts per second of two, against processes of their own."""

from __future__ import annotations

import time

from common import RUNTIME, Peer, Result, client, daemon, make_models, median, peers, pss, result, times_ms

from luna_daemon.proxy import DaemonCLIP

COUNTS = (1, 2, 4)
PROMPTS = 5
RUNS = 3


def measure() -> dict[str, Result]:
    make_models()
    return {**memory(), **throughput(), "cached_prompt_ms": cached_prompt()}


def use(running: list[Peer]) -> None:
    """Every process has used its text encoders and its VAE, so what it needs is in memory."""
    for number, peer in enumerate(running):
        peer.ask(do="prompts", count=1, text=f"a picture of {number}")
        peer.ask(do="decode", side=16)


def memory() -> dict[str, Result]:
    with_daemon: dict[int, dict[str, int]] = {}
    alone: dict[int, dict[str, int]] = {}
    for count in COUNTS:
        with daemon() as running, peers(count, *options(running)) as clients:
            use(clients)
            with client(running) as ask:
                workers = ask.get_daemon_info()["workers"]
            with_daemon[count] = {
                **{f"client {n}": pss(peer.process.pid) for n, peer in enumerate(clients, 1)},
                "daemon": pss(running.pid),
                **{f"worker {worker['number']}": pss(worker["pid"]) for worker in workers},
            }
    with peers(max(COUNTS)) as processes:
        for count in range(1, max(COUNTS) + 1):
            use(processes[count - 1 : count])
        each = {f"process {n}": pss(peer.process.pid) for n, peer in enumerate(processes, 1)}
    for count in COUNTS:
        alone[count] = dict(list(each.items())[:count])
    ratios = {count: sum(with_daemon[count].values()) / sum(alone[count].values()) for count in COUNTS}
    most = max(COUNTS)
    return {
        f"clients{most}_memory_ratio": result(
            ratios[most], "x", "<= 0.4",
            others={f"{count} clients": round(ratios[count], 3) for count in COUNTS if count != most},
            with_daemon_mb=megabytes(with_daemon[most]), alone_mb=megabytes(alone[most]),
        )
    }  # fmt: skip


def options(running: object) -> tuple[str, ...]:
    return ("--port", str(running.port), "--runtime-dir", str(RUNTIME))  # type: ignore[attr-defined]


def megabytes(parts: dict[str, int]) -> dict[str, int]:
    return {**{name: nbytes >> 20 for name, nbytes in parts.items()}, "together": sum(parts.values()) >> 20}


def throughput() -> dict[str, Result]:
    """Two clients of one daemon against two processes of their own, in turn; all prompts distinct, cache off."""
    rates: dict[str, list[float]] = {"daemon": [], "own": [], "own, one thread each": []}
    with (
        daemon(conditioning_cache_mb=0) as running,
        peers(2, *options(running)) as shared,
        peers(2) as own,
        peers(2, threads=1) as single,
    ):
        sides = {"daemon": shared, "own": own, "own, one thread each": single}
        for side in sides.values():
            for peer in side:
                peer.ask(do="prompts", count=1, text="warm")
        for run in range(RUNS):
            for name, side in sides.items():
                rates[name].append(rate(side, run))
    base, others = median(rates["daemon"]), {name: median(rates[name]) for name in sides if name != "daemon"}
    return {
        "clients2_throughput_ratio": result(
            base / others["own"], "x", ">= 1.5", runs=RUNS,
            prompts_per_s={"daemon": round(base, 3), **{name: round(value, 3) for name, value in others.items()}},
            over_one_thread_each=base / others["own, one thread each"],
        )
    }  # fmt: skip


def rate(side: list[Peer], run: int) -> float:
    start = time.perf_counter()
    for number, peer in enumerate(side):
        peer.tell(do="prompts", count=PROMPTS, text=f"run {run} peer {number} prompt")
    for peer in side:
        peer.answer()
    return PROMPTS * len(side) / (time.perf_counter() - start)


def cached_prompt() -> Result:
    with daemon() as running, client(running) as one:
        clip = DaemonCLIP(clip_type="sdxl", client=one)
        tokens = clip.tokenize("a cat, (sunset:1.2)")
        times = times_ms(lambda: clip.encode_from_tokens(tokens, return_pooled=True), 300)
        whole = times_ms(lambda: clip.encode_from_tokens(clip.tokenize("a cat, (sunset:1.2)"), return_pooled=True), 300)
    return result(median(times), "ms", "<= 1", with_tokenize_ms=median(whole), runs=len(times))


if __name__ == "__main__":
    for key, row in measure().items():
        print(key, row)
