"""ComfyUI's modules in this process: imported with the settings' flags, with hooks for progress and memory errors."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core import ConfigError, OutOfMemory
from ..base import Step


class ComfyLibrary:
    """The modules of ComfyUI that load and run models.

    Args:
        root: ComfyUI's folder, which becomes the first entry of ``sys.path``.
        device: the worker's device; ``cpu`` keeps ComfyUI off the GPU.
        flags: ComfyUI's own command-line flags.

    Raises:
        ConfigError: ``root`` is not ComfyUI's folder, or ComfyUI refuses the flags.
    """

    def __init__(self, root: Path, device: str, flags: Sequence[str]) -> None:
        if not (root / "comfy" / "sd.py").is_file():
            raise ConfigError(f"{str(root)!r} is not ComfyUI's folder: it has no comfy/sd.py", "Fix comfyui_path")
        sys.path.insert(0, str(root))
        _parse_flags([*flags, *(["--cpu"] if device == "cpu" or not _has_gpu() else [])])
        self.sd: Any = importlib.import_module("comfy.sd")
        self.utils: Any = importlib.import_module("comfy.utils")
        self.memory: Any = importlib.import_module("comfy.model_management")

    def versions(self) -> dict[str, str]:
        """Give the versions of ComfyUI and torch."""
        import torch

        return {"comfyui": importlib.import_module("comfyui_version").__version__, "torch": str(torch.__version__)}

    def devices(self) -> list[str]:
        """List the device that ComfyUI computes on."""
        return [str(self.memory.get_torch_device())]

    @contextmanager
    def progress(self, step: Step) -> Iterator[None]:
        """Call ``step`` wherever ComfyUI's code advances a progress bar; ``step`` may raise to cancel.

        Raises:
            OutOfMemory: the device had no room for the code in the ``with`` block.
        """
        self.utils.set_progress_bar_global_hook(lambda value, total, *rest, **more: step(int(value), int(total)))
        try:
            yield
        except self.memory.OOM_EXCEPTION as error:
            raise OutOfMemory(f"no room on the device: {error}", "Use smaller tiles, or free memory") from error
        finally:
            self.utils.set_progress_bar_global_hook(None)


def _parse_flags(flags: Sequence[str]) -> None:
    """Have ComfyUI read ``flags`` instead of this process' command line."""
    before, sys.argv = sys.argv, ["comfyui", *flags]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    except SystemExit as error:
        raise ConfigError(f"ComfyUI refuses the flags {' '.join(flags)!r}", "Fix comfyui_args") from error
    finally:
        sys.argv = before


def _has_gpu() -> bool:
    """Return whether torch sees a GPU; without a GPU ComfyUI starts only with ``--cpu``."""
    import torch

    xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    return torch.cuda.is_available() or xpu or torch.backends.mps.is_available()
