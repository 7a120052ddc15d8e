"""Checks of the installation for ``doctor``: this Python, the dependencies, the libraries of the workers.

Imports only the standard library: dependencies may be missing. torch is looked for, not imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..config import Settings

DEPENDENCIES = {
    "aiohttp": "3.9", "filelock": "3.12", "msgspec": "0.18", "numpy": "1.24", "prometheus-client": "0.20",
    "psutil": "5.9", "pydantic-settings": "2.3", "PyYAML": "6", "rich": "13", "safetensors": "0.4", "typer": "0.12",
}  # fmt: skip
"""The dependencies in pyproject.toml, each with its lowest version."""

_WORKER_NEEDS = ("torch", "msgspec", "numpy", "psutil")
_DIFFUSERS_NEEDS = ("diffusers", "transformers")
_PROBE = """
import importlib.metadata, importlib.util, json, sys
sys.path[:] = [entry for entry in sys.path if entry]  # not the folder that doctor runs in
found = {}
for name in sys.argv[1:]:
    if importlib.util.find_spec(name) is not None:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "of unknown version"
print(json.dumps(found))
"""
_PROBE_S = 60


class Check(NamedTuple):
    """The result of one check."""

    name: str
    level: str
    """``ok``, ``warning`` or ``problem``."""
    found: str
    advice: str = ""
    """Instruction to the user; empty where all is well."""


def python() -> Check:
    """Check the version of this interpreter."""
    found = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("Python", "ok", found)
    return Check("Python", "warning", f"{found} is not tested", "Use Python 3.10 to 3.13")


def dependencies() -> Iterator[Check]:
    """Check the version of each dependency of the package."""
    for name, least in DEPENDENCIES.items():
        version = _version(name)
        if version is None:
            yield Check(name, "problem", "not installed", f"pip install '{name}>={least}'")
        elif _numbers(version) < _numbers(least):
            yield Check(name, "problem", f"{version} is too old", f"pip install '{name}>={least}'")
        else:
            yield Check(name, "ok", version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def libraries(settings: Settings, with_comfyui: bool) -> tuple[list[Check], str]:
    """Check the libraries of the workers in the interpreter that will run the workers.

    Args:
        with_comfyui: whether workers run ComfyUI, and so ComfyUI's interpreter.

    Returns:
        The checks, and the version of torch; an empty version if torch is missing.
    """
    interpreter = str(settings.comfyui_python or sys.executable) if with_comfyui else sys.executable
    names = _WORKER_NEEDS if with_comfyui else _WORKER_NEEDS + _DIFFUSERS_NEEDS
    try:
        versions = _importable(interpreter, names)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        advice = "Correct comfyui_python" if settings.comfyui_python and with_comfyui else "Fix this environment"
        return [Check("workers' Python", "problem", f"{interpreter} cannot be run: {error}", advice)], ""
    checks = [Check("workers' Python", "ok", interpreter)]
    for name in names:
        title = f"workers' {name}" if name in DEPENDENCIES else name
        if name in versions:
            checks.append(Check(title, "ok", versions[name]))
            continue
        why = "no worker can start" if name in _WORKER_NEEDS else "no worker can load a model"
        package = "'luna-daemon[standalone]'" if name in _DIFFUSERS_NEEDS else name
        advice = f"{interpreter} -m pip install {package}"
        checks.append(Check(title, "problem", f"not found by {interpreter}: {why}", advice))
    return checks, versions.get("torch", "")


def _importable(interpreter: str, names: Sequence[str]) -> dict[str, str]:
    """Ask an interpreter for the version of each module that it finds, without importing the modules.

    Raises:
        OSError, SubprocessError, ValueError: the interpreter cannot be run, or is not Python.
    """
    command = [interpreter, "-c", _PROBE, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
