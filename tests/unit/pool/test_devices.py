"""Device masks."""

from __future__ import annotations

import pytest

from luna_daemon.core import ConfigError
from luna_daemon.pool.devices import device_mask, inner_device


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda"])
def test_no_mask(device):
    """Devices without a number are left to the library."""
    assert device_mask(device, {}) == {}
    assert inner_device(device) == device


@pytest.mark.parametrize("device", ["cuda:1", "GPU-8d2b"])
def test_one_gpu_is_visible_to_every_vendor(device):
    """NVIDIA's and AMD's variables agree, and the worker calls the device number 0."""
    mask = device_mask(device, {})
    assert mask["CUDA_VISIBLE_DEVICES"] == mask["HIP_VISIBLE_DEVICES"] == device.removeprefix("cuda:")
    assert mask["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert inner_device(device) == "cuda:0"


def test_a_number_counts_among_what_the_daemon_sees():
    """``cuda:1`` of a daemon that may see GPUs 2 and 5 is GPU 5; there is no ``cuda:2``."""
    assert device_mask("cuda:1", {"CUDA_VISIBLE_DEVICES": "2,5"})["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(ConfigError, match="2, 5"):
        device_mask("cuda:2", {"CUDA_VISIBLE_DEVICES": "2,5"})


def test_intel():
    """Intel's GPUs have a mask of their own."""
    assert device_mask("xpu:1", {}) == {"ZE_AFFINITY_MASK": "1"}
    assert inner_device("xpu:1") == "xpu:0"
