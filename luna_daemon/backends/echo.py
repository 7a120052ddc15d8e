"""A backend for diagnosis, without models and torch: shows what a request costs apart from computing."""

from __future__ import annotations

import time
from typing import Any

from ..wire.messages import LoadSpec
from .base import Step

_SLICE_S = 0.02


class EchoModel:
    """Answers with the requested number of bytes."""

    nbytes = 0

    def __init__(self) -> None:
        self._answer = memoryview(b"")

    def properties(self) -> dict[str, Any]:
        """Give the model's class."""
        return {"class": "echo"}

    def echo(self, nbytes: int, seconds: float, step: Step) -> memoryview:
        """Return ``nbytes`` zeros, after ``seconds`` of pretended work that shows progress and can be cancelled."""
        end = time.monotonic() + seconds
        slices = max(1, round(seconds / _SLICE_S))
        for done in range(slices if seconds else 0):
            step(done, slices)
            time.sleep(max(0.0, min(_SLICE_S, end - time.monotonic())))
        if self._answer.nbytes != nbytes:
            self._answer = memoryview(bytes(nbytes))
        return self._answer


class EchoBackend:
    """Loads the echo model, whatever the ``LoadSpec`` asks for."""

    name = "echo"

    def versions(self) -> dict[str, str]:
        """Give no version: the answers depend on no library."""
        return {}

    def devices(self) -> list[str]:
        """List the CPU alone."""
        return ["cpu"]

    def load(self, spec: LoadSpec) -> EchoModel:
        """Make an echo model."""
        return EchoModel()
