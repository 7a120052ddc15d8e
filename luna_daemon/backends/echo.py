"""The diagnostic backend, without models and torch: what a request costs apart from computing."""

from __future__ import annotations

import time
from typing import Any

from ..wire.messages import LoadSpec
from .base import Step

_SLICE_S = 0.02


class EchoModel:
    """Answers with as many bytes as are asked for."""

    nbytes = 0

    def __init__(self) -> None:
        self._answer = memoryview(b"")

    def properties(self) -> dict[str, Any]:
        """The class, and nothing else."""
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
    """Loads the echo model, whatever is asked for."""

    name = "echo"

    def versions(self) -> dict[str, str]:
        """Nothing decides bits here."""
        return {}

    def devices(self) -> list[str]:
        """The CPU."""
        return ["cpu"]

    def load(self, spec: LoadSpec) -> EchoModel:
        """Make an echo model."""
        return EchoModel()
