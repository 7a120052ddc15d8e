"""Device masks: environment variables that hide all GPUs but a worker's own from its libraries.

The variables are set before torch is imported; inside the worker the GPU then has number 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core import ConfigError

_MASKS = {
    "cuda": ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
    "xpu": ("ZE_AFFINITY_MASK",),
}
"""Variables that the vendors' drivers read, by torch device type. ROCm's torch calls its devices ``cuda`` too."""


def device_mask(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables that leave only ``device`` visible; empty for devices that need no mask.

    A device number counts only the devices that the daemon itself may use.

    Args:
        device: ``auto``, ``cpu``, ``mps``, ``cuda:1``, ``xpu:0`` or a GPU's UUID.
        environ: the daemon's environment.

    Raises:
        ConfigError: the daemon's own mask has no such device.
    """
    if device.startswith("GPU-"):
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **dict.fromkeys(_MASKS["cuda"], device)}
    kind, _, number = device.partition(":")
    if kind not in _MASKS or not number:
        return {}
    mask = {name: _pick(device, int(number), environ.get(name, "")) for name in _MASKS[kind]}
    # Number GPUs as nvidia-smi does, instead of CUDA's default "fastest first".
    return {"CUDA_DEVICE_ORDER": environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), **mask} if kind == "cuda" else mask


def inner_device(device: str) -> str:
    """Return the name of ``device`` inside a worker that sees no other device."""
    if device.startswith("GPU-"):
        return "cuda:0"
    kind, _, number = device.partition(":")
    return f"{kind}:0" if kind in _MASKS and number else device


def _pick(device: str, number: int, outer: str) -> str:
    visible = [part for part in outer.split(",") if part]
    if not visible:
        return str(number)
    if number >= len(visible):
        raise ConfigError(f"device {device!r} does not exist: the daemon may use only {', '.join(visible)}")
    return visible[number]
