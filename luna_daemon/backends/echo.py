"""The diagnostic backend: no model and no torch. It times the way of a request, and nothing else."""

from __future__ import annotations

import time
from typing import Any

from ..wire.messages import LoadSpec
from .base import Step

_SLICE_S = 0.02


class EchoModel:
    """Answers a fixed pattern of the size asked for."""

    nbytes = 0

    def __init__(self) -> None:
        self._answer = memoryview(b"")

    def properties(self) -> dict[str, Any]:
        return {"class": "echo"}

    def echo(self, nbytes: int, seconds: float, step: Step) -> memoryview:
        """``nbytes`` bytes, after ``seconds`` of pretended work that can be cancelled and shows progress."""
        end = time.monotonic() + seconds
        slices = max(1, round(seconds / _SLICE_S))
        for done in range(slices if seconds else 0):
            step(done, slices)
            time.sleep(max(0.0, min(_SLICE_S, end - time.monotonic())))
        if self._answer.nbytes != nbytes:
            self._answer = memoryview(bytes(nbytes))
        return self._answer


class EchoBackend:
    """Loads nothing."""

    name = "echo"

    def versions(self) -> dict[str, str]:
        return {}

    def devices(self) -> list[str]:
        return ["cpu"]

    def load(self, spec: LoadSpec) -> EchoModel:
        return EchoModel()
