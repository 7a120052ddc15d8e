"""What runs the models inside a worker: one small interface, one module per implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core import ConfigError
from .base import Backend

__all__ = ["BACKENDS", "make_backend"]


def _echo(options: Mapping[str, Any]) -> Backend:
    from .echo import EchoBackend

    return EchoBackend()


def _diffusers(options: Mapping[str, Any]) -> Backend:
    from .diffusers.backend import DiffusersBackend

    return DiffusersBackend()


def _comfy(options: Mapping[str, Any]) -> Backend:
    from .comfy.backend import ComfyBackend

    return ComfyBackend(Path(options["root"]), options["device"], options["flags"])


BACKENDS: dict[str, Callable[[Mapping[str, Any]], Backend]] = {
    "echo": _echo, "diffusers": _diffusers, "comfy": _comfy,
}  # fmt: skip
"""Names to makers, which import what their backend needs."""


def make_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """Make a backend.

    Args:
        options: what the backend of this name needs: ``root``, ``device`` and ``flags`` for ``comfy``.

    Raises:
        ConfigError: no backend has this name, or ``options`` do not lead to ComfyUI.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} does not exist", f"Use one of {', '.join(BACKENDS)}")
    return BACKENDS[name](options or {})
