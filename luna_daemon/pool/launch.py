"""Which workers a piece of work fits, and what such a worker is started with."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from ..comfyui.flags import without_bits
from ..config import Settings
from ..core import ComfyRefused, ConfigError, ModelKind
from ..wire.messages import ComfyId, LoadSpec
from .devices import device_mask
from .process import WorkerProcess

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Those that we may use: fewer than the machine has in a container."""


def backend_of(settings: Settings) -> str:
    """The backend for those who run no ComfyUI of their own: ComfyUI's where the daemon has one."""
    if settings.backend != "auto":
        return settings.backend
    return "comfy" if settings.comfyui_path is not None else "diffusers"


def worker_key(spec: LoadSpec, settings: Settings) -> str:
    """Backend, device and with ComfyUI its folder, interpreter and flags: work goes only to workers of its own key.

    Versions are no part of it: a worker's are known once it runs, and ``fits`` compares them.
    """
    if spec.kind == ModelKind.ECHO:
        return f"echo@{spec.device}"
    if spec.comfy is not None:
        return f"comfy-{spec.comfy.key}@{spec.device}"
    return f"{backend_of(settings)}@{spec.device}"


def fits(spec: LoadSpec, versions: Mapping[str, str]) -> bool:
    """Whether a worker of the work's key with these versions is what the client runs; not known yet is yes."""
    wanted = spec.comfy
    if wanted is None or not versions:
        return True
    theirs = {"comfyui": wanted.version, "torch": wanted.torch}
    return all(not version or versions.get(name, version) == version for name, version in theirs.items())


def same_place(spec: LoadSpec) -> Hashable:
    """Equal for work that the same workers can take, and that has them load the same."""
    return spec.key, spec.comfy


def unlike(comfy: ComfyId, versions: Mapping[str, str]) -> ComfyRefused:
    """Why even a new worker is not what the client runs: its installation was updated under it."""
    return ComfyRefused(
        f"the instance runs ComfyUI {comfy.version} with torch {comfy.torch}, but {comfy.root} with {comfy.python} is "
        f"now ComfyUI {versions.get('comfyui', '?')} with torch {versions.get('torch', '?')}",
        "Restart that ComfyUI",
    )


def threads_of(key: str, device: str, settings: Settings) -> int:
    """CPU threads that such a worker keeps busy."""
    if key.startswith("echo@") or device.startswith(("cuda", "GPU-", "xpu", "mps")):
        return 1
    return settings.cpu_threads or CORES


def new_worker(
    number: int, key: str, spec: LoadSpec, settings: Settings, log: Path, clock: Callable[[], float] = time.monotonic
) -> tuple[WorkerProcess, str]:
    """A worker of this key, and the interpreter to start it with.

    Raises:
        ConfigError: the comfy backend is set, and nobody said where ComfyUI is; or there is no such device.
    """
    backend, comfy, device = key.partition("@")[0].partition("-")[0], spec.comfy, spec.device
    config = {
        "backend": backend, "threads": settings.cpu_threads, "options": {},
        "variables": {**device_mask(device, os.environ), **_comfyui_variable(settings)},
    }  # fmt: skip
    if backend == "comfy":
        config["options"] = _comfy_options(comfy, device, settings)
    worker = WorkerProcess(number, key, device, threads_of(key, device, settings), config, log, clock)
    worker.comfy = comfy
    # ComfyUI runs under its own interpreter: the daemon may live in another environment.
    return worker, comfy.python if comfy is not None else sys.executable


def _comfy_options(comfy: ComfyId | None, device: str, settings: Settings) -> dict[str, Any]:
    if comfy is None:
        raise ConfigError("the comfy backend needs ComfyUI's folder", "Set comfyui_path or COMFYUI_PATH")
    # What decides bits is the client's, memory policy and the rest the daemon's.
    return {"root": comfy.root, "device": device, "flags": [*without_bits(settings.comfyui_args), *comfy.flags]}


def _comfyui_variable(settings: Settings) -> dict[str, str]:
    """Where the diffusers backend finds ComfyUI's tokenizers."""
    root = settings.comfyui_path
    return {"COMFYUI_PATH": os.fspath(root)} if root is not None else {}
