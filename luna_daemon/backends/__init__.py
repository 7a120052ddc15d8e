"""Backends, which run the models inside a worker: one interface (``base``), one module or package for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import ConfigError
from .base import Backend

__all__ = ["make_backend"]


def make_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """Make a backend, importing only what this backend needs.

    Args:
        name: ``echo``, ``diffusers`` or ``comfy``.
        options: arguments of the backend: ``root``, ``device`` and ``flags`` for ``comfy``.

    Raises:
        ConfigError: there is no backend of this name, or ``root`` is not ComfyUI's folder.
    """
    if name == "echo":
        from .echo import EchoBackend

        return EchoBackend()
    if name == "diffusers":
        from .diffusers.backend import DiffusersBackend

        return DiffusersBackend()
    if name == "comfy":
        from .comfy.backend import ComfyBackend

        options = options or {}
        return ComfyBackend(Path(options["root"]), options["device"], options["flags"])
    raise ConfigError(f"backend {name!r} does not exist", "Use one of echo, diffusers, comfy")
