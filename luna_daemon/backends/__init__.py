"""What runs the models inside a worker: one small interface, one module per implementation."""

from __future__ import annotations

from collections.abc import Callable

from ..core import ConfigError
from .base import Backend

__all__ = ["BACKENDS", "make_backend"]


def _echo() -> Backend:
    from .echo import EchoBackend

    return EchoBackend()


def _diffusers() -> Backend:
    from .diffusers import DiffusersBackend

    return DiffusersBackend()


BACKENDS: dict[str, Callable[[], Backend]] = {"echo": _echo, "diffusers": _diffusers}
"""Names to makers; the heavy import happens inside the maker."""


def make_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: names those there are.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} does not exist", f"Use one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()
