"""The luna-daemon command as real processes: start, ask, stop, and what is left afterwards (nothing)."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from luna_daemon import __version__
from luna_daemon.client import DaemonClient
from luna_daemon.core import LunaError
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import default_folder

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "luna_daemon" / "daemon_server.py"
DEMO_VAE = ROOT / "demo" / "model" / "luna_demo_vae.safetensors"
CLI = [sys.executable, "-m", "luna_daemon"]
SHARED = Path("/dev/shm")
posix = pytest.mark.skipif(os.name != "posix", reason="SIGTERM is POSIX")


def _free_port() -> int:
    """A port from 20000 on that nobody listens on."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@dataclass
class Served:
    """A daemon that was started by a command line of the test's."""

    process: subprocess.Popen[str]
    port: int
    runtime_dir: Path
    log: Path
    family: list[psutil.Process] = field(default_factory=list)

    def client(self) -> DaemonClient:
        return DaemonClient("127.0.0.1", self.port, runtime_dir=self.runtime_dir)

    def arena(self) -> Path:
        return default_folder(self.port)

    def remember_family(self) -> None:
        """Take down its processes, so that they can be looked for after it has ended."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def assert_nothing_is_left(self) -> None:
        """No process, no runtime folder or lock, no shared memory."""
        _, alive = psutil.wait_procs(self.family, timeout=5)
        assert not alive
        assert [path.name for path in self.runtime_dir.iterdir()] == []
        assert not self.arena().exists()


class Terminal:
    """Runs commands as a user would, with one daemon's port and runtime folder; knows what to clean up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime_dir = folder / "run"
        self.runtime_dir.mkdir()
        self.port, self.ws_port = _free_port(), _free_port()
        self.served: list[Served] = []
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LUNA_", "COMFYUI_"))}
        self.environ = {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def where(self) -> list[str]:
        return ["--port", str(self.port), "--runtime-dir", str(self.runtime_dir)]

    def ask(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            [*CLI, argv[0], *self.where(), *argv[1:]], cwd=self.folder, env=self.environ, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip

    def serve(self, *argv: str, how: list[str] | None = None) -> Served:
        """A daemon that answers."""
        log = self.folder / f"serve-{len(self.served)}.log"
        line = [*(how or [*CLI, "serve"]), *self.where(), "--ws-port", str(self.ws_port), *argv]
        with log.open("w") as output:
            process = subprocess.Popen(
                line, cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, text=True,
            )  # fmt: skip
        served = Served(process, self.port, self.runtime_dir, log)
        self.served.append(served)
        end = time.monotonic() + 20
        while not self._answers(served):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        return served

    @staticmethod
    def _answers(served: Served) -> bool:
        try:
            with served.client() as client:
                client.ping()
        except LunaError:
            return False
        return True

    def close(self) -> None:
        """End what still runs: first with a signal that it obeys, then by force."""
        for served in self.served:
            if served.process.poll() is None:
                served.remember_family()
                served.process.terminate()
                try:
                    served.process.wait(15)
                except subprocess.TimeoutExpired:
                    served.process.kill()
                    served.process.wait()
            for process in served.family:
                if process.is_running():
                    process.kill()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A terminal in an empty folder; whatever was started in it is ended."""
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def test_serve_status_models_stop(terminal: Terminal) -> None:
    """The whole life: started, asked in words and in JSON, stopped, gone."""
    served = terminal.serve()
    words = terminal.ask("status")
    assert (words.returncode, words.stderr) == (0, "")
    assert words.stdout.startswith(f"Luna Daemon {__version__} is running on 127.0.0.1:{served.port} (pid ")
    assert "\x1b" not in words.stdout

    status = json.loads(terminal.ask("status", "--json").stdout)
    assert (status["pid"], status["status"]) == (served.process.pid, "running")
    assert isinstance(status["requests"]["ping"], int)
    assert status["transport_why"]

    assert "models/vae/sdxl_vae.safetensors" in terminal.ask("models").stdout
    models = json.loads(terminal.ask("models", "--json").stdout)
    assert models["named"]["sdxl"]["vae"] == ["models/vae/sdxl_vae.safetensors"]

    stopped = terminal.ask("stop")
    assert stopped.returncode == 0
    assert stopped.stdout.startswith(f"Luna Daemon (pid {served.process.pid}) has stopped")
    assert served.process.wait(10) == 0
    served.assert_nothing_is_left()

    assert terminal.ask("status").returncode == 1
    assert json.loads(terminal.ask("status", "--json").stdout)["status"] == "stopped"
    assert terminal.ask("stop").returncode == 1


def test_status_page_is_where_status_says(terminal: Terminal) -> None:
    """The address comes from the daemon and is no dead end; another port that does not answer is said to."""
    served = terminal.serve()
    end = time.monotonic() + 10
    while "none: its port is taken" in (said := terminal.ask("status").stdout):
        assert time.monotonic() < end
    address = f"http://127.0.0.1:{terminal.ws_port}/"
    assert re.search(rf"^status page +{re.escape(address)} *$", said, re.MULTILINE)
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.status == 200 and b"<title>Luna Daemon</title>" in answer.read()
    with urllib.request.urlopen(f"{address}api/info", timeout=10) as answer:
        assert json.loads(answer.read())["pid"] == served.process.pid
    other = terminal.ask("status", "--ws-port", str(_free_port())).stdout
    assert "does not answer" in other


def test_token_is_what_the_status_page_asks_for(terminal: Terminal) -> None:
    """One line, with which a call is let in."""
    terminal.serve()
    shown = terminal.ask("token")
    assert (shown.returncode, shown.stderr) == (0, "") and len(shown.stdout.splitlines()) == 1
    headers = {"Authorization": f"Bearer {shown.stdout.strip()}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{terminal.ws_port}/api/call", json.dumps({"op": "models.unload"}).encode(), headers
    )
    end = time.monotonic() + 10
    while not terminal_page_answers(terminal):
        assert time.monotonic() < end
        time.sleep(0.05)
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert json.load(answer)["result"] == {"unloaded": 0}


def terminal_page_answers(terminal: Terminal) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{terminal.ws_port}/healthz", timeout=1).status == 200
    except OSError:
        return False


def test_no_status_page_where_its_port_is_taken(terminal: Terminal) -> None:
    """The daemon serves all the same; status shows no address that would be somebody else's."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        terminal.ws_port = other.getsockname()[1]
        served = terminal.serve()
        end = time.monotonic() + 10
        while "no status page" not in served.log.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        said = terminal.ask("status").stdout
    assert "none: its port is taken" in said
    assert "http://" not in said


def test_warm_names_what_is_missing_and_unload_counts(terminal: Terminal) -> None:
    """A model whose files are missing, and a name nobody gave, are errors in words and in JSON."""
    served = terminal.serve()
    missing = terminal.ask("warm", "sdxl", "--kind", "vae")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "sdxl_vae.safetensors" in missing.stderr
    unknown = terminal.ask("warm", "nobody", "--json")
    assert unknown.returncode == 1
    assert json.loads(unknown.stdout)["error"] == "model_not_found"
    assert "Names: sdxl" in unknown.stderr
    assert terminal.ask("warm", "sdxl", "--kind", "unet").returncode == 2
    assert terminal.ask("unload").stdout == "unloaded 0 models\n"
    with served.client() as client:
        client.call(m.Echo())
    assert json.loads(terminal.ask("unload", "--json").stdout) == {"unloaded": 1}


def test_warm_loads_and_pins(terminal: Terminal) -> None:
    """warm loads what the name has, prints its properties, and models shows it loaded and pinned."""
    config = terminal.folder / "luna.toml"
    config.write_text(f"model_type = 'demo'\nvae_path = '{DEMO_VAE}'\nclip_l_path = ''\nclip_g_path = ''\n")
    terminal.serve()
    done = terminal.ask("warm", "demo", "--pin", "--json")
    warmed = json.loads(done.stdout)
    assert (done.stderr, warmed["pinned"], list(warmed["loaded"])) == ("", True, ["vae"])
    assert warmed["loaded"]["vae"]["latent_channels"] == 16
    models = json.loads(terminal.ask("models", "--json").stdout)
    assert models["pinned"] == list(models["loaded"])
    words = terminal.ask("warm", "DEMO").stdout
    assert words.startswith("DEMO (vae) is loaded\n")  # it is pinned still
    assert "latent_channels" in words
    assert terminal.ask("unload", "demo").stdout == "unloaded 1 model\n"
    words = terminal.ask("warm", "demo").stdout
    assert words.startswith("demo (vae) is loaded until it has been idle for 30 s; --pin keeps it\n")
    assert terminal.ask("warm", "demo", "--pin").stdout.startswith("demo (vae) is loaded and pinned\n")


def test_stop_lets_running_requests_finish(terminal: Terminal) -> None:
    """stop waits for a request that runs, and gives up, saying so, after its timeout."""
    served = terminal.serve()
    slow = subprocess.Popen(
        [
            sys.executable, "-c",
            "from luna_daemon.client import DaemonClient; from luna_daemon.wire.messages import Echo; "
            f"DaemonClient('127.0.0.1', {served.port}, runtime_dir={str(served.runtime_dir)!r})"
            ".call(Echo(0, seconds=8.0)); print('answered')",
        ],
        cwd=terminal.folder, env=terminal.environ, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with served.client() as client:
            while not any(worker["state"] == "busy" for worker in client.get_daemon_info()["workers"]):
                assert slow.poll() is None
                time.sleep(0.02)
        served.remember_family()
        hasty = terminal.ask("stop", "--timeout", "0.2", "--json")
        assert (hasty.returncode, json.loads(hasty.stdout)["status"]) == (1, "draining")
        again = terminal.ask("status")
        assert again.returncode == 1
        assert f"(pid {served.process.pid}) does not answer" in again.stderr
        assert slow.communicate(timeout=40)[0] == "answered\n"
        assert served.process.wait(10) == 0
        served.assert_nothing_is_left()
    finally:
        slow.kill()
        slow.communicate()


def test_port_in_use_ends_with_3_and_names_the_process(terminal: Terminal) -> None:
    """A second daemon, and a port that another program holds: one line that says who to look for."""
    served = terminal.serve()
    second = terminal.ask("serve")
    assert (second.returncode, second.stdout) == (3, "")
    assert f"another Luna Daemon of this user (pid {served.process.pid})" in second.stderr
    assert served.process.poll() is None
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        third = terminal.ask("serve", "--port", str(other.getsockname()[1]))
    assert third.returncode == 3
    assert f"(pid {os.getpid()})" in third.stderr
    assert len(third.stderr.splitlines()) == 1


def test_bad_setting_ends_with_2_and_opens_nothing(terminal: Terminal) -> None:
    """The line names setting, value and what is allowed; no folder was made."""
    for argv, words in (
        (["--vae-device", "gpu7"], "setting 'vae_device' is 'gpu7'"),
        (["--backend", "fast"], "must be 'auto', 'comfy' or 'diffusers'"),
        (["--config", "nowhere.toml"], "'nowhere.toml' does not exist"),
    ):
        done = terminal.ask("serve", *argv)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("luna-daemon: ")
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not list(terminal.runtime_dir.iterdir())


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_0_and_leave_nothing(terminal: Terminal, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C drain: exit code 0, and no process, runtime folder or shared memory is left."""
    served = terminal.serve()
    with served.client() as client:
        client.call(m.Echo(1 << 20))
        assert client.get_daemon_info()["arena"]["folder"] == str(served.arena())
    served.remember_family()
    assert served.family
    assert served.arena().exists()
    served.process.send_signal(number)
    assert served.process.wait(15) == 0
    served.assert_nothing_is_left()
    assert served.log.read_text().rstrip().endswith("stopped")
    assert "Traceback" not in served.log.read_text()


_ISOLATED = [] if sys.version_info < (3, 11) else [["-P", str(SERVER)], ["-P", "-I", str(SERVER)]]


@pytest.mark.parametrize(
    "arguments", [["-m", "luna_daemon.daemon_server"], [str(SERVER)], ["-I", str(SERVER)], *_ISOLATED],
    ids=lambda arguments: "_".join(arguments).replace(str(SERVER), "file"),
)  # fmt: skip
def test_every_way_to_start_from_another_folder(terminal: Terminal, arguments: list[str]) -> None:
    """As a module and as a file, isolated too, from a folder that has nothing to do with it."""
    served = terminal.serve(how=[sys.executable, *arguments])
    with served.client() as client:
        assert client.get_daemon_info()["pid"] == served.process.pid
        client.call(m.Echo())  # workers are found as well
    assert terminal.ask("stop").returncode == 0
    assert "Traceback" not in served.log.read_text()


@pytest.mark.parametrize(("path", "words"), [("", "Commands:"), ("server.py", "--service-type")])
@pytest.mark.parametrize("flags", [[], ["-I"]], ids=["plain", "isolated"])
def test_the_folder_and_the_old_server_file_are_commands_too(
    terminal: Terminal, path: str, words: str, flags: list[str]
) -> None:
    """``python luna_daemon`` and ``python luna_daemon/server.py`` from any folder, without the package installed."""
    environ = {name: value for name, value in terminal.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *flags, str(ROOT / "luna_daemon" / path), "--help"], cwd=terminal.folder, env=environ,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: luna-daemon")
    assert words in done.stdout


def test_serve_and_its_commands_read_the_same_file(terminal: Terminal) -> None:
    """--config carries port and runtime folder for serve, status and stop alike."""
    config = terminal.folder / "mine.toml"
    ports = f"port = {terminal.port}\nws_port = {terminal.ws_port}\n"
    config.write_text(f"{ports}runtime_dir = '{terminal.runtime_dir}'\n")
    terminal.where = lambda: ["--config", str(config)]  # type: ignore[method-assign]
    served = terminal.serve()
    assert json.loads(terminal.ask("status", "--json").stdout)["pid"] == served.process.pid
    assert terminal.ask("stop").returncode == 0


def test_doctor_beside_a_running_daemon(terminal: Terminal) -> None:
    """It knows the daemon's own ports, how it is reached, and leaves its shared memory alone."""
    served = terminal.serve()
    with served.client() as client:
        kept = client.call(m.Echo(1 << 20)).tensors[0]
        kept.fill_(7)
        done = terminal.ask("doctor", "--json", "--ws-port", str(terminal.ws_port))
        checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
        assert f"the running Luna Daemon (pid {served.process.pid})" in checks[f"port {served.port}"]["found"]
        assert "by shared memory" in checks["daemon"]["found"]
        assert served.arena().exists()
        assert bool((kept == 7).all())
        assert client.call(m.Echo(1 << 20)).tensors[0].numel() == 1 << 18
    assert done.stderr == ""


@pytest.mark.parametrize("own", [True, False])
def test_bench(terminal: Terminal, own: bool) -> None:
    """Numbers for every way, with the running daemon or one of its own that is gone afterwards."""
    if not own:
        terminal.serve()
    before = set(SHARED.glob("luna-daemon-*")) if SHARED.is_dir() else set()
    done = terminal.ask("bench", "--rounds", "3", "--json")
    numbers = json.loads(done.stdout)
    assert (done.returncode, numbers["own_daemon"]) == (0, own)
    assert 0 < numbers["ping_p50_ms"] <= numbers["ping_p99_ms"]
    assert numbers["tcp_over_copy"] == pytest.approx(numbers["tcp_ms"] / numbers["memory_copy_ms"])
    if numbers["transport"] == "shared memory":
        assert numbers["shared_memory_ms"] > 0
    left = set(SHARED.glob("luna-daemon-*")) - before if SHARED.is_dir() else set()
    assert not [folder for folder in left if own and _is_ours(folder)]


def _is_ours(folder: Path) -> bool:
    """Whether nobody listens on the port that the folder is named after, so that it was left over."""
    port = folder.name.rpartition("-")[2]
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) != 0


@pytest.mark.parametrize("command", [["models"], ["doctor"], ["bench", "--rounds", "1"]])
def test_words_are_plain_when_piped(terminal: Terminal, command: list[str]) -> None:
    """No colour codes, no progress bar, no line wider than 80 columns, nothing on stderr."""
    terminal.serve()
    done = terminal.ask(*command)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
