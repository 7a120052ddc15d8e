"""Two real ComfyUI servers and one daemon: the same workflow over HTTP on both, the picture of the stock loaders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.comfy.test_nodes import asked, make_lora, make_tiny_sd3, more
from tests.integration.conftest import DEMO_VAE, ROOT, daemons_below, free_port
from tests.waiting import wait_until

pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = pytest.mark.timeout(300)

VAE, CLIP, UNET, LORA = "demo_vae.safetensors", "clip_l.safetensors", "tiny_sd3.safetensors", "style.safetensors"
PROMPTS = ("a lighthouse, (storm:1.3), oil painting", "two foxes in the snow")
NEGATIVE = "blurry"
SAMPLING = {"seed": 5, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
WIDTH, HEIGHT = 256, 192


@dataclass
class Server:
    """A ComfyUI server: ``main.py`` in a process of its own, with folders of its own."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    log: Path

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from error

    def wait_until_it_answers(self, timeout_s: float = 120.0) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, f"main.py ended: {self.said()}"
            with contextlib.suppress(OSError):
                return self.ask("/queue") is not None
            return False

        wait_until(answers, timeout_s, self.said)

    def post(self, workflow: dict[str, Any]) -> str:
        return str(self.ask("/prompt", {"prompt": workflow})["prompt_id"])

    def history(self, prompt: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """What ComfyUI keeps of a prompt that was posted, as soon as it is finished."""

        def look() -> Any:
            assert self.process.poll() is None, self.said()
            return self.ask(f"/history/{prompt}").get(prompt)

        return wait_until(look, timeout_s, self.said)

    def picture(self, prompt: str) -> Picture:
        """The picture of a prompt that was posted, as soon as it is finished."""
        entry = self.history(prompt)
        assert entry["status"]["status_str"] == "success", (entry["status"], self.said())
        times = {name: facts["timestamp"] for name, facts in entry["status"]["messages"]}
        (image,) = entry["outputs"]["save"]["images"]
        seconds = (times["execution_success"] - times["execution_start"]) / 1000
        return Picture(*_pixels(self.folder / "output" / image["filename"]), seconds)

    def make(self, workflow: dict[str, Any]) -> Picture:
        return self.picture(self.post(workflow))

    def uss_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_full_info().uss / 2**20)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


@dataclass
class Picture:
    """A PNG's pixels, and how long ComfyUI was at it."""

    size: tuple[int, int]
    pixels: bytes
    seconds: float


def _pixels(path: Path) -> tuple[tuple[int, int], bytes]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


@pytest.fixture(scope="module")
def models(comfy: SimpleNamespace, clip_l: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as ComfyUI has it, with small seeded models."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("vae", "text_encoders", "diffusion_models", "loras"):
        (folder / kind).mkdir()
    shutil.copy(DEMO_VAE, folder / "vae" / VAE)
    (folder / "text_encoders" / CLIP).symlink_to(clip_l)
    make_tiny_sd3(comfy, folder / "diffusion_models" / UNET)
    make_lora(comfy, folder / "loras" / LORA)
    return folder


@pytest.fixture(scope="module")
def daemon(models: Path, clip_l: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A daemon whose workers run this ComfyUI with one thread; each prompt is computed, none remembered."""
    with daemons_below(tmp_path_factory.mktemp("daemon")) as start:
        yield start(
            backend="comfy", comfyui_path=os.environ["COMFYUI_PATH"], comfyui_python=_python(),
            model_dirs=os.pathsep.join([str(models), str(clip_l.parent)]), cpu_threads=1, max_vae_workers=1,
            max_clip_workers=1, conditioning_cache_mb=0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def servers(daemon: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two of them, whose only custom nodes are this pack; each is ended by its process' id."""
    with contextlib.ExitStack() as ends:
        running = [start_server(tmp_path_factory.mktemp(f"comfyui-{n}"), daemon, models, ends) for n in range(2)]
        for server in running:
            server.wait_until_it_answers()
        yield running


def _python() -> str:
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def start_server(
    folder: Path,
    daemon: Any,
    models: Path,
    ends: contextlib.ExitStack,
    packs: Sequence[str] = (),
    frontend: bool = False,
) -> Server:
    """A ComfyUI with a base directory of its own; ``packs`` lie in its ``custom_nodes`` already, or are loaded not.

    Args:
        frontend: ComfyUI's own; else an empty page.
    """
    for name in ("custom_nodes", "output", "page"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "models").symlink_to(models)
    (folder / "custom_nodes" / "luna-daemon").symlink_to(ROOT)
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("LUNA_", "COMFYUI_", "PYTEST_"))}
    environ |= {"LUNA_PORT": str(daemon.port), "LUNA_RUNTIME_DIR": str(daemon.runtime_dir), "OMP_NUM_THREADS": "1"}
    port, log = free_port(), folder / "server.log"
    arguments = [
        "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(folder), "--output-directory",
        str(folder / "output"), "--disable-all-custom-nodes", "--whitelist-custom-nodes", "luna-daemon", *packs,
        "--disable-api-nodes", "--database-url", f"sqlite:///{folder / 'comfyui.db'}",
        *(() if frontend else ("--front-end-root", str(folder / "page"))),
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [_python(), str(Path(os.environ["COMFYUI_PATH"]) / "main.py"), *arguments],
            cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    ends.callback(_end, process)
    return Server(process, port, folder, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def luna_workflow(prompt: str) -> dict[str, Any]:
    """Router, gateway with a LoRA tag, sampler, decode, save: in the format of ``/prompt``."""
    router = {
        "model_source": "diffusion_models", "model_name": UNET, "model_type": "SD3", "dynamic_precision": "None",
        "clip_1": CLIP, "clip_2": "None", "clip_3": "None", "clip_4": "None", "vae_name": VAE, "daemon_mode": "auto",
    }  # fmt: skip
    gateway = {
        "model": ["router", 0], "clip": ["router", 1], "vae": ["router", 2], "model_name": ["router", 5],
        "width": WIDTH, "height": HEIGHT, "batch_size": 1, "clip_skip": 0, "clip_skip_timing": "after_lora",
        "sampler": SAMPLING["sampler_name"],
        "positive_prompt": f"{prompt} <lora:style:0.8>", "negative_prompt": NEGATIVE,
        **{name: SAMPLING[name] for name in ("seed", "steps", "cfg", "scheduler", "denoise")},
    }  # fmt: skip
    sampler = {"model": ["gateway", 1], "positive": ["gateway", 4], "negative": ["gateway", 5]}
    settings = {"seed": 7, "steps": 8, "cfg": 9, "sampler_name": 10, "scheduler": 11, "denoise": 12}
    sampler |= {"latent_image": ["gateway", 6], **{name: ["gateway", slot] for name, slot in settings.items()}}
    return {
        "router": {"class_type": "LunaModelRouter", "inputs": router},
        "gateway": {"class_type": "LunaConfigGateway", "inputs": gateway},
        "sample": {"class_type": "KSampler", "inputs": sampler},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["gateway", 3]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "luna"}},
    }


def stock_workflow(prompt: str, strength: float = 0.8) -> dict[str, Any]:
    """The same of stock nodes, every model loaded by that ComfyUI."""
    lora = {"model": ["unet", 0], "clip": ["clip", 0], "lora_name": LORA}
    latent = {"width": WIDTH, "height": HEIGHT, "batch_size": 1}
    sampler = {"model": ["lora", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    encode = "CLIPTextEncode"
    return {
        "unet": {"class_type": "UNETLoader", "inputs": {"unet_name": UNET, "weight_dtype": "default"}},
        "clip": {"class_type": "CLIPLoader", "inputs": {"clip_name": CLIP, "type": "sd3"}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": VAE}},
        "lora": {"class_type": "LoraLoader", "inputs": {**lora, **dict.fromkeys(STRENGTHS, strength)}},
        "positive": {"class_type": encode, "inputs": {"text": prompt, "clip": ["lora", 1]}},
        "negative": {"class_type": encode, "inputs": {"text": NEGATIVE, "clip": ["lora", 1]}},
        "latent": {"class_type": "EmptySD3LatentImage", "inputs": latent},
        "sample": {"class_type": "KSampler", "inputs": {**sampler, "latent_image": ["latent", 0], **SAMPLING}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "stock"}},
    }


STRENGTHS = ("strength_model", "strength_clip")


def test_two_servers_make_the_stock_picture_on_one_daemon(daemon, servers, capsys):
    """Both finish at once with the stock loaders' pixels; the daemon computed all, and no weights were loaded twice."""
    empty = [server.uss_mb() for server in servers]
    started = [len(server.log.read_text()) for server in servers]
    before, info = asked(daemon), daemon.info()
    made = []
    for prompt in PROMPTS:
        posted = [server.post(luna_workflow(prompt)) for server in servers]
        made.append([server.picture(number) for server, number in zip(servers, posted)])
    assert more(daemon, before) == {"clip.encode": 2 * 2 * 2, "vae.decode": 2 * 2}
    after = daemon.info()
    assert all(after[name] - info[name] == 0 for name in ("fallbacks", "materialised"))
    loaded = sorted(name.split(":")[0] for worker in after["workers"] for name in worker["models"])
    assert loaded == ["clip", "vae"], "one copy of each, for both servers"
    for server, start in zip(servers, started):
        log = server.log.read_text()[start:]
        assert not any(words in log for words in ("steps in", "are loaded here", "Traceback")), log
    served = [server.uss_mb() for server in servers]

    before = asked(daemon)
    stock = [servers[0].make(stock_workflow(prompt)) for prompt in PROMPTS]
    plain = servers[0].make(stock_workflow(PROMPTS[0], strength=0.0))
    assert not more(daemon, before)
    for mine, theirs in zip(made, stock):
        assert theirs.size == (WIDTH, HEIGHT) and len(set(theirs.pixels)) > 50
        assert [one.pixels == theirs.pixels for one in mine] == [True, True]
    assert len({stock[0].pixels, stock[1].pixels, plain.pixels}) == 3, "prompt and LoRA must show in the picture"
    with capsys.disabled():
        print(_figures(empty, served, servers[0].uss_mb(), made, stock))


def _figures(empty, served, local, made, stock) -> str:
    """Side figures of small models on a CPU: of use for comparing with one another only."""
    firsts, seconds = ([f"{one.seconds:.2f}" for one in pictures] for pictures in made)
    return (
        f"\n  servers with Luna nodes: USS {_mb(empty)} MB at start, {_mb(served)} MB after two prompts; the first "
        f"with the stock loaders' models as well: {local:.0f} MB\n  seconds of a prompt: first {', '.join(firsts)}, "
        f"second {', '.join(seconds)} (both servers at once); stock {', '.join(f'{one.seconds:.2f}' for one in stock)}"
    )


def _mb(values) -> str:
    return " and ".join(f"{value:.0f}" for value in values)
