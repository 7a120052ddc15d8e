"""The luna-daemon command and its doctor, without a daemon."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from luna_daemon import __version__
from luna_daemon.commands import cli, doctor, installed, models, terminal
from luna_daemon.system import runtime

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ["serve", "status", "top", "models", "warm", "unload", "token", "reload", "stop", "doctor", "bench", "tray"]


@pytest.fixture(autouse=True)
def _clean_surroundings(clean, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run(capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run_(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(argv))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run_


# --- the command line ---


def test_version(run):
    """--version prints name and version and nothing else."""
    assert run("--version") == (0, f"luna-daemon {__version__}\n", "")


def test_help_lists_every_command_in_one_line_each(run):
    """The overview shows each command with a sentence that is not cut off."""
    code, out, _ = run("--help")
    block = out.partition("Commands:\n")[2].partition("\n\n")[0]
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", block, re.MULTILINE))
    assert code == 0
    assert list(listed) == [*COMMANDS, "lora"]
    assert all(re.search(r"[\w']\.$", sentence) for sentence in listed.values())


@pytest.mark.parametrize("command", [*COMMANDS, *(f"lora {name}" for name in ("ls", "warm", "pin", "unpin", "evict"))])
def test_help_explains_every_option_within_80_columns(run, command):
    """No option is without words, and no line is wider than a terminal."""
    code, out, _ = run(*command.split(), "--help")
    options = re.findall(r"^  (--[\w-]+)(.*)$", out, re.MULTILINE)
    assert code == 0
    assert {"--help", "--port", "--runtime-dir"} <= {name for name, _ in options}
    assert all(re.search(r"  \S", rest) for _, rest in options), out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["serve", "status"])
def test_serve_and_status_take_both_ports(run, command):
    """--port and --ws-port exist and name the ports that hold by default."""
    _, out, _ = run(command, "--help")
    assert re.search(r"--port PORT .*19283", out)
    assert re.search(r"--ws-port PORT .*19284", out)


@pytest.mark.parametrize("argv", [["status"], ["models"], ["warm", "sdxl"], ["unload"], ["stop"], ["lora", "ls"]])
def test_without_a_daemon_one_line_says_how_to_start_it(run, port, tmp_path, argv):
    """Exit code 1, nothing on stdout, one line on stderr."""
    code, out, err = run(*argv, "--port", str(port), "--runtime-dir", str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith(f"luna-daemon: no Luna Daemon answers on 127.0.0.1:{port} ")
    assert err.endswith("Start it with 'luna-daemon serve'\n")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("argv", [["status"], ["models"], ["warm", "sdxl"], ["unload"], ["stop"], ["lora", "ls"]])
def test_without_a_daemon_json_says_stopped(run, port, tmp_path, argv):
    """With --json stdout is one document whose status is stopped; the exit code stays 1."""
    code, out, _ = run(*argv, "--json", "--port", str(port), "--runtime-dir", str(tmp_path))
    answer = json.loads(out)
    assert code == 1
    assert answer["status"] == "stopped"
    assert answer["error"] == "connection"
    assert str(port) in answer["message"]


@pytest.mark.parametrize("command", ["serve", "status", "models", "unload", "token", "reload", "stop", "bench", "tray"])
def test_bad_setting_ends_with_2(run, command):
    """Every command refuses a wrong setting with its name, its value and what is allowed."""
    code, out, err = run(command, "--port", "70000")
    assert (code, out) == (2, "")
    assert err.startswith("luna-daemon: setting 'port' is 70000: must be less than or equal to 65535. ")
    assert len(err.splitlines()) == 1


def test_options_of_serve_reach_the_settings(monkeypatch, tmp_path, run):
    """Each option of serve sets what it says; what is not given is left to the other sources."""
    seen = []
    monkeypatch.setattr("luna_daemon.daemon_server.LunaDaemon.run", lambda self: seen.append(self.settings))
    monkeypatch.setenv("LUNA_QUEUE_LIMIT", "7")
    code, _, _ = run(
        "serve", "--host", "127.0.0.2", "--port", "1", "--ws-port", "2", "--comfyui", "/c",
        "--model-dir", "/a", "--model-dir", "/b", "--vae-device", "cpu", "--clip-device", "cuda:1",
        "--backend", "diffusers", "--service-type", "vae_only", "--log-level", "debug",
        "--runtime-dir", str(tmp_path), "--comfyui-python", "/p",
    )  # fmt: skip
    assert code == 0
    (settings,) = seen
    assert (settings.host, settings.port, settings.ws_port) == ("127.0.0.2", 1, 2)
    assert (settings.comfyui_path, settings.model_dirs) == (Path("/c"), [Path("/a"), Path("/b")])
    assert settings.comfyui_python == Path("/p")
    assert (settings.vae_device, settings.clip_device, settings.backend) == ("cpu", "cuda:1", "diffusers")
    assert (settings.service_type.value, settings.log_level) == ("vae", "DEBUG")
    assert (settings.runtime_dir, settings.queue_limit) == (tmp_path, 7)
    logging.getLogger("luna_daemon").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("name", "kind", "kinds"),
    [
        ("sdxl", "all", ["vae", "clip"]),
        ("SDXL", "all", ["vae", "clip"]),
        ("tiny", "all", ["vae"]),
        ("tiny", "clip", ["clip"]),
    ],
)
def test_kinds_of_a_name(name, kind, kinds):
    """all means what the name has, in any case of letters; a kind that is asked for is asked for."""

    class Client:
        def models(self) -> dict:
            return {"named": {"sdxl": {"vae": ["v"], "clip": ["c"]}, "tiny": {"vae": ["v"], "clip": []}}}

    assert models._kinds(Client(), name, kind) == kinds


def test_a_taken_number_is_not_mistaken_for_the_daemon(tmp_path):
    """A process that started long after the runtime folder was last touched is not that daemon."""
    os.utime(tmp_path, (1, 1))
    assert runtime.has_ended(os.getpid(), tmp_path)
    os.utime(tmp_path)
    assert not runtime.has_ended(os.getpid(), tmp_path)


@pytest.mark.parametrize(("pid", "expected"), [(7, (0, "secret\n")), (8, (2, ""))])
def test_token_is_that_of_the_daemon_that_answers(monkeypatch, run, tmp_path, pid, expected):
    """A daemon of this machine on the same port has another token than the one that was asked, which is elsewhere."""
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "daemon.json").write_text('{"pid": 7}')
    (tmp_path / "5" / "token").write_text("secret")
    client = MagicMock(host="10.0.0.1", port=5, runtime_dir=tmp_path)
    client.__enter__.return_value = client
    client.get_daemon_info.return_value = {"pid": pid}
    monkeypatch.setattr(cli, "dial", lambda *options: client)
    code, out, err = run("token")
    assert (code, out) == expected and ("10.0.0.1:5 is not on this machine" in err) == bool(code)


def test_status_fits_80_columns_without_colour_codes(capsys):
    """A full status is plain text when piped, no line is wider than 80, and nothing is cut off."""
    long_key = "clip:a-model-with-a-very-long-name-indeed:0123456789abcdef"
    terminal.show_status(_info(long_key), "127.0.0.1:19283", "http://127.0.0.1:19284/")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "Luna Daemon 1.2.3 is running on 127.0.0.1:19283 (pid 11, 50 MB) for 1 h 1 min" in out
    assert "[Errno 28] no room" in out
    for part in ("22", "busy", "an instance", "A GPU", "hits 4, misses 5", "vae.decode 3", "yes", "--fp32-vae"):
        assert part in out
    assert "deadbeef" not in re.sub(r"\s", "", out)
    assert "0123456789abcdef" in re.sub(r"[\s─]", "", out)


def _info(key: str) -> dict:
    cache = {"entries": 1, "bytes": 2048, "max_bytes": 1 << 29, "hits": 4, "misses": 5}
    worker = {
        "number": 1, "pid": 22, "state": "busy", "device": "GPU-0aa1bb2c-1111-2222-3333-444455556666",
        "models": {key: 1 << 30}, "rss": 1 << 30, "requests": 9,
        "versions": {"comfyui": "0.8.0", "torch": "2.14.1+cu130"},
        "comfyui": {"root": "/home/somebody/with/a/long/name/ComfyUI", "python": "/usr/bin/python3",
                    "flags": ["--fp32-vae", "--use-split-cross-attention"]},
    }  # fmt: skip
    return {
        "version": "1.2.3", "status": "running", "pid": 11, "rss": 50 << 20, "uptime_s": 3660.0,
        "service_type": "full", "backend": "diffusers", "requests": {"ping": 2, "vae.decode": 3},
        "errors": {"busy": 1}, "in_flight": 1, "fallbacks": 0, "materialised": 0, "crashes": 0,
        "queue": {"waiting": 0, "limit": 256, "average_wait_s": 0.01}, "workers": [worker],
        "models": {"named": ["sdxl"], "pinned": [key]}, "caches": {"conditioning": cache, "lora": cache},
        "arena": {"folder": None, "why": "[Errno 28] no room", "used": 0, "max_bytes": 0},
        "clients": [
            {"name": "an instance", "pid": 1, "shared_memory": True, "leased_bytes": 0, "in_flight": 0}
        ],
        "gpus": [{"index": 0, "name": "A GPU", "used": 1 << 30, "total": 8 << 30}],
        "transport": "tcp", "transport_why": "[Errno 28] no room",
    }  # fmt: skip


# --- doctor ---


def _by_name(checks) -> dict[str, installed.Check]:
    return {check.name: check for check in checks}


def _examine(port, tmp_path, environ=None, **overrides):
    overrides = {"port": port, "runtime_dir": tmp_path / "run", **overrides}
    return _by_name(doctor.examine(overrides, None, environ or {}))


def test_doctor_asks_for_what_pyproject_asks_for():
    """The dependencies that doctor checks are those of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    wanted = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block[1]))
    assert wanted == installed.DEPENDENCIES


def test_doctor_names_missing_and_old_dependencies_and_stops_there(monkeypatch):
    """Without its dependencies nothing more is looked at; each comes with what installs it."""
    versions = {"msgspec": None, "rich": "12.9"}
    monkeypatch.setattr(installed, "_version", lambda name: versions.get(name, "999"))
    checks = _by_name(doctor.examine({}))
    assert checks["msgspec"] == ("msgspec", "problem", "not installed", "pip install 'msgspec>=0.18'")
    assert checks["rich"] == ("rich", "problem", "12.9 is too old", "pip install 'rich>=13'")
    assert checks["typer"].level == "ok"
    assert "configuration" not in checks


def test_doctor_reports_a_bad_setting_and_stops_there(port, tmp_path):
    """A wrong setting is a problem with the same words that serve uses."""
    checks = _examine(port, tmp_path, vae_device="gpu7")
    assert checks["configuration"].level == "problem"
    assert "'gpu7'" in checks["configuration"].found
    assert "shared memory" not in checks


def test_doctor_reports_the_file_in_use_and_unknown_variables(port, tmp_path, capsys, caplog):
    """The configuration file is named; a slip in a variable is a finding, not a log line."""
    (tmp_path / "luna.toml").write_text("queue_limit = 3")
    checks = _examine(port, tmp_path, {"LUNA_PROT": "1"})
    assert checks["configuration"].found == str(tmp_path / "luna.toml")
    assert checks["environment"].level == "warning"
    assert "LUNA_PORT" in checks["environment"].found
    assert capsys.readouterr().err == ""
    assert not caplog.messages


def test_doctor_asks_the_interpreter_of_the_workers(port, tmp_path):
    """What that one cannot find is a problem with what installs it there; ours is not asked in its place."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf \'{"torch": "2.9", "numpy": "2.0", "psutil": "7.0"}\'\n')
    python.chmod(0o755)
    comfyui = {"comfyui_path": _comfyui(tmp_path), "comfyui_python": python}
    checks = _examine(port, tmp_path, **comfyui)
    assert checks["workers' Python"].found == str(python)
    assert checks["torch"] == ("torch", "ok", "2.9", "")
    assert checks["workers' msgspec"].level == "problem"
    assert checks["workers' msgspec"].advice == f"{python} -m pip install msgspec"
    assert "diffusers" not in checks
    ours = _examine(port, tmp_path, backend="diffusers", **comfyui)
    assert ours["workers' Python"].found == sys.executable
    assert ours["workers' msgspec"].level == "ok"
    assert "diffusers" in ours


def test_doctor_finds_modules_without_importing_them(tmp_path, monkeypatch):
    """The probe looks on the interpreter's path, not in the current folder, and runs nothing of what it finds."""
    (tmp_path / "here_only.py").touch()
    library = tmp_path / "library"
    library.mkdir()
    (library / "there.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("PYTHONPATH", str(library))
    assert installed._importable(sys.executable, ["here_only", "there"]) == {"there": "of unknown version"}


def test_doctor_without_torch(port, tmp_path, monkeypatch):
    """No torch for the workers is a problem, with ComfyUI's folder and without."""
    monkeypatch.setattr(installed, "_importable", lambda python, names: {n: "9" for n in names if n != "torch"})
    assert _examine(port, tmp_path)["torch"].level == "problem"
    assert _examine(port, tmp_path, comfyui_path=_comfyui(tmp_path))["torch"].level == "problem"


def test_doctor_looks_for_a_tokenizer(port, tmp_path, monkeypatch):
    """Where the diffusers backend looks: COMFYUI_PATH and the package; none is a problem for a single file."""
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda n: None if n == "instant_clip_tokenizer" else real(n)
    )
    title, backend = "CLIP tokenizer", {"backend": "diffusers"}
    assert _examine(port, tmp_path)[title].level == "warning"
    (tmp_path / "own.safetensors").write_bytes(b"x")
    mine = {"models": {"mine": {"clip": ["own.safetensors"]}}, "model_dirs": [tmp_path]}
    assert _examine(port, tmp_path, **mine)[title].level == "problem"
    assert title not in _examine(port, tmp_path, service_type="vae", **mine)
    root = _comfyui(tmp_path)
    assert title not in _examine(port, tmp_path, comfyui_path=root, **mine)
    (root / "comfy" / "sd1_tokenizer").mkdir()
    (root / "comfy" / "sd1_tokenizer" / "vocab.json").touch()
    found = _examine(port, tmp_path, {"COMFYUI_PATH": str(root)}, **backend)[title]
    assert (found.level, found.found) == ("ok", str(root / "comfy" / "sd1_tokenizer"))
    assert _examine(port, tmp_path, comfyui_path=root, **backend)[title].level == "ok"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    assert "package" in _examine(port, tmp_path, **mine)[title].found


def test_doctor_takes_the_options_of_serve(monkeypatch, run):
    """What will be served is what is checked: each option reaches the settings that doctor examines."""
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda overrides, config: seen.append((overrides, config)) or [])
    code, _, _ = run(
        "doctor", "--comfyui", "/c", "--comfyui-python", "/p", "--model-dir", "/a", "--model-dir", "/b",
        "--backend", "comfy", "--vae-device", "cuda:0", "--clip-device", "cpu", "--config", "x.toml",
    )  # fmt: skip
    ((overrides, config),) = seen
    given = {name: value for name, value in overrides.items() if value is not None}
    assert (code, config) == (0, Path("x.toml"))
    assert given == {
        "comfyui_path": Path("/c"), "comfyui_python": Path("/p"), "model_dirs": [Path("/a"), Path("/b")],
        "backend": "comfy", "vae_device": "cuda:0", "clip_device": "cpu",
    }  # fmt: skip


def test_doctor_on_gpus(port, tmp_path, monkeypatch):
    """A device that is not there is a problem; a GPU and a torch for the CPU a warning."""
    gpu = {"index": 0, "name": "A GPU", "uuid": "GPU-1", "total": 8 << 30, "used": 0, "free": 8 << 30}
    monkeypatch.setattr("luna_daemon.system.gpu.gpu_memory", lambda: [gpu])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    torch = {"torch": "2.0+cu128"}
    monkeypatch.setattr(installed, "_importable", lambda python, names: torch)
    assert _examine(port, tmp_path, vae_device="cuda:0")["GPU"].level == "ok"
    missing = _examine(port, tmp_path, vae_device="cuda:3")["GPU"]
    assert (missing.level, "cuda:3 does not exist" in missing.found) == ("problem", True)
    torch["torch"] = "2.0+cpu"
    assert _examine(port, tmp_path)["GPU"].level == "warning"


def _comfyui(tmp_path: Path) -> Path:
    root = tmp_path / "ComfyUI"
    (root / "comfy").mkdir(parents=True, exist_ok=True)
    (root / "comfy" / "sd.py").touch()
    (root / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    return root


def test_doctor_finds_comfyui(port, tmp_path):
    """A ComfyUI folder is recognised with its version; another folder is a problem; none is fine."""
    assert _examine(port, tmp_path)["ComfyUI"].level == "ok"
    assert _examine(port, tmp_path, comfyui_path=tmp_path)["ComfyUI"].level == "problem"
    root = _comfyui(tmp_path)
    assert _examine(port, tmp_path, {"COMFYUI_PATH": str(root)})["ComfyUI"].found == f"0.3.64 in {root}"


def test_doctor_needs_comfyui_for_its_backend(port, tmp_path):
    """backend = comfy without a ComfyUI, and an interpreter that cannot be run, are problems."""
    checks = _examine(port, tmp_path, backend="comfy", comfyui_python=tmp_path / "python")
    assert checks["ComfyUI"].level == "problem"
    assert checks["workers' Python"].level == "problem"
    assert checks["workers' Python"].advice == "Correct comfyui_python"


def test_doctor_on_models(port, tmp_path):
    """A missing file is a warning for the defaults, a problem if configured; what was tried is said."""
    assert _examine(port, tmp_path)["model sdxl (vae)"].level == "warning"
    checks = _examine(port, tmp_path, vae_path="my/own.safetensors", model_dirs=[tmp_path])
    missing = checks["model sdxl (vae)"]
    assert missing.level == "problem"
    assert str(tmp_path / "vae" / "my" / "own.safetensors") in missing.found
    (tmp_path / "own.safetensors").write_bytes(b"x")
    found = _examine(port, tmp_path, models={"mine": {"vae": ["own.safetensors"]}}, model_dirs=[tmp_path])
    assert found["model mine (vae)"] == ("model mine (vae)", "ok", str(tmp_path / "own.safetensors"), "")


def test_doctor_on_ports(port, tmp_path):
    """Another's port is a problem that names the process; for the status page only a warning."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        checks = _examine(taken, tmp_path, ws_port=taken)
        assert checks[f"port {taken}"].level == "problem"
        assert f"(pid {os.getpid()})" in checks[f"port {taken}"].found
        assert checks[f"ws_port {taken}"].level == "warning"
    assert _examine(port, tmp_path)[f"port {port}"].found == "free"


def test_doctor_on_a_host_that_is_not_ours(port, tmp_path):
    """An address that no network card has is a problem of the setting host."""
    check = _examine(port, tmp_path, host="203.0.113.9")[f"port {port}"]
    assert check.level == "problem"
    assert "203.0.113.9" in check.found


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX")
def test_doctor_on_the_runtime_folder(port, tmp_path):
    """Absent is fine and stays absent; open to others, or a link, is a problem."""
    folder = tmp_path / "run" / str(port)
    assert _examine(port, tmp_path)["runtime folder"].level == "ok"
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    assert "755" in _examine(port, tmp_path)["runtime folder"].found
    folder.chmod(0o700)
    assert _examine(port, tmp_path)["runtime folder"].level == "ok"
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert _examine(port, tmp_path)["runtime folder"].level == "problem"


def test_doctor_on_shared_memory(port, tmp_path):
    """It is tried for real, nothing is left behind, and why there is none is said."""
    place = tmp_path / "not" / "there"
    assert _examine(port, tmp_path, arena_dir=place)["shared memory"].level == "ok"
    assert not (tmp_path / "not").exists()
    small = _examine(port, tmp_path, arena_dir=tmp_path, arena_mb=1)["shared memory"]
    assert small.level == "warning"
    assert "by TCP" in small.found
    assert not list(tmp_path.glob("luna-daemon*"))
    assert "switched off" in _examine(port, tmp_path, arena=False)["shared memory"].found


def test_doctor_leaves_the_arena_of_a_running_daemon_alone(port, tmp_path):
    """The folder that a daemon on this port would use is not touched."""
    theirs = tmp_path / f"luna-daemon-{port}"
    theirs.mkdir()
    (theirs / "nonce").write_text("x")
    _examine(port, tmp_path, arena_dir=tmp_path)
    assert (theirs / "nonce").read_text() == "x"


def test_doctor_as_a_command(run, port, tmp_path):
    """JSON and text say the same; the exit code is 1 exactly if there is a problem."""
    argv = ["doctor", "--port", str(port), "--runtime-dir", str(tmp_path / "run")]
    code, out, _ = run(*argv, "--json")
    document = json.loads(out)
    assert code == min(1, document["problems"])
    assert {check["level"] for check in document["checks"]} <= {"ok", "warning", "problem"}
    assert {"Python", "torch", "daemon", "shared memory"} <= {check["name"] for check in document["checks"]}
    code, out, _ = run(*argv, "--host", "203.0.113.9")
    assert code == 1
    assert "Choose another host or port" in " ".join(out.split())
    assert "\x1b" not in out


@pytest.mark.parametrize("module", ["commands.cli", "client", "config", "daemon_server", "commands.doctor"])
def test_torch_is_not_imported(module):
    """Importing what the control process and the command need does not import torch."""
    code = f"import sys, luna_daemon.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
