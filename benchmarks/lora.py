"""What the LoRA cache saves: a 100 MB LoRA from the daemon against ``safetensors``' own loading, warm and cold."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from common import MODELS, RUNTIME, Peer, Result, client, daemon, median, peers, pss, result

LORAS = MODELS / "loras"
FILE = LORAS / "bench_lora.safetensors"
PT = LORAS / "bench_lora.pt"
MODULES = 722
"""Of SDXL's UNet, as trainers make them: each has three tensors."""
PROCESSES = 8
ROUNDS = 5
WAYS = ("daemon", "load_file", "safe_open")


def make_lora() -> None:
    """A LoRA of SDXL's size and number of tensors, float16, seeded, once."""
    import torch
    from safetensors.torch import save_file

    if FILE.exists() and PT.exists():
        return
    LORAS.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number in range(MODULES):
        name = f"lora_unet_block_{number}_attn1_to_q"
        state[f"{name}.lora_down.weight"] = torch.randn(24, 1440, generator=generator).half()
        state[f"{name}.lora_up.weight"] = torch.randn(1440, 24, generator=generator).half()
        state[f"{name}.alpha"] = torch.tensor(16.0).half()
    save_file(state, FILE)
    torch.save(state, PT)


def measure() -> dict[str, Result]:
    make_lora()
    with setting(1) as (running, one):
        warm_alone, cold_alone = rounds(running, one, cold=False), rounds(running, one, cold=True)
    with setting(PROCESSES) as (running, eight):
        warm, cold = rounds(running, eight, cold=False), rounds(running, eight, cold=True)
        own = {way: grown(running, eight, way, FILE) for way in WAYS}
        own_pt = {way: grown(running, eight, way, PT) for way in ("daemon", "torch_load")}
    size = FILE.stat().st_size
    version = f"safetensors {safetensors.__version__}"
    return {
        "lora_hit_ms": result(
            warm_alone["daemon"]["usable_ms"], "ms", "<= 3", mb=size / 1e6, tensors=3 * MODULES, runs=ROUNDS,
            then_all_read_ms=warm_alone["daemon"]["read_ms"], **sides(warm_alone, "load_file", "safe_open"),
            cold=cold_alone,
        ),
        "lora_ram_ratio": result(
            own["daemon"] / size, "x", "<= 1.1", processes=PROCESSES, grown_mb=own["daemon"] / 1e6,
            one_copy_mb=size / 1e6,
        ),
        "lora_vs_load_file": result(
            warm["load_file"]["usable_ms"] / warm["daemon"]["usable_ms"], "x", ">= 3", processes=PROCESSES,
            rival=version, warm=warm, cold=cold,
            until_all_is_read=warm["load_file"]["read_ms"] / warm["daemon"]["read_ms"],
            cold_until_all_is_read=cold["load_file"]["read_ms"] / cold["daemon"]["read_ms"],
        ),
        "lora_vs_load_file_ram": result(
            own["daemon"] / own["load_file"], "x", "<= 0.25", processes=PROCESSES, rival=version,
            grown_mb={way: round(value / 1e6, 1) for way, value in own.items()},
        ),
        "lora_pt_vs_torch_load_ram": result(
            own_pt["daemon"] / own_pt["torch_load"], "x", processes=PROCESSES,
            grown_mb={way: round(value / 1e6, 1) for way, value in own_pt.items()},
        ),
    }  # fmt: skip


def sides(found: dict[str, dict[str, float]], *ways: str) -> dict[str, float]:
    return {f"{way}_ms": found[way]["usable_ms"] for way in ways}


@contextmanager
def setting(count: int) -> Any:
    """A daemon, and so many processes beside it."""
    with (
        daemon(model_dirs=[MODELS]) as running,
        peers(count, "--port", str(running.port), "--runtime-dir", str(RUNTIME), script="lora_peer.py") as others,
    ):
        yield running, others


def rounds(running: Any, others: list[Peer], cold: bool) -> dict[str, dict[str, float]]:
    """Per way the median time until a dict is usable, and until all of it has been read; all processes at once."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(ROUNDS + 1):
        for way in WAYS:
            for peer in others:
                peer.ask(do="drop")
            if cold:
                forget(running)
            for peer in others:
                peer.tell(do="load", way=way, path=str(FILE))
            answers = [peer.answer() for peer in others]
            if number:  # the first round warms code, and the cache
                found[way] += answers
    return {
        way: {key: round(median([answer[key] for answer in answers]), 2) for key in ("usable_ms", "read_ms")}
        for way, answers in found.items()
    }


def forget(running: Any) -> None:
    """Out of the daemon's cache, and out of the page cache, where the system lets us."""
    with client(running) as one:
        one.evict_lora()
    if hasattr(os, "posix_fadvise"):
        file = os.open(FILE, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def grown(running: Any, others: list[Peer], way: str, path: Path) -> int:
    """Bytes by which all processes together, the daemon included, have grown once all hold and have read it."""
    for peer in others:
        peer.ask(do="drop")
    before = together(running, others)
    for peer in others:
        peer.tell(do="load", way=way, path=str(path))
    for peer in others:
        peer.answer()
    return together(running, others) - before


def together(running: Any, others: list[Peer]) -> int:
    pids = [running.pid, *(peer.process.pid for peer in others)]
    return sum(pss(pid) for pid in pids)


if __name__ == "__main__":
    for key, row in measure().items():
        print(key, row)
