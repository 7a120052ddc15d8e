"""``luna-daemon lora`` as a user types it, with a real daemon and real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.conftest import ROOT
from tests.integration.test_loras import make


@pytest.fixture
def loras(tmp_path):
    """A folder of two LoRAs below a ComfyUI's folder."""
    folder = tmp_path / "models" / "loras"
    make(folder / "ink.safetensors")
    make(folder / "styles" / "oil.safetensors", 1)
    return folder


@pytest.fixture
def ask(start_daemon, tmp_path, loras):
    """Run ``luna-daemon lora`` against a daemon: (exit code, stdout, stderr)."""
    daemon = start_daemon(comfyui_path=tmp_path)

    def ask_(*argv: str) -> tuple[int, str, str]:
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("LUNA_", "COMFYUI_"))}
        ran = subprocess.run(
            [sys.executable, "-m", "luna_daemon", "lora", argv[0], "--port", str(daemon.port), "--runtime-dir",
             str(daemon.runtime_dir), *argv[1:]],
            cwd=tmp_path, env={**environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        return ran.returncode, ran.stdout, ran.stderr

    return ask_


def listed(ask: Any) -> dict[str, Any]:
    code, out, _ = ask("ls", "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)["loras"]
    return found


def test_warm_a_folder_pin_and_evict(ask, loras):
    """A folder's files with those below it; what is pinned survives ``evict --all`` and says so in the list."""
    assert ask("warm", str(loras)) == (0, "warmed 2 LoRAs (2 MB)\n", "")
    assert listed(ask).keys() == {"ink.safetensors", "styles/oil.safetensors"}
    assert ask("pin", "ink.safetensors") == (0, "ink.safetensors is pinned\n", "")
    code, out, _ = ask("ls")
    assert code == 0 and "ink.safetensors" in out and "2 LoRAs, 2 MB of 8.0 GB; hits 1, misses 2" in out
    assert [line.split()[0] for line in out.splitlines() if "yes" in line] == ["ink.safetensors"]
    assert ask("evict", "--all") == (0, "evicted 1 LoRA\n", "")
    assert ask("unpin", "ink.safetensors") == (0, "ink.safetensors is no longer pinned\n", "")
    assert ask("evict", "ink.safetensors") == (0, "evicted 1 LoRA\n", "") and listed(ask) == {}


def test_a_file_is_named_by_its_path_from_the_current_folder(ask, loras):
    """For each command the same; a folder, of which only the first file would be pinned, is refused."""
    path = os.path.join("models", "loras", "ink.safetensors")
    assert ask("pin", path) == (0, "ink.safetensors is pinned\n", "")
    assert ask("unpin", path) == (0, "ink.safetensors is no longer pinned\n", "")
    assert ask("evict", path) == (0, "evicted 1 LoRA\n", "") and listed(ask) == {}
    code, _, err = ask("pin", str(loras))
    assert code == 2 and "name one LoRA" in err and listed(ask) == {}


def test_what_cannot_be_warmed_is_named_and_the_rest_is_warmed(ask, loras):
    """One corrupt file among others: exit code 1 and a line on stderr."""
    (loras / "broken.safetensors").write_bytes(b"x" * 50)
    code, out, err = ask("warm", str(loras))
    assert (code, out) == (1, "warmed 2 LoRAs (2 MB)\n")
    assert (
        "luna-daemon: LoRA 'broken.safetensors' is not a valid safetensors file" in err and len(err.splitlines()) == 1
    )
    assert json.loads(ask("warm", "--json", str(loras))[1])["refused"]


def test_unknown_names_suggest_what_is_close(ask, loras, tmp_path):
    """In the folders for warm and pin, in the cache for unpin and evict; wrong usage is 2."""
    code, out, err = ask("warm", "inc.safetensors")
    assert (code, out) == (1, "") and "no LoRA is named 'inc.safetensors'" in err and "ink.safetensors" in err
    ask("warm", "ink.safetensors")
    for command in ("evict", "unpin"):
        code, out, err = ask(command, "inc.safetensors")
        assert (code, out) == (1, "") and "Similar names: ink.safetensors" in err
    (tmp_path / "nothing").mkdir()
    for wrong in (["warm", str(tmp_path / "nothing")], ["evict"], ["evict", "--all", "ink.safetensors"], ["warm"]):
        assert ask(*wrong)[0] == 2
