"""Real ComfyUI servers of a benchmark: ``main.py`` in processes of their own, asked over HTTP as the browser does."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from common import BUILD, CLIP_G, CLIP_L, ROOT, RUNTIME, VAE, free_port, pss

__all__ = ["DEMO_VAE", "MODEL_FOLDER", "Server", "encode_workflow", "image_workflow", "make_model_folder", "servers"]

DEMO_VAE = ROOT / "demo" / "model" / "luna_demo_vae.safetensors"
PLACE = BUILD / "comfy"
MODEL_FOLDER = PLACE / "models"
START_S, ANSWER_S = 300.0, 600.0
SIDE = 256
"""Pixels of the picture that is decoded: a VAE's compute on a CPU is not what is measured here."""

Workflow = dict[str, Any]


@dataclass
class Server:
    """One ComfyUI, with folders of its own and this checkout as its only custom node."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"ComfyUI refused {path}: {error.read().decode()}") from error

    def wait_until_it_answers(self) -> None:
        end = time.monotonic() + START_S
        while True:
            self._check(end)
            with suppress(OSError):
                self.ask("/queue")
                return
            time.sleep(0.1)

    def post(self, workflow: Workflow) -> str:
        return str(self.ask("/prompt", {"prompt": workflow})["prompt_id"])

    def finished(self, prompt: str) -> tuple[float, float]:
        """When a posted workflow was begun and finished, in seconds since 1970."""
        end = time.monotonic() + ANSWER_S
        while prompt not in (history := self.ask(f"/history/{prompt}")):
            self._check(end)
            time.sleep(0.05)
        status = history[prompt]["status"]
        if status["status_str"] != "success":
            raise SystemExit(f"ComfyUI could not run a workflow: {status['messages']}\n{self._said()}")
        times = {name: facts["timestamp"] / 1000 for name, facts in status["messages"]}
        return times["execution_start"], times["execution_success"]

    def make(self, workflow: Workflow) -> None:
        self.finished(self.post(workflow))

    def uss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_full_info().uss)

    def pss(self) -> int:
        return pss(self.process.pid)

    def fell_back(self) -> bool:
        """Whether a local model has computed, or was loaded, in place of the daemon's."""
        text = self.log.read_text(errors="replace")
        return "steps in" in text or "loaded here" in text

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _check(self, end: float) -> None:
        if self.process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"a ComfyUI server ended or does not answer:\n{self._said()}")

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


@contextmanager
def servers(count: int, daemon_port: int, threads: int = 0) -> Iterator[list[Server]]:
    """Servers that answer, all started at once; they end with the block.

    Args:
        count: how many.
        daemon_port: where their Luna nodes look for the daemon; 0 if there is none.
        threads: torch's threads in each; 0 is its own choice.
    """
    running: list[Server] = []
    try:
        running += (_start(daemon_port, threads) for _ in range(count))
        for server in running:
            server.wait_until_it_answers()
        yield running
    finally:
        for server in running:
            server.end()


def _start(daemon_port: int, threads: int) -> Server:
    port = free_port()
    folder = PLACE / f"server-{port}"
    for name in ("custom_nodes", "output", "page", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _link(folder / "models", MODEL_FOLDER)
    _link(folder / "custom_nodes" / "luna-daemon", ROOT)
    environ = {**os.environ, "LUNA_PORT": str(daemon_port or free_port()), "LUNA_RUNTIME_DIR": str(RUNTIME)}
    if threads:
        environ["OMP_NUM_THREADS"] = str(threads)
    log = folder / "server.log"
    arguments = [
        "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(folder), "--output-directory",
        str(folder / "output"), "--front-end-root", str(folder / "page"), "--disable-all-custom-nodes",
        "--whitelist-custom-nodes", "luna-daemon", "--disable-api-nodes", "--database-url",
        f"sqlite:///{(folder / 'comfyui.db').as_posix()}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [os.environ["COMFYUI_PYTHON"], str(Path(os.environ["COMFYUI_PATH"]) / "main.py"), *arguments],
            cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    return Server(process, port, log)


def make_model_folder() -> None:
    """A model folder as ComfyUI has it: SDXL's text encoders and VAE, and the demo's small VAE."""
    for kind, files in {"text_encoders": (CLIP_L, CLIP_G), "vae": (VAE, DEMO_VAE)}.items():
        (MODEL_FOLDER / kind).mkdir(parents=True, exist_ok=True)
        for file in files:
            _link(MODEL_FOLDER / kind / file.name, file)


def _link(place: Path, target: Path) -> None:
    """A symbolic link; a folder's needs no more rights on Windows than a file's."""
    if not place.is_symlink():
        place.symlink_to(target, target_is_directory=target.is_dir())


def encode_workflow(texts: list[str], shared: bool) -> Workflow:
    """Encode each text with SDXL's two text encoders: the daemon's, or ComfyUI's own.

    In the format of ``/prompt``, as ``image_workflow``.
    """
    names = {"clip_name1": CLIP_L.name, "clip_name2": CLIP_G.name, "type": "sdxl"}
    more = {"clip_name3": "none", "clip_name4": "none"} if shared else {}
    found: Workflow = {
        "clip": {"class_type": "LunaLoadCLIP" if shared else "DualCLIPLoader", "inputs": {**names, **more}}
    }
    for number, text in enumerate(texts):
        found[f"text{number}"] = {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["clip", 0]}}
        found[f"see{number}"] = {"class_type": "PreviewAny", "inputs": {"source": [f"text{number}", 0]}}
    return found


def image_workflow(text: str, shared: bool) -> Workflow:
    """One prompt and one picture: what each instance does before its memory is measured."""
    size = {"width": SIDE, "height": SIDE, "batch_size": 1}
    return {
        **encode_workflow([text], shared),
        "vae": {"class_type": "LunaLoadVAE" if shared else "VAELoader", "inputs": {"vae_name": VAE.name}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": size},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": ["vae", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "bench"}},
    }
