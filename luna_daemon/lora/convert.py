"""A LoRA in one of torch's own formats, converted to safetensors once: run by the daemon as a process of its own.

Reads weights only: what a file wants executed is refused. Started as a script by its absolute path; its arguments are
the file, where to write, and the most bytes. Ends with 0, or with 1 and one line of why on standard error.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    # A script's own folder would shadow the standard library; nothing of the package is needed here.
    sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != pathlib.Path(__file__).parent]

import sys
import zipfile
from pathlib import Path
from typing import Any


class Refused(Exception):
    """Why a file is not converted."""


def convert(source: Path, target: Path, max_bytes: int) -> None:
    """Write a state dict's tensors to ``target``, as ComfyUI would find them in the file.

    Raises:
        Refused: not weights alone, or larger than ``max_bytes``.
    """
    import torch
    from safetensors.torch import save_file

    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            _check_size(sum(info.file_size for info in archive.infolist()), max_bytes)
    try:
        found: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refused(f"it cannot be read as weights alone: {str(error).strip().splitlines()[0]}") from error
    weights = _state_dict(found)
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()):
        raise Refused("it holds more than tensors")
    _check_size(sum(value.numel() * value.element_size() for value in weights.values()), max_bytes)
    # Clones: safetensors refuses tensors that share memory.
    save_file({key: value.detach().clone().contiguous() for key, value in weights.items()}, target)


def _state_dict(found: Any) -> dict[Any, Any]:
    """The same part of the file that ComfyUI takes."""
    if not isinstance(found, dict):
        raise Refused(f"it holds a {type(found).__name__}, no state dict")
    inner = found.get("state_dict")
    if inner is None and len(found) == 1:
        inner = next(iter(found.values()))
    return inner if isinstance(inner, dict) else found


def _check_size(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise Refused(f"its tensors have {nbytes} bytes; the limit is {max_bytes}")


def main(arguments: list[str]) -> int:
    """Convert; the exit status."""
    source, target, max_bytes = arguments
    try:
        convert(Path(source), Path(target), int(max_bytes))
    except Exception as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
