"""Instances of two ComfyUIs, and of one with other flags, on one daemon: each gets the bits of its own.

``COMFYUI_PATH_2`` names another ComfyUI than ``COMFYUI_PATH``, best of another version; the same interpreter runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.shell_helpers import DEMO_VAE, ROOT
from tests.integration.conftest import daemons_below

FIRST, SECOND = os.environ.get("COMFYUI_PATH", ""), os.environ.get("COMFYUI_PATH_2", "")
PYTHON = os.environ.get("COMFYUI_PYTHON") or sys.executable
ENVIRON = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
pytest_plugins = ["tests.comfy.shell_fixtures"]
pytestmark = pytest.mark.timeout(400)
needs_two = pytest.mark.skipif(not SECOND, reason="COMFYUI_PATH_2 is not set: needs a second real ComfyUI")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Daemons that have no ComfyUI of their own unless told so, and compute with one thread."""
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    models = os.pathsep.join([str(DEMO_VAE.parent), str(ROOT / "build" / "models")])
    with daemons_below(tmp_path) as start_one:
        yield lambda **settings: start_one(model_dirs=models, cpu_threads=1, **settings)


class Instance:
    """A client process; ``found`` is what it printed."""

    def __init__(self, daemon: Any, clip_l: Path, root: str, *flags: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("LUNA_", "COMFYUI_"))}
        script = Path(__file__).with_name("roots_client.py")
        self.process = subprocess.Popen(
            [PYTHON, str(script), root, str(daemon.port), str(daemon.runtime_dir), str(DEMO_VAE), str(clip_l), *flags],
            env={**environ, **ENVIRON, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def found(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=300)
        lines = [line for line in out.splitlines() if line.startswith("FOUND ")]
        assert lines, f"{self.process.returncode}: {err[-3000:]}"
        found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
        assert all(found["equal"]) and found["fallbacks"] == 0, (found, err[-3000:])
        return found


def ran(info: dict[str, Any]) -> set[tuple[str, str]]:
    """Root and version of each worker."""
    return {(worker["comfyui"]["root"], worker["versions"]["comfyui"]) for worker in info["workers"]}


@needs_two
@pytest.mark.parametrize("own", [False, True], ids=["the daemon has none", "the daemon has the first"])
def test_two_roots_at_once(start, clip_l, own):
    """Each instance's results are its own local ones bit for bit; each ComfyUI has one worker, with its own key."""
    daemon = start(**({"comfyui_path": FIRST, "comfyui_python": PYTHON} if own else {}))
    instances = [Instance(daemon, clip_l, root) for root in (FIRST, SECOND)]
    first, second = (instance.found() for instance in instances)
    info = daemon.info()
    roots = {(os.path.realpath(FIRST), first["version"]), (os.path.realpath(SECOND), second["version"])}
    assert ran(info) == roots and len(info["workers"]) == 2
    assert len({worker["key"] for worker in info["workers"]}) == 2
    assert (info["fallbacks"], info["materialised"], info["crashes"]) == (0, 0, 0)
    assert all(len(worker["models"]) == 2 for worker in info["workers"])


def test_one_root_twice(start, clip_l):
    """Two instances of one installation share a worker and a copy; the second's prompts come out of the cache."""
    daemon = start()
    one = Instance(daemon, clip_l, FIRST).found()
    other = Instance(daemon, clip_l, f"{FIRST}/../{Path(FIRST).name}").found()
    info = daemon.info()
    assert one["bits"] == other["bits"] and len(info["workers"]) == 1
    assert len(info["models"]["loaded"]) == 2 and info["caches"]["conditioning"]["hits"] == 2


def test_a_client_without_comfyui_shares_it_too(start, clip_l):
    """A script that names a file computes with the daemon's own ComfyUI: the worker of the instances of that one."""
    import torch

    from luna_daemon.proxy import DaemonVAE

    daemon = start(comfyui_path=FIRST, comfyui_python=PYTHON)
    Instance(daemon, clip_l, FIRST).found()
    DaemonVAE(files=[DEMO_VAE], vae_type="sdxl", client=daemon.client()).decode(torch.zeros(1, 16, 8, 8))
    info = daemon.info()
    assert len(info["workers"]) == 1 and info["workers"][0]["requests"] >= 5


@pytest.mark.parametrize(("flag", "differs"), [("--bf16-vae", True), ("--use-split-cross-attention", None)])
def test_flags_make_another_worker(start, clip_l, flag, differs):
    """Two instances of one installation, one with a flag that decides bits: two workers, each with the right bits."""
    daemon = start()
    plain, flagged = (instance.found() for instance in [Instance(daemon, clip_l, FIRST, *f) for f in ((), (flag,))])
    info = daemon.info()
    assert sorted(tuple(worker["comfyui"]["flags"]) for worker in info["workers"]) == [(), (flag,)]
    assert differs is None or (plain["bits"] != flagged["bits"]) is differs
    assert info["caches"]["conditioning"]["hits"] == 0


def test_who_runs_other_versions_is_told_to_restart(start):
    """torch was updated under an instance: a new worker finds out, the next calls are answered without another."""
    from luna_daemon.core import ComfyRefused
    from luna_daemon.files.identity import file_id
    from luna_daemon.wire.messages import ComfyId, ModelRef

    daemon = start()
    client = daemon.client()
    for torch_version, expected in (("0.0.1", ComfyRefused), ("0.0.1", ComfyRefused), ("", None)):
        comfy = ComfyId(FIRST, PYTHON, torch=torch_version)
        ref = ModelRef("vae", files=(file_id(DEMO_VAE),), comfy=comfy)
        if expected is None:
            client.warm(ref)
        else:
            with pytest.raises(expected, match=r"torch 0\.0\.1, but .* Restart that ComfyUI"):
                client.warm(ref)
        assert [worker["number"] for worker in daemon.info()["workers"]] == [1]


def test_an_installation_that_was_updated(start, clip_l, tmp_path):
    """Its files change while a worker of it runs: an instance started afterwards gets a new worker, not the old one."""
    import shutil

    root = tmp_path / "ComfyUI"
    root.mkdir(mode=0o755)
    for folder in Path(FIRST).iterdir():
        if folder.name not in ("models", "custom_nodes", ".git", "comfyui_version.py", "comfy"):
            (root / folder.name).symlink_to(folder) if folder.is_file() else None
    shutil.copytree(Path(FIRST) / "comfy", root / "comfy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("app", "utils", "comfy_api", "comfy_execution"):
        if (Path(FIRST) / name).is_dir():
            shutil.copytree(Path(FIRST) / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    version = root / "comfyui_version.py"
    version.write_text('__version__ = "1.0"\n')
    daemon = start()
    assert Instance(daemon, clip_l, str(root)).found()["version"] == "1.0"
    version.write_text('__version__ = "1.0.1"\n')
    found = Instance(daemon, clip_l, str(root)).found()
    workers = {worker["versions"]["comfyui"]: worker["requests"] for worker in daemon.info()["workers"]}
    assert found["version"] == "1.0.1" and set(workers) == {"1.0", "1.0.1"}
    assert daemon.info()["caches"]["conditioning"]["hits"] == 0 and workers["1.0.1"] >= 4
