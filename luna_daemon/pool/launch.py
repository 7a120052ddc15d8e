"""Which workers can compute a piece of work, and the configuration to start such a worker with."""

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
from .process import WorkerKey, WorkerProcess

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""CPU cores that this process may use: in a container, fewer than the machine has."""


def backend_of(settings: Settings) -> str:
    """Return the backend for clients outside ComfyUI: ``auto`` is ``comfy`` if the daemon has a ComfyUI folder."""
    if settings.backend != "auto":
        return settings.backend
    return "comfy" if settings.comfyui_path is not None else "diffusers"


def worker_key(spec: LoadSpec, settings: Settings) -> WorkerKey:
    """Return the key of the workers that can take work with this model.

    The key does not hold versions, which are known only once a worker runs; ``fits`` compares those.
    """
    if spec.kind == ModelKind.ECHO:
        return WorkerKey("echo", spec.device)
    if spec.comfy is not None:
        return WorkerKey("comfy", spec.device, spec.comfy.key)
    return WorkerKey(backend_of(settings), spec.device)


def fits(spec: LoadSpec, versions: Mapping[str, str]) -> bool:
    """Return whether a worker with ``versions`` has those that the client needs; true if ``versions`` is empty."""
    wanted = spec.comfy
    if wanted is None or not versions:
        return True
    needed = {"comfyui": wanted.version, "torch": wanted.torch}
    return all(not version or versions.get(name, version) == version for name, version in needed.items())


def same_place(spec: LoadSpec) -> Hashable:
    """Return a value that is equal for work that the same workers can take with the same model."""
    return spec.key, spec.comfy


def unlike(comfy: ComfyId, versions: Mapping[str, str]) -> ComfyRefused:
    """Return the error for a client whose ComfyUI was updated while it ran: new workers have other versions."""
    return ComfyRefused(
        f"the instance runs ComfyUI {comfy.version} with torch {comfy.torch}, but {comfy.root} with {comfy.python} is "
        f"now ComfyUI {versions.get('comfyui', '?')} with torch {versions.get('torch', '?')}",
        "Restart that ComfyUI",
    )


def threads_of(key: WorkerKey, device: str, settings: Settings) -> int:
    """Return how many CPU threads a worker uses."""
    if key.backend == "echo" or device.startswith(("cuda", "GPU-", "xpu", "mps")):
        return 1
    return settings.cpu_threads or CORES


def new_worker(
    number: int,
    key: WorkerKey,
    spec: LoadSpec,
    settings: Settings,
    log: Path,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[WorkerProcess, str]:
    """Return a worker of this key, and the interpreter to start it with.

    Raises:
        ConfigError: the comfy backend is set without ComfyUI's folder, or the device does not exist.
    """
    comfy, device = spec.comfy, spec.device
    config = {
        "backend": key.backend, "threads": settings.cpu_threads, "options": {},
        "variables": {**device_mask(device, os.environ), **_comfyui_variable(settings)},
    }  # fmt: skip
    if key.backend == "comfy":
        config["options"] = _comfy_options(comfy, device, settings)
    worker = WorkerProcess(number, key, device, threads_of(key, device, settings), config, log, clock)
    worker.comfy = comfy
    # ComfyUI runs under its own interpreter: the daemon may live in another environment.
    return worker, comfy.python if comfy is not None else sys.executable


def _comfy_options(comfy: ComfyId | None, device: str, settings: Settings) -> dict[str, Any]:
    if comfy is None:
        raise ConfigError("the comfy backend needs ComfyUI's folder", "Set comfyui_path or COMFYUI_PATH")
    # Flags that decide bits come from the client, all others from the daemon's settings.
    return {"root": comfy.root, "device": device, "flags": [*without_bits(settings.comfyui_args), *comfy.flags]}


def _comfyui_variable(settings: Settings) -> dict[str, str]:
    """Return the variable by which the diffusers backend finds ComfyUI's tokenizers."""
    root = settings.comfyui_path
    return {"COMFYUI_PATH": os.fspath(root)} if root is not None else {}
