"""Devices, dtypes, and weights into modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luna_daemon.backends.diffusers.layouts import Part
from luna_daemon.backends.diffusers.loading import assign_weights, memory_errors, pick_device, pick_dtype
from luna_daemon.backends.diffusers.weightfiles import WeightFiles
from luna_daemon.core import ConfigError, ModelLoadError, OutOfMemory

PART = Part("kl", "diffusers", "", WeightFiles(Path("x.safetensors"), {}))


@pytest.mark.parametrize(
    ("gpus", "asked", "device"),
    [(0, "auto", "cpu"), (2, "auto", "cuda:0"), (2, "cuda", "cuda:0"), (2, "cuda:1", "cuda:1"), (2, "cpu", "cpu")],
)
def test_devices(gpus: int, asked: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pick_device(asked) == torch.device(device)


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "tpu", ""])
def test_a_device_that_is_not_there(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"device is {asked!r}, must be auto or one of cpu"):
        pick_device(asked)


def test_dtypes() -> None:
    assert pick_dtype("auto", torch.bfloat16) is torch.bfloat16
    assert pick_dtype("fp16", torch.bfloat16) is torch.float16
    with pytest.raises(ConfigError, match="precision is 'int4', must be auto or one of fp32, fp16, bf16"):
        pick_dtype("int4", torch.float32)


def test_only_a_lack_of_memory_is_turned_into_one() -> None:
    for error in (torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: no")):
        with pytest.raises(OutOfMemory, match="no memory for a test"), memory_errors("a test"):
            raise error
    with pytest.raises(RuntimeError, match="a bug"), memory_errors("a test"):
        raise RuntimeError("a bug")


def linear() -> torch.nn.Linear:
    with torch.device("meta"):
        return torch.nn.Linear(2, 3)


def test_weights_of_the_wanted_dtype_are_not_copied() -> None:
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(3), "other": torch.ones(1)}
    model = linear()
    assign_weights(PART, model, weights, torch.float32, torch.device("cpu"))
    assert model.weight.data_ptr() == weights["weight"].data_ptr() and not model.weight.requires_grad
    model = linear()
    assign_weights(PART, model, weights, torch.bfloat16, torch.device("cpu"))
    assert model.weight.dtype == torch.bfloat16 and weights["weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"weight": torch.ones(3, 2)}, "lacks 1 of 2 weights, such as bias"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, r"weight has shape \[2, 3\], not \[3, 2\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"x\.safetensors.*{named}"):
        assign_weights(PART, linear(), weights, torch.float32, torch.device("cpu"))
