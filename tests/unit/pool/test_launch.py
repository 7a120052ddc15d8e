"""Which workers take whose work, and what they are started with."""

from __future__ import annotations

import sys

import msgspec
import pytest

from luna_daemon.config import load_settings
from luna_daemon.core import ConfigError
from luna_daemon.pool import launch
from luna_daemon.pool.process import WorkerKey
from luna_daemon.wire.messages import ComfyId, LoadSpec

COMFY = ComfyId("/comfy", "/env/bin/python", "0.8.0", "2.9", ("--fp32-vae",))
SPEC = LoadSpec("vae:a:0", "vae", "sdxl", (), "cpu", "auto", False, COMFY)


def settings(**given):
    return load_settings(given, {})


def with_comfy(**changes) -> LoadSpec:
    return msgspec.structs.replace(SPEC, comfy=msgspec.structs.replace(COMFY, **changes))


@pytest.mark.parametrize("changes", [{"root": "/other"}, {"python": "/other"}, {"flags": ()}, {"flags": ("--fast",)}])
def test_another_place_or_flag_is_another_worker(changes):
    assert launch.worker_key(with_comfy(**changes), settings()) != launch.worker_key(SPEC, settings())


def test_the_key_has_backend_and_device_and_no_version():
    """A worker's versions are known only once it runs."""
    key = launch.worker_key(SPEC, settings())
    assert key == launch.worker_key(with_comfy(version="1", torch="3"), settings())
    assert str(key) == f"comfy-{COMFY.key}@cpu"
    assert str(launch.worker_key(msgspec.structs.replace(SPEC, device="cuda:1"), settings())).endswith("@cuda:1")
    bare = msgspec.structs.replace(SPEC, comfy=None)
    assert str(launch.worker_key(bare, settings())) == "diffusers@cpu"
    assert str(launch.worker_key(LoadSpec("echo", "echo", "", (), "cpu", "auto"), settings())) == "echo@cpu"


@pytest.mark.parametrize(
    ("wanted", "versions", "fit"),
    [
        (("0.8.0", "2.9"), {"comfyui": "0.8.0", "torch": "2.9"}, True),
        (("0.8.0", "2.9"), {"comfyui": "0.8.1", "torch": "2.9"}, False),
        (("0.8.0", "2.9"), {"comfyui": "0.8.0", "torch": "2.10"}, False),
        (("0.8.0", "2.9"), {}, True),
        (("", ""), {"comfyui": "0.8.1", "torch": "2.9"}, True),
        (("", "2.9"), {"comfyui": "0.8.1", "torch": "2.9"}, True),
    ],
)
def test_a_worker_of_other_versions_does_not_fit(wanted, versions, fit):
    """One that still starts may; who claims no version takes any."""
    assert launch.fits(with_comfy(version=wanted[0], torch=wanted[1]), versions) is fit
    assert launch.fits(msgspec.structs.replace(SPEC, comfy=None), versions)


def test_bits_are_the_clients_and_memory_the_daemons(tmp_path):
    """The worker's flags: no bit of the daemon's own command line, and nothing of it is lost besides."""
    own = settings(comfyui_args=["--reserve-vram", "2", "--bf16-vae", "--fast"], comfyui_path=tmp_path)
    key = launch.worker_key(SPEC, own)
    worker, python = launch.new_worker(1, key, SPEC, own, tmp_path / "log")
    assert worker.config["options"] == {
        "root": "/comfy", "device": "cpu", "flags": ["--reserve-vram", "2", "--fp32-vae"]
    }  # fmt: skip
    assert (python, worker.key, worker.comfy, worker.device) == ("/env/bin/python", key, COMFY, "cpu")


def test_other_backends_run_here(tmp_path):
    bare = msgspec.structs.replace(SPEC, comfy=None)
    worker, python = launch.new_worker(
        1, WorkerKey("diffusers", "cpu"), bare, settings(comfyui_path=tmp_path), tmp_path / "log"
    )
    assert (python, worker.config["backend"], worker.config["options"]) == (sys.executable, "diffusers", {})
    assert worker.config["variables"] == {"COMFYUI_PATH": str(tmp_path)}


def test_comfy_without_a_comfyui(tmp_path):
    with pytest.raises(ConfigError, match="needs ComfyUI's folder"):
        launch.new_worker(
            1,
            WorkerKey("comfy", "cpu"),
            msgspec.structs.replace(SPEC, comfy=None),
            settings(backend="comfy"),
            tmp_path / "log",
        )


def test_the_refusal_names_both(tmp_path):
    text = str(launch.unlike(COMFY, {"comfyui": "0.9.0", "torch": "2.10"}))
    assert all(part in text for part in ("0.8.0", "2.9", "0.9.0", "2.10", "/comfy", "Restart that ComfyUI"))
