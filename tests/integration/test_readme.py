"""What the README says works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from luna_daemon.config import load_settings
from tests.integration.conftest import DEMO_VAE, ROOT, free_port

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def run(code: str, **variables: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_proxies(start_daemon, clip_l):
    """The first Python example encodes, decodes and makes a conditioning."""
    daemon = start_daemon(toml=f'[models.sdxl]\nvae = ["{DEMO_VAE}"]\nclip = ["{clip_l}"]\ntype = "sd15"\n')
    code = f"import torch\npixels = torch.rand(1, 64, 64, 3)\n{blocks('python')[0]}\nassert pixels.shape[3] == 3\n"
    run(code, LUNA_PORT=str(daemon.port), LUNA_RUNTIME_DIR=str(daemon.runtime_dir))
    requests = daemon.info()["requests"]
    assert {"vae.encode", "vae.decode", "clip.encode"} <= set(requests)


def test_a_daemon_from_python(tmp_path):
    """The second starts a daemon that answers, and that is gone after the block."""
    port = free_port()
    code = blocks("python")[1].replace("19283", str(port)).replace("...", "print(daemon.pid)")
    run(code, LUNA_RUNTIME_DIR=str(tmp_path), LUNA_WS_PORT=str(free_port()))
    assert not list(tmp_path.glob(str(port)))


def test_the_configuration(tmp_path):
    """The ``luna.toml`` is one."""
    file = tmp_path / "luna.toml"
    file.write_text(blocks("toml")[0])
    assert load_settings({}, {}, file).named_models()["sdxl"].clip[1].endswith("clip_g.safetensors")


@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("luna-daemon ")])
def test_the_commands(line):
    """Every command and option that the quick start names exists."""
    words = line.split("#")[0].split()[1:]
    command = [sys.executable, "-m", "luna_daemon", words[0], "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(word in text for word in words if word.startswith("--"))


def test_links_lead_somewhere():
    """Every relative link is a file."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / Path(link)).exists()]
