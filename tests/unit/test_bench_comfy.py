"""`benchmarks/comfy.py` without a ComfyUI: one line that says what is missing, before anything is built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(root: str | None, python: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = {"COMFYUI_PATH": root, "COMFYUI_PYTHON": python}
    environ = {key: value for key, value in os.environ.items() if key not in given}
    environ |= {key: value for key, value in given.items() if value is not None}
    command = [sys.executable, str(ROOT / "benchmarks" / "comfy.py"), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("root", "python", "said"),
    [
        (None, None, "make bench-comfy needs COMFYUI_PATH (ComfyUI's folder) and COMFYUI_PYTHON"),
        ("", sys.executable, "make bench-comfy needs COMFYUI_PATH"),
        ("/nowhere/ComfyUI", sys.executable, "COMFYUI_PATH is '/nowhere/ComfyUI': there is no main.py"),
        ("HERE", "/nowhere/python", "COMFYUI_PYTHON is '/nowhere/python': there is no such file"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, root, python, said):
    """Exit code 2, no traceback, the value, and what to do."""
    (tmp_path / "main.py").touch()
    ran = bench(str(tmp_path) if root == "HERE" else root, python)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(said) and ran.stderr.count("\n") == 1


def test_an_unknown_part_is_named():
    """As `benchmarks/run.py` refuses one."""
    ran = bench(None, None, "sharing")
    assert ran.returncode == 2 and "no such part: sharing" in ran.stderr
