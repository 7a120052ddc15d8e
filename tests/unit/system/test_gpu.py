"""GPU memory from a driver library that the test holds in its hands."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from luna_daemon.system.gpu import free_vram, gpu_memory


class NVMLError(Exception):
    """As nvidia-ml-py raises it."""


class Driver:
    """Two GPUs, and a count of who has shut the library down."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.open, self.broken = 0, ""

    def __getattr__(self, name: str):
        def call(*args):
            if name == self.broken:
                raise NVMLError(name)
            return {
                "nvmlDeviceGetCount": lambda: 2,
                "nvmlDeviceGetHandleByIndex": lambda index: index,
                "nvmlDeviceGetName": lambda index: f"card {index}",
                "nvmlDeviceGetUUID": lambda index: f"GPU-{index}",
                "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(total=100, used=40 + index, free=60 - index),
            }[name](*args)

        return call

    def nvmlInit(self) -> None:
        if self.broken == "nvmlInit":
            raise NVMLError("no driver")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


def test_every_gpu_is_listed(driver):
    """With plain values, and the library is shut down afterwards."""
    second = {"index": 1, "name": "card 1", "uuid": "GPU-1", "total": 100, "used": 41, "free": 59}
    assert gpu_memory()[1] == second and len(gpu_memory()) == 2
    assert driver.open == 0


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_fails_is_no_gpu(driver, broken):
    """At any call; the library is shut down if it was opened."""
    driver.broken = broken
    assert gpu_memory() == [] and driver.open == 0


def test_without_the_library(monkeypatch):
    """No GPU is known, and no memory of one."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_memory() == [] and free_vram("cuda:0") is None


@pytest.mark.parametrize(
    ("device", "free"), [("cuda", 60), ("cuda:1", 59), ("GPU-1", 59), ("cuda:7", None), ("cpu", None), ("auto", None)]
)
def test_free_memory_of_a_device(driver, device, free):
    """By number or UUID; unknown devices and others than GPUs have none."""
    assert free_vram(device) == free
