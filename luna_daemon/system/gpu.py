"""Memory of GPUs as the driver reports it, without torch: nvidia-ml-py where it is installed."""

from __future__ import annotations

from typing import Any


def gpu_memory() -> list[dict[str, Any]]:
    """List each GPU's index, name, UUID and bytes ``total``, ``used``, ``free``; empty without a GPU or the library."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_attributes(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _attributes(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "index": index,
        "name": str(nvml.nvmlDeviceGetName(handle)),
        "uuid": str(nvml.nvmlDeviceGetUUID(handle)),
        "total": int(memory.total),
        "used": int(memory.used),
        "free": int(memory.free),
    }


def free_vram(device: str) -> int | None:
    """Look up the free bytes of ``cuda:N`` or a GPU's UUID; ``None`` for other devices and unknown GPUs."""
    if not device.startswith(("cuda", "GPU-")):
        return None
    wanted: str | int = device if device.startswith("GPU-") else int(device.partition(":")[2] or 0)
    for gpu in gpu_memory():
        if wanted in (gpu["uuid"], gpu["index"]):
            return int(gpu["free"])
    return None
