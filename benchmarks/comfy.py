"""What sharing saves and costs inside real ComfyUI: memory, prompts per second, and time per call.

python benchmarks/comfy.py [memory|throughput|calls ...]

``COMFYUI_PATH`` names ComfyUI's folder and ``COMFYUI_PYTHON`` the interpreter that runs it. Prints a table and puts its
rows into ``build/bench.json``, beside those of ``benchmarks/run.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luna_daemon.pool.spawning import WAITING

USAGE = "make bench-comfy needs COMFYUI_PATH (ComfyUI's folder) and COMFYUI_PYTHON (the interpreter that runs it)"
COUNTS = (1, 2, 4)
INSTANCE_GB = 3
"""Room for one ComfyUI with models of its own."""
PROMPTS, ROUNDS = 3, 3
PAIRS, SMALL_PAIRS = {"clip_sdxl": 12, "vae_sdxl": 5}, {"clip_l": 40, "vae_tiny": 40}
ALIKE = {
    **WAITING,
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}
"""What else differs between a worker and a process that has computed before, made the same for both: workers spin
for a moment only, and how long glibc keeps freed pages depends on what a process has freed so far."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them without one")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if problem := missing(os.environ.get("COMFYUI_PATH", ""), os.environ.get("COMFYUI_PYTHON", "")):
        print(problem, file=sys.stderr)
        raise SystemExit(2)
    from comfy_servers import make_model_folder
    from common import machine, make_models, stage
    from report import FILE, earlier, table, write
    from rich.console import Console

    console, here = Console(), machine()
    with stage(console, "making models"):
        make_models()
        make_model_folder()
    results: dict[str, Any] = {}
    for name in parts:
        with stage(console, f"measuring {name} inside ComfyUI"):
            results.update({key: {**row, **versions()} for key, row in PARTS[name]().items()})
        write(FILE, {**earlier(FILE, here), **results}, here)
    console.print(table(results))


def missing(root: str, python: str) -> str:
    """What is wrong with the two variables, in one line; empty if nothing is."""
    if not root or not python:
        return USAGE
    if not (Path(root) / "main.py").is_file():
        return f"COMFYUI_PATH is {root!r}: there is no main.py; name ComfyUI's own folder"
    if not Path(python).is_file():
        return f"COMFYUI_PYTHON is {python!r}: there is no such file; name the interpreter that runs ComfyUI"
    return ""


def versions() -> dict[str, str]:
    """What ran: the machine's own entry in the file names the torch of the benchmark, not ComfyUI's."""
    code = "import comfyui_version, torch; print(comfyui_version.__version__, torch.__version__)"
    said = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], "-c", code], cwd=os.environ["COMFYUI_PATH"], check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    comfyui, torch = said.stdout.split()
    return {"comfyui": comfyui, "comfyui_torch": torch}


@contextmanager
def comfy_daemon(**settings: Any) -> Iterator[Any]:
    """A daemon whose workers run this ComfyUI; every prompt is computed, none remembered."""
    from comfy_servers import DEMO_VAE, MODEL_FOLDER
    from common import MODELS, daemon

    with daemon(
        backend="comfy", comfyui_path=os.environ["COMFYUI_PATH"], comfyui_python=os.environ["COMFYUI_PYTHON"],
        model_dirs=[str(MODEL_FOLDER), str(MODELS.resolve()), str(DEMO_VAE.parent)], models={},
        conditioning_cache_mb=0, **settings,
    ) as running:  # fmt: skip
        yield running


# --- memory, of real servers ---------------------------------------------------------------------------------------


def measure_memory() -> dict[str, Any]:
    """Servers start one after the other, and each encodes a prompt and decodes a picture: with the daemon, without.

    What one instance adds is its USS beside others, which map the same libraries. A sum is of PSS, which divides
    shared pages among those who map them; the daemon's shared memory is added to it as far as it is reserved, so that
    nothing of it is left out.
    """
    import psutil
    from common import client

    room = psutil.virtual_memory().available >> 30
    counts = [count for count in COUNTS if count * INSTANCE_GB + 4 <= room]
    if not counts:
        raise SystemExit(f"{room} GB of memory are free; a ComfyUI and a daemon need {INSTANCE_GB + 4}")
    with comfy_daemon() as running, client(running) as ask:
        sharing = grow(counts, running.port, lambda: daemon_parts(ask))
    return memory_rows(sharing, grow(counts, None, dict))


@dataclass
class Grown:
    """Bytes of servers that were started one after the other."""

    bare: list[int] = field(default_factory=list)
    """USS of each before it had a model."""
    used: list[int] = field(default_factory=list)
    """USS of each at the end."""
    together: dict[int, dict[str, int]] = field(default_factory=dict)
    """PSS of all parts, by number of instances."""


def grow(counts: list[int], daemon_port: int | None, others: Callable[[], dict[str, int]]) -> Grown:
    """Start and use one server after the other.

    Args:
        counts: with how many all parts are measured.
        daemon_port: where the daemon is; without one ComfyUI's own loaders load the models.
        others: memory of what runs besides.
    """
    from comfy_servers import image_workflow, servers

    found, shared = Grown(), daemon_port is not None
    with ExitStack() as ends:
        running: list[Any] = []
        for count in range(1, max(counts) + 1):
            running += ends.enter_context(servers(1, daemon_port or 0))
            found.bare.append(running[-1].uss())
            running[-1].make(image_workflow(f"a picture of {count}", shared))
            if count in counts:
                instances = {f"instance {n}": one.pss() for n, one in enumerate(running, 1)}
                found.together[count] = {**instances, **others()}
        found.used = [server.uss() for server in running]
        if shared:
            no_fallbacks(running)
    return found


def no_fallbacks(running: list[Any]) -> None:
    if any(server.fell_back() for server in running):
        raise SystemExit(f"a local model stepped in for the daemon's: the figures mean nothing; see {running[0].log}")


def daemon_parts(ask: Any) -> dict[str, int]:
    """PSS of daemon and workers, and the shared memory between them and the instances."""
    from common import pss

    info = ask.get_daemon_info()
    pids = {"daemon": info["pid"], **{f"worker {worker['number']}": worker["pid"] for worker in info["workers"]}}
    return {**{name: pss(pid) for name, pid in pids.items()}, "shared memory": int(info["arena"].get("reserved", 0))}


def memory_rows(sharing: Grown, alone: Grown) -> dict[str, Any]:
    from common import median, result

    most = max(alone.together)
    # The first server's libraries may be nobody else's: not its own memory, though USS counts them so.
    beside = slice(1, None) if most > 1 else slice(None)
    empty, shell, own = (
        median([nbytes / 2**20 for nbytes in values[beside]])
        for values in ([*sharing.bare, *alone.bare[1:]], sharing.used, alone.used)
    )
    totals = {name: {n: sum(parts.values()) for n, parts in side.together.items()}
              for name, side in (("with", sharing), ("alone", alone))}  # fmt: skip
    ratios = {count: totals["with"][count] / totals["alone"][count] for count in alone.together}
    return {
        "comfy_shells_memory_mb": result(
            shell - empty, "MB", "<= 100", local_models_mb=own - empty, comfyui_without_models_mb=empty,
            with_shells_mb=shell, with_local_models_mb=own, instances=most,
        ),
        f"comfy{most}_memory_ratio": result(
            ratios[most], "x",
            others={f"{count} instances": round(ratio, 3) for count, ratio in ratios.items() if count != most},
            with_daemon_mb={count: megabytes(parts) for count, parts in sharing.together.items()},
            alone_mb={count: megabytes(parts) for count, parts in alone.together.items()},
        ),
    }  # fmt: skip


def megabytes(parts: dict[str, int]) -> dict[str, int]:
    """Instances together, each other part, and all."""
    others = {name: nbytes >> 20 for name, nbytes in parts.items() if not name.startswith("instance")}
    instances = sum(nbytes for name, nbytes in parts.items() if name.startswith("instance"))
    return {"instances": instances >> 20, **others, "together": sum(parts.values()) >> 20}


# --- prompts per second, of real servers ---------------------------------------------------------------------------


def measure_throughput() -> dict[str, Any]:
    """Two instances encode distinct prompts at once, side after side in turn."""
    from comfy_servers import servers
    from common import client, median, result

    rates: dict[str, list[float]] = {"daemon": [], "local": [], "local, one thread each": []}
    with (
        comfy_daemon() as running,
        servers(2, running.port) as sharing,
        servers(2, running.port) as own,
        servers(2, running.port, threads=1) as single,
        client(running) as ask,
    ):
        for turn in range(ROUNDS + 1):
            for name, side in zip(rates, (sharing, own, single)):
                found = rate(side, turn, 1 if turn == 0 else PROMPTS, shared=name == "daemon")
                if turn:  # the first has loaded the models
                    rates[name].append(found)
        no_fallbacks(sharing)
        workers = len(ask.get_daemon_info()["workers"])
    base, local, narrow = (median(values) for values in rates.values())
    return {
        "comfy2_throughput_ratio": result(
            base / local, "x", ">= 1.5", rounds=ROUNDS, workers=workers, over_one_thread_each=base / narrow,
            prompts_per_s={name: round(median(values), 3) for name, values in rates.items()},
            each={name: [round(value, 3) for value in values] for name, values in rates.items()},
        )
    }  # fmt: skip


def rate(side: list[Any], turn: int, prompts: int, shared: bool) -> float:
    """Prompts per second of all together, by ComfyUI's own clocks of their begin and end."""
    from comfy_servers import encode_workflow

    posted = [
        server.post(encode_workflow([f"turn {turn} of {n}, prompt {k}" for k in range(prompts)], shared))
        for n, server in enumerate(side)
    ]
    begun, ended = zip(*[server.finished(prompt) for server, prompt in zip(side, posted)])
    return prompts * len(side) / (max(ended) - min(begun))


# --- time per call, in one process ---------------------------------------------------------------------------------


def measure_calls() -> dict[str, Any]:
    """Shells and ComfyUI's own objects in one process, in turn.

    First as users have it. Then ``alike``: with the same waiting and the same allocator on both sides, so that what is
    left is the daemon's doing; small models, with one thread, show it in milliseconds: the same code on the same way,
    with little compute in it.
    """
    found = {f"comfy_{name}_added": added(times, "%") for name, times in pairs(PAIRS).items()}
    for name, times in {**pairs(PAIRS, **ALIKE), **pairs(SMALL_PAIRS, OMP_NUM_THREADS="1", **ALIKE)}.items():
        found[f"comfy_{name}_added_alike"] = added(times, "%" if name in PAIRS else "ms")
    return found


def pairs(counts: dict[str, int], **variables: str) -> dict[str, Any]:
    """Seconds of each call, from a process of ComfyUI's interpreter beside a daemon in the same environment."""
    from comfy_servers import DEMO_VAE, SIDE
    from common import CLIP_G, CLIP_L, ROOT, RUNTIME, VAE

    options = {
        "comfyui": os.environ["COMFYUI_PATH"], "runtime-dir": RUNTIME, "clip-l": CLIP_L, "clip-g": CLIP_G, "vae": VAE,
        "small-vae": DEMO_VAE, "side": SIDE, "pairs": json.dumps(counts),
    }  # fmt: skip
    with environment(variables), comfy_daemon() as running:
        said = subprocess.run(
            [
                os.environ["COMFYUI_PYTHON"], str(ROOT / "benchmarks" / "comfy_peer.py"), f"--port={running.port}",
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    if said.returncode:
        raise SystemExit(f"the process that calls ended with exit code {said.returncode}; see above")
    answer = json.loads(said.stdout.splitlines()[-1])
    if answer["fallbacks"]:
        raise SystemExit(f"{answer['fallbacks']} calls were computed locally: the figures mean nothing")
    found: dict[str, Any] = answer["found"]
    return found


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables for the processes that are started in the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def added(times: dict[str, Any], unit: str) -> dict[str, Any]:
    """What the daemon adds: the median of the pairs' differences, in milliseconds or as a share of a local call."""
    from common import median, result

    differences = [(daemon - local) * 1e3 for daemon, local in zip(times["daemon"], times["local"])]
    more, local = median(differences), median(times["local"]) * 1e3
    share = more / local * 100
    row = result(
        share if unit == "%" else more, unit, "<= 2" if unit == "%" else "<= 5", equal=times["equal"],
        added_ms=more, added_percent=share, local_ms=local, daemon_ms=median(times["daemon"]) * 1e3,
        quickest_local_ms=min(times["local"]) * 1e3, quickest_daemon_ms=min(times["daemon"]) * 1e3,
        cpu_local_ms=times["cpu_s"]["local"] * 1e3, cpu_daemon_ms=times["cpu_s"]["daemon"] * 1e3,
        pairs=len(differences),
    )  # fmt: skip
    row["met"] = row["met"] and times["equal"]
    return row


PARTS = {"memory": measure_memory, "throughput": measure_throughput, "calls": measure_calls}


if __name__ == "__main__":
    main()
