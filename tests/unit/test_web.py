"""The page's modules without a browser: they are sound, harmless to import, and format and keep what they are given."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parents[2] / "web"
MODULES = sorted(path for path in WEB.rglob("*") if path.suffix in (".js", ".mjs"))
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node: only the browser tests run the modules")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules in a folder that says they are modules, which browsers know and older node does not."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(WEB, folder, dirs_exist_ok=True)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


def run(folder: Path, script: str) -> object:
    """What a script prints as JSON."""
    (folder / "script.mjs").write_text(script)
    done = subprocess.run([NODE, "script.mjs"], cwd=folder, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(WEB).as_posix())
def test_every_module_is_sound(copy, path):
    done = subprocess.run([NODE, "--check", copy / path.relative_to(WEB)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@needs_node
def test_importing_does_nothing(copy):
    """ComfyUI imports every ``.js`` below this folder. Here is no document: a module that touches it would fail."""
    names = [path.relative_to(WEB).as_posix() for path in MODULES if path.suffix == ".js" and path.name != "panel.js"]
    assert "luna/app.js" in names and "page.mjs" not in names
    imports = "\n".join(f'await import("./{name}");' for name in names)
    assert run(copy, f"{imports}\nconsole.log(JSON.stringify(Object.keys(globalThis).includes('document')))") is False


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(WEB).as_posix())
def test_text_is_never_markup_and_every_module_is_small(path):
    """Names of LoRAs come from anywhere. And each module has a line that says what it is for."""
    source = path.read_text("utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source)
    assert source.startswith("// ")
    assert len(source.splitlines()) <= 150
    assert not re.search(r"https?://(?!www\.w3\.org/)", source), "everything is served from here"


@needs_node
def test_figures_as_people_read_them(copy):
    script = """
    import * as f from "./luna/format.js";
    console.log(JSON.stringify([
      [0, 999, 1000, 1536, 123 * 2 ** 20, 24 * 2 ** 30, undefined].map(f.bytes),
      [0, 0.04, 0.42, 9.96, 350, 1234, 59_000, 61_000, undefined].map(f.duration),
      [0.4, 61, 3700, 90061].map(f.span),
      [0, 0.25, 1, 9.96, 28.4, 12345].map(f.rate),
      [0, 999, 1234567].map(f.count),
      [f.share(3, 1), f.share(0, 0)],
      ["styles/ink.safetensors", "C:\\\\l\\\\a.b.pt", "plain"].map(f.leaf),
      ["vae:sdxl_vae:4856", "clip:a:b:01", "odd"].map(f.modelName),
    ]));"""
    assert run(copy, script) == [
        ["0 B", "999 B", "1.0 kB", "1.5 kB", "123 MB", "24.0 GB", "–"],
        ["0 ms", "40 µs", "0.4 ms", "10 ms", "350 ms", "1.2 s", "59 s", "1 min 1 s", "–"],
        ["0 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"],
        ["0", "0.25", "1", "10", "28", "12\u202f345"],
        ["0", "999", "1\u202f234\u202f567"],
        ["75 %", "–"],
        ["ink", "a.b", "plain"],
        [{"kind": "VAE", "name": "sdxl_vae"}, {"kind": "text encoder", "name": "a:b"}, {"kind": "", "name": "odd"}],
    ]


@needs_node
def test_what_the_panel_remembers(copy):
    """Two minutes; the median of what was answered between two statuses; each event once; an absence as a gap."""
    script = """
    import { createStore, latencies, workDone } from "./luna/store.js";
    let now = 1_000_000;
    const store = createStore(() => now);
    const send = (type, data) => store.receive({ v: 1, type, data });
    const told = [];
    store.subscribe((state) => told.push(state.link));
    const started = { event: "worker_started", worker: 1, at: 990 };
    send("request", { requests: [5, 1, 3].map((ms) => ({ op: "vae.decode", seconds: ms / 1000, result: "ok" })) });
    send("request", { requests: [{ op: "vae.decode", seconds: 9, result: "busy" }] });
    send("status", { throughput_per_s: 3, scaling: [started] });
    send("scaling", started);
    send("error", { code: "worker_crashed", message: "worker 1 died", worker: 1 });
    send("unheard of", {});
    now += 1000;
    store.lose();
    send("away", { message: "no Luna Daemon answers" });
    const away = store.state.why;
    now += 1000;
    send("status", { requests: { "vae.decode": 4, ping: 9, "lora.get": 1 } });
    const past = store.state.past.map((moment) => [moment.throughput, moment.latency["vae.decode"] ?? null]);
    now += 119_500;
    send("status", {});
    console.log(JSON.stringify({
      told, away, past, kept: store.state.past.length, events: store.state.events.map((event) => event.text),
      work: workDone({ requests: { "vae.decode": 4, ping: 9, "lora.get": 1 } }),
      latencies: latencies({ latency: { ping: { count: 9 }, "vae.encode": { count: 1 }, "vae.decode": { count: 2 } } }),
    }));"""
    assert run(copy, script) == {
        "told": ["connecting", "live", "live", "live", "away", "away", "live", "live"],
        "away": "no Luna Daemon answers", "past": [[3, 3], [None, None], [None, None]], "kept": 3,
        "events": ["worker 1 died", "Worker 1 starts"], "work": 5,
        "latencies": [["vae.decode", {"count": 2}], ["vae.encode", {"count": 1}]],
    }  # fmt: skip
