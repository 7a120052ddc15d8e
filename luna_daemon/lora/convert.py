"""Script that converts a LoRA in one of torch's own formats to safetensors, in a process that the daemon starts.

Loads weights only: a file that would execute code is refused. The arguments are the file, the file to write, and the
limit of bytes. The exit code is 0, or 1 with the reason on standard error.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    # The script's own folder could shadow other modules; no module of the package is imported here.
    sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != pathlib.Path(__file__).parent]

import sys
import zipfile
from pathlib import Path
from typing import Any


class Refused(Exception):
    """The file is not converted; the message is the reason."""


def convert(source: Path, target: Path, max_bytes: int) -> None:
    """Write the tensors that ComfyUI would load from ``source`` to ``target``, as safetensors.

    Raises:
        Refused: the file holds more than weights, or more than ``max_bytes``.
    """
    import torch
    from safetensors.torch import save_file

    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            _check_size(sum(info.file_size for info in archive.infolist()), max_bytes)
    try:
        document: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"the file cannot be loaded as weights only: {why}") from error
    weights = _state_dict(document)
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()):
        raise Refused("the file holds more than tensors")
    _check_size(sum(value.numel() * value.element_size() for value in weights.values()), max_bytes)
    # Clones: safetensors refuses tensors that share memory.
    save_file({key: value.detach().clone().contiguous() for key, value in weights.items()}, target)


def _state_dict(document: Any) -> dict[Any, Any]:
    """The part of the file that ComfyUI uses as the state dict."""
    if not isinstance(document, dict):
        raise Refused(f"the file holds a {type(document).__name__}, not a state dict")
    inner = document.get("state_dict")
    if inner is None and len(document) == 1:
        inner = next(iter(document.values()))
    return inner if isinstance(inner, dict) else document


def _check_size(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise Refused(f"the tensors have {nbytes} bytes; the limit is {max_bytes}")


def main(arguments: list[str]) -> int:
    """Convert a file; ``arguments`` are source, target and limit of bytes. Returns the exit code."""
    source, target, max_bytes = arguments
    try:
        convert(Path(source), Path(target), int(max_bytes))
    except Exception as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
