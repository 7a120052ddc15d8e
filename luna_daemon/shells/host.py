"""The ComfyUI process in which shells live: its modules, its identity, its progress bar, its memory management."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ..comfyui.flags import rendered
from ..wire.messages import ComfyId, Progress

_NOT_CALLERS = ("luna_daemon.", "comfy.", "torch.")
"""Modules that ``calling_line`` skips, so that a warning names the node."""


def comfy(name: str) -> Any:
    """Import and return a module of ComfyUI: ``comfy("sd")`` is ``comfy.sd``."""
    return importlib.import_module(f"comfy.{name}")


def running_comfyui() -> ComfyId:
    """Describe the ComfyUI in this process, so that the daemon can compute with the same code and flags."""
    import torch

    cli = comfy("cli_args")
    try:
        version = str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):  # releases before ``comfyui_version`` existed
        version = ""
    root = Path(cli.__file__).resolve().parents[1]
    return ComfyId(str(root), sys.executable, version, str(torch.__version__), rendered(cli.args))


class ProgressBar:
    """ComfyUI's progress bar of one call, moved by the tiles that the daemon reports."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if progress.stage != "tile" or not progress.total:
            return
        if self._bar is None:
            self._bar = comfy("utils").ProgressBar(progress.total)
        self._bar.update_absolute(progress.step, progress.total)


def calling_line() -> str:
    """Return ``module:line`` of the innermost caller outside ComfyUI, torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(_NOT_CALLERS):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "ComfyUI itself"


def forget_loaded(patcher: Any) -> None:
    """Remove a model from ComfyUI's list of loaded models, whose entry keeps the device and size of the first load."""
    loaded = comfy("model_management").current_loaded_models
    for entry in list(loaded):
        if entry.model is not None and patcher.is_clone(entry.model):
            loaded.remove(entry)
            if entry.model_finalizer is not None:
                entry.model_finalizer.detach()


def placed(value: Any) -> Any:
    """Return a nested result with its tensors on ComfyUI's device for intermediate results."""
    if isinstance(value, dict):
        return {key: placed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(placed(item) for item in value)
    return value.to(comfy("model_management").intermediate_device()) if hasattr(value, "untyped_storage") else value
