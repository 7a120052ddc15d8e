"""The main job on real input: three clients at once, first each with its own models, then sharing one daemon.

Writes to ``build/demo``: each photograph before and after, a chart of the memory and a table of the latencies, with
and without the daemon.
Ends by itself; nothing is downloaded and nothing is left running.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_text_encoder import make_clip_l
from rich.console import Console
from rich.table import Table
from surroundings import BUILD, free_port, leave_the_users_settings, pss, stage

from luna_daemon.daemon_server import LunaDaemon

HERE = Path(__file__).resolve().parent
OUT = BUILD / "demo"
VAE = HERE / "model" / "luna_demo_vae.safetensors"
CLIP = BUILD / "models" / "clip_l.safetensors"
PHOTOS = ("coffee", "china", "roofs")


def main() -> None:
    console = Console()
    leave_the_users_settings()
    OUT.mkdir(parents=True, exist_ok=True)
    with stage(console, "making a text encoder of the real size, once (random weights: nothing is downloaded)"):
        CLIP.parent.mkdir(parents=True, exist_ok=True)
        make_clip_l(CLIP)

    with stage(console, "three processes, each with its own models"):
        alone, alone_bytes = without_daemon()
    console.print(f"without the daemon: {gigabytes(alone_bytes)} in three processes")

    with stage(console, "the same three, sharing one daemon"):
        shared, shared_bytes, info = with_daemon()
    console.print(f"with the daemon:    {gigabytes(shared_bytes)} in three clients, the daemon and its worker")

    chart(alone_bytes, shared_bytes, OUT / "memory.png")
    table = latencies(alone, shared, info)
    console.print(table)
    write_text(table, OUT / "latencies.txt")
    for result in shared:
        console.print(f"{result['photo']}: {result['psnr']:.1f} dB after encode and decode")
    console.print(f"pictures, chart and table are in {OUT.relative_to(HERE.parent)}/")


# --- with and without the daemon ------------------------------------------------------------------------------------


def without_daemon() -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Results of three clients that load their own models, and the memory they hold."""
    with clients(["--vae", str(VAE), "--clip", str(CLIP)]) as processes:
        results = [result_of(process) for process in processes]
        return results, {f"process {number}": pss(process.pid) for number, process in enumerate(processes, 1)}


def with_daemon() -> tuple[list[dict[str, Any]], dict[str, int], dict[str, Any]]:
    """Results of three clients of one daemon, the memory of all, and what the daemon says of itself."""
    port, ws_port = free_port(), free_port()
    runtime = BUILD / "run"
    models = {"demo": {"vae": [str(VAE)], "clip": [str(CLIP)], "type": "sd15"}}
    settings = {"backend": "diffusers", "runtime_dir": runtime, "models": models}
    with (
        LunaDaemon(port=port, ws_port=ws_port, environ=dict(os.environ), **settings) as daemon,
        clients(["--port", str(port), "--runtime-dir", str(runtime)]) as processes,
    ):
        results = [result_of(process) for process in processes]
        memory = {f"client {number}": pss(process.pid) for number, process in enumerate(processes, 1)}
        info = daemon_info(port, runtime)
        memory["daemon"] = pss(daemon.pid)
        for worker in info["workers"]:
            memory["worker"] = memory.get("worker", 0) + pss(worker["pid"])
        return results, memory, info


@contextmanager
def clients(options: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Three client processes at once; they end when the block does."""
    environ = {**os.environ, "PYTHONPATH": str(HERE.parent), "TQDM_DISABLE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "client.py"), photo, "--out", str(OUT), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ,
        )
        for photo in PHOTOS
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait(60)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a client ended with exit code {process.wait()}; its error is above")
    result: dict[str, Any] = json.loads(line)
    return result


def daemon_info(port: int, runtime: Path) -> dict[str, Any]:
    from luna_daemon.client import DaemonClient

    with DaemonClient("127.0.0.1", port, runtime_dir=runtime, name="demo") as client:
        return client.get_daemon_info()


# --- what is shown ------------------------------------------------------------------------------------------------


def gigabytes(parts: dict[str, int]) -> str:
    return f"{sum(parts.values()) / 2**30:.2f} GB"


def latencies(alone: list[dict[str, Any]], shared: list[dict[str, Any]], info: dict[str, Any]) -> Table:
    """Median and first call of every kind, both ways; cache hits and workers below."""
    table = Table(title="Three clients at once: median milliseconds per call (first call)", min_width=74)
    table.add_column("call")
    table.add_column("own models", justify="right")
    table.add_column("shared daemon", justify="right")
    for what in ("encode", "decode", "prompt"):
        table.add_row(what, cell(alone, what), cell(shared, what))
    cache = info["caches"]["conditioning"]
    table.caption = (
        f"{len(info['workers'])} worker, {info['requests'].get('clip.encode', 0)} prompts: "
        f"{cache['hits']} from the cache, {info['coalesced']} computed together with another client's; "
        f"{info['fallbacks']} fallbacks"
    )
    return table


def cell(results: list[dict[str, Any]], what: str) -> str:
    calls = [seconds for result in results for seconds in result["times"][what]]
    first = statistics.median(result["times"][what][0] for result in results)
    return f"{statistics.median(calls) * 1e3:.0f} ({first * 1e3:.0f})"


def write_text(table: Table, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)


def chart(
    alone: dict[str, int], shared: dict[str, int], path: Path, title: str = "Three clients: a VAE and CLIP-L"
) -> None:
    """Two stacked bars: memory without and with the daemon."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    tallest = max(sum(alone.values()), sum(shared.values())) / 2**30
    for place, parts in enumerate((alone, shared)):
        bottom = 0.0
        for name, nbytes in parts.items():
            size = nbytes / 2**30
            bar = axes.bar(place, size, bottom=bottom, width=0.6, color=COLOURS[name.split()[0]], edgecolor="white")
            if size > 0.035 * tallest:  # a smaller part has no room for its name
                axes.bar_label(bar, [f"{name}  {size:.2f}"], label_type="center", fontsize=8, color="white")
            bottom += size
        axes.text(place, bottom, f"{bottom:.2f} GB\n", ha="center", va="center", fontweight="bold")
    axes.set_xticks([0, 1], ["each with its own models", "one Luna Daemon"])
    axes.set_ylabel("GB of memory (PSS)")
    axes.set_title(title)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


COLOURS = {"process": "#8a8fa3", "client": "#6d83b8", "clients": "#6d83b8", "daemon": "#3f9e8f", "worker": "#2f6f8f"}


if __name__ == "__main__":
    main()
