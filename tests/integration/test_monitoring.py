"""The status page of a real daemon under real load: what it says, to whom, and that watching never harms the daemon."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

from luna_daemon.core import LunaError, ModelNotFound
from luna_daemon.wire import messages as m
from tests.integration.helpers import DEMO_TOML, Background, is_busy, ping_beside
from tests.waiting import wait_until, within

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a most secret prompt"


@pytest.fixture(scope="module")
def daemon(start_module_daemon):
    """A daemon that has decoded, failed, kept a LoRA and met a prompt and a path that are nobody's business."""
    daemon = start_module_daemon(
        toml=DEMO_TOML, allowed_origins="https://pictures.example", host="127.0.0.1", max_watchers=8
    )
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    client = daemon.client(name="painter")
    for _ in range(3):
        client.vae_decode(torch.zeros(1, 16, 8, 8), vae_type="demo")
    for call in (m.ClipEncode(m.ModelRef("clip", "nothing"), PROMPT), m.Echo(-4)):
        with pytest.raises(LunaError):
            client.call(call)
    with pytest.raises(ModelNotFound):
        client.warm(m.ModelRef("vae", files=(m.FileId("/home/somebody/private folder/model.safetensors"),)))
    client.lora_cache_put("styles/ink", {"a": torch.zeros(1000)})
    client.lora_cache_put("/home/somebody/loras/oil.safetensors", {"a": torch.zeros(1000)})
    client.lora_cache_get("styles/ink")
    client.report(fallbacks=2, materialised=1)
    return daemon


def ask(daemon, path: str, method: str = "GET", **options: Any) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one request over HTTP."""

    async def go() -> tuple[int, dict[str, str], str]:
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{daemon.ws_port}{path}"
            async with session.request(method, url, allow_redirects=False, **options) as answer:
                return answer.status, dict(answer.headers), await answer.text()

    return asyncio.run(go())


def token(daemon) -> str:
    return (daemon.runtime_dir / str(daemon.port) / "token").read_text()


def order(daemon, call: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """``POST /api/call`` with the token; ``headers`` replace what is sent by default."""
    given = {"Authorization": f"Bearer {token(daemon)}", "Content-Type": "application/json", **headers}
    body = call if isinstance(call, (str, bytes)) else json.dumps(call)
    status, _, text = ask(daemon, "/api/call", "POST", data=body, headers=given)
    return status, json.loads(text)


def samples(daemon) -> dict[str, float]:
    """Every sample of ``/metrics`` by its name and labels."""
    status, headers, text = ask(daemon, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}" if sample.labels else sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@asynccontextmanager
async def watcher(daemon, path: str = "/ws", **options: Any):
    """An open WebSocket."""
    url = f"http://127.0.0.1:{daemon.ws_port}{path}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, **options) as websocket:
        yield websocket


async def until(websocket: Any, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 15.0) -> dict[str, Any]:
    """The first message for which ``holds``."""
    end = time.monotonic() + timeout_s
    while True:
        message = await websocket.receive_json(timeout=end - time.monotonic())
        assert message["v"] == 1
        if holds(message):
            return message


# --- what it says ---


def test_the_document_has_the_figures_of_the_socket(daemon):
    """``/api/info`` has every key of ``info`` and the same counts."""
    status, headers, text = ask(daemon, "/api/info")
    said, known = json.loads(text), daemon.info()
    assert status == 200 and headers["Content-Type"].startswith("application/json")
    assert said.keys() == known.keys() - {"transport", "transport_why"}
    for name in ("pid", "errors", "crashes", "fallbacks", "materialised", "limits", "models", "retries"):
        assert said[name] == known[name], name
    assert said["requests"]["vae.decode"] == 3 and (said["fallbacks"], said["materialised"]) == (2, 1)
    assert said["latency"]["vae.decode"]["count"] == 3
    assert 0 < said["latency"]["vae.decode"]["p50_ms"] <= said["latency"]["vae.decode"]["p95_ms"]
    (worker,) = said["workers"]
    assert (worker["crashes"], worker["restarts"], worker["last_error"]) == (0, 0, "")
    assert {"worker_started", "worker_ready", "model_loaded"} <= {event["event"] for event in said["scaling"]}


def test_nothing_private_is_open(daemon):
    """No prompt, no token, and no folder: neither of the machine, nor one that a client named."""

    async def hear() -> str:
        async with watcher(daemon) as websocket:
            return (await websocket.receive()).data

    texts = [ask(daemon, path)[2] for path in ("/api/info", "/metrics")] + [asyncio.run(hear())]
    folders = [str(daemon.arena_dir), str(daemon.runtime_dir), str(ROOT), "/home/somebody", "private folder"]
    for text in texts:
        assert "oil.safetensors" in text  # the name is there
        assert [word for word in (PROMPT, token(daemon), *folders) if word in text] == []
    assert str(daemon.arena_dir) in daemon.info()["arena"]["folder"]


def test_throughput_counts_the_last_ten_seconds(start_daemon):
    """Twenty requests are two per second; looking at the daemon is none."""
    daemon = start_daemon()
    client = daemon.client(use_arena=False)
    client.call(m.Echo())  # starts a worker
    begun = daemon.info()["throughput_per_s"]
    for _ in range(20):
        client.ping()
        client.call(m.Echo())
    assert (begun, daemon.info()["throughput_per_s"]) == pytest.approx((0.1, 2.1), abs=0.05)


def test_metrics_rise(daemon):
    """Each decode is counted once, with its time; a refused call is counted by its code."""
    name = 'luna_requests_total{"op": "vae.decode", "result": "ok"}'
    timed = 'luna_request_duration_seconds_count{"model": "luna_demo_vae", "op": "vae.decode"}'
    before = samples(daemon)
    client = daemon.client()
    began = time.monotonic()
    for number in range(4):
        client.vae_decode(torch.full((1, 16, 8, 8), float(number)), vae_type="demo")
    took = time.monotonic() - began
    with pytest.raises(LunaError):
        client.call(m.Echo(-4))
    after = samples(daemon)
    assert after[name] - before[name] == 4 and after[timed] - before[timed] == 4
    total = timed.replace("_count", "_sum")
    assert 0 < after[total] - before[total] < took
    refused = 'luna_requests_total{"op": "echo", "result": "bad_request"}'
    assert after[refused] - before[refused] == 1
    assert after["luna_queue_wait_seconds_count"] - before["luna_queue_wait_seconds_count"] == 4
    assert after["luna_process_cpu_seconds_total"] >= before["luna_process_cpu_seconds_total"] > 0
    known = {
        'luna_cache_hits_total{"cache": "lora"}': 1, 'luna_lora_hits_total{"lora": "styles/ink"}': 1,
        'luna_workers{"state": "idle"}': 1, "luna_client_fallbacks_total": 2, "luna_client_materialised_total": 1,
        'luna_scale_events_total{"event": "model_loaded"}': 1, "luna_ready": 1,
    }  # fmt: skip
    assert {name: after.get(name) for name in known} == known
    assert after["luna_process_resident_memory_bytes"] > 10e6


def test_open_metrics_where_asked(daemon):
    """Prometheus asks for OpenMetrics, which ends with a mark."""
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    status, headers, text = ask(daemon, "/metrics", headers=accept)
    assert status == 200 and "openmetrics" in headers["Content-Type"] and text.endswith("# EOF\n")


def test_metric_names_follow_the_rules(daemon):
    """``luna_``, base units, ``_total`` on counters only, and each with its help."""
    families = list(text_string_to_metric_families(ask(daemon, "/metrics")[2]))
    assert len(families) > 30
    for family in families:
        assert re.fullmatch(r"luna_[a-z0-9_]+", family.name) and family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|mb|gb|s|percent)$", family.name), family.name
        names = {sample.name for sample in family.samples}
        assert all(name.endswith("_total") for name in names) == (family.type == "counter") or not names


def test_the_page_about_it_is_complete(daemon):
    """docs/monitoring.md names every figure, every key of the document and of its parts, and no figure of old."""
    page = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
    figures = set(re.findall(r"^# TYPE (\S+) ", ask(daemon, "/metrics")[2], re.MULTILINE))
    assert set(re.findall(r"`(luna_\w+)`", page)) == figures
    said = json.loads(ask(daemon, "/api/info")[2])
    del said["start_id"]  # only for who started it
    parts = [said, said["queue"], said["workers"][0], said["models"], said["arena"], said["clients"][0]]
    keys = {key for part in [*parts, said["caches"]["conditioning"]] for key in part}
    assert [key for key in keys if f"`{key}`" not in page] == []


def test_the_dashboard_asks_for_figures_that_exist(daemon):
    """Every ``luna_*`` name in the Grafana dashboard's expressions is in ``/metrics``."""
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    used = {name for panel in panels for t in panel["targets"] for name in re.findall(r"luna_\w+", t["expr"])}
    text = ask(daemon, "/metrics")[2]
    declared = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        declared |= {f"{name}{part}" for part in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    assert len(used) > 15 and used <= declared, used - declared


def test_health(start_daemon):
    """Alive all along; ready until it drains."""
    daemon = start_daemon()
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    assert ask(daemon, "/healthz")[0] == 200 and ask(daemon, "/readyz")[0] == 200
    status, answer = order(daemon, {"op": "drain"})
    assert status == 200 and answer == {"result": {"in_flight": 0}, "notes": []}
    assert ask(daemon, "/healthz")[0] == 200 and ask(daemon, "/readyz")[0] == 503
    assert json.loads(ask(daemon, "/api/info")[2])["status"] == "draining"
    assert samples(daemon)["luna_ready"] == 0


# --- the WebSocket ---


@pytest.mark.parametrize("path", ["/ws", "/"])
def test_status_every_second_and_when_asked(daemon, path):
    """The first status comes at once, then one per second; ``get_status`` is answered sooner."""

    async def go() -> None:
        async with watcher(daemon, path) as websocket:
            first = await websocket.receive_json(timeout=10)
            assert (first["v"], first["type"], first["data"]["pid"]) == (1, "status", daemon.process.pid)
            began = time.monotonic()
            for _ in range(2):
                await until(websocket, lambda message: message["type"] == "status")
            interval = (time.monotonic() - began) / 2
            assert interval > 0.45
            await websocket.send_str("no json")
            await websocket.send_json(["no object"])
            await websocket.send_json({"type": "of a later version"})
            waits = []
            for _ in range(4):
                began = time.monotonic()
                await websocket.send_json({"type": "get_status"})
                await until(websocket, lambda message: message["type"] == "status")
                waits.append(time.monotonic() - began)
            # The first may have met one that was due; had no other been an answer, they were a second apart.
            assert min(waits[1:]) < interval / 2, (waits, interval)

    asyncio.run(go())


def test_requests_errors_and_scaling_are_told(start_daemon):
    """A watcher sees a worker start, a model load, requests end, a call fail, and a worker die and be replaced."""
    begun = time.time()
    daemon = start_daemon(toml=DEMO_TOML)
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    client = daemon.client()

    async def scaling(websocket: Any, event: str) -> dict[str, Any]:
        message = await until(websocket, lambda said: said["type"] == "scaling" and said["data"]["event"] == event)
        return message["data"]

    async def go() -> None:
        async with watcher(daemon) as websocket:
            work = Background(lambda: client.vae_decode(torch.zeros(1, 16, 8, 8), vae_type="demo"))
            assert (await scaling(websocket, "worker_started"))["worker"] == 1
            assert (await scaling(websocket, "worker_ready"))["seconds"] > 0
            assert (await scaling(websocket, "model_loaded"))["model"] == "luna_demo_vae"
            message = await until(websocket, lambda said: said["type"] == "request" and has_op(said, "vae.decode"))
            (told,) = [one for one in message["data"]["requests"] if one["op"] == "vae.decode"]
            assert (told["model"], told["result"]) == ("luna_demo_vae", "ok") and told["seconds"] > 0
            await asyncio.to_thread(work.value)
            refused = Background(lambda: client.call(m.ClipEncode(m.ModelRef("clip", "nothing"), PROMPT)))
            error = (await until(websocket, lambda said: said["type"] == "error"))["data"]
            assert (error["code"], error["op"], error["worker"]) == ("model_not_found", "clip.encode", None)
            assert "nothing" in error["message"] and PROMPT not in json.dumps(error)
            with pytest.raises(ModelNotFound):
                await asyncio.to_thread(refused.value)
            daemon.workers()[0].kill()
            assert (await scaling(websocket, "worker_crashed"))["worker"] == 1
            again = Background(lambda: client.vae_decode(torch.ones(1, 16, 8, 8), vae_type="demo"))
            assert (await scaling(websocket, "worker_started"))["worker"] == 2
            await asyncio.to_thread(again.value)

    asyncio.run(go())
    (worker,) = daemon.info()["workers"]
    assert (worker["crashes"], worker["restarts"]) == (1, 1) and worker["last_error_at"] > begun
    figures = samples(daemon)
    key = json.dumps({"key": worker["key"]})
    assert figures[f"luna_worker_crashes_total{key}"] == figures[f"luna_worker_restarts_total{key}"] == 1


def has_op(message: dict[str, Any], op: str) -> bool:
    return any(one["op"] == op for one in message["data"]["requests"])


def test_many_requests_are_told_of_in_batches(daemon):
    """At most ten per message; the rest is counted, so that nothing is hidden."""

    async def go() -> None:
        async with watcher(daemon) as websocket:
            client = daemon.client()
            pings = Background(lambda: [client.ping() for _ in range(500)])
            told = left_out = 0
            while told + left_out < 500:
                message = await until(websocket, lambda said: said["type"] == "request")
                assert len(message["data"]["requests"]) <= 10
                told += sum(one["op"] == "ping" for one in message["data"]["requests"])
                left_out += message["data"]["left_out"]
            assert left_out > 0
            await asyncio.to_thread(pings.value)

    asyncio.run(go())


# --- who may ---

REFUSED_HOSTS = ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""]


@pytest.mark.parametrize("host", REFUSED_HOSTS)
def test_foreign_hosts_are_refused(daemon, host):
    """A domain that was pointed at 127.0.0.1 gets one line, whatever it asks for."""
    host = host.format(port=daemon.ws_port)
    for path in ("/", "/api/info", "/metrics", "/healthz", "/web/docs/LunaLoadVAE.md"):
        status, _, text = ask(daemon, path, headers={"Host": host})
        assert status in (400, 403) and text.count("\n") <= 1 and "pid" not in text


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}", "pictures.example"]
)
def test_own_hosts_are_served(daemon, host):
    """Every name of this server."""
    assert ask(daemon, "/api/info", headers={"Host": host.format(port=daemon.ws_port)})[0] == 200


def test_other_addresses_of_the_machine_are_its_own(start_daemon):
    """A daemon for the network is found by the address that a connection arrives at, and by no other name."""
    daemon = start_daemon(host="0.0.0.0")
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    with socket.create_connection(("127.0.0.2", daemon.ws_port), timeout=5) as sock:
        sock.sendall(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.2:{daemon.ws_port}\r\n\r\n".encode())
        assert sock.recv(64).startswith(b"HTTP/1.1 200 ")
    assert ask(daemon, "/healthz", headers={"Host": f"127.0.0.2:{daemon.ws_port}"})[0] == 403


ORIGINS = {
    "http://127.0.0.1:{port}": 200, "http://127.0.0.1:8188": 200, "https://localhost:8188": 200,
    "https://pictures.example": 200, "http://pictures.example": 403, "http://127.0.0.1:8189": 403,
    "http://evil.example": 403, "null": 403, "https://127.0.0.1:{port}.evil.example": 403, "": 403,
}  # fmt: skip


@pytest.mark.parametrize("origin, status", ORIGINS.items())
def test_origins(daemon, origin, status):
    """WebSocket and calls are for our own page, ComfyUI's usual address and those allowed; nobody else may read."""
    origin = origin.format(port=daemon.ws_port)

    async def watch() -> int:
        try:
            async with watcher(daemon, headers={"Origin": origin}):
                return 200
        except aiohttp.WSServerHandshakeError as error:
            return error.status

    assert asyncio.run(watch()) == status
    assert order(daemon, {"op": "models.unload"}, Origin=origin)[0] == status if status == 200 else True
    if status != 200:
        given = {"Authorization": f"Bearer {token(daemon)}", "Content-Type": "application/json", "Origin": origin}
        assert ask(daemon, "/api/call", "POST", data='{"op": "drain"}', headers=given)[0] == 403
    _, headers, _ = ask(daemon, "/api/info", headers={"Origin": origin})
    assert "Access-Control-Allow-Origin" not in headers


def test_calls_need_the_token(daemon):
    """Without it, or with a wrong one: 401, and the text says where it lies."""
    for given in ("", "Bearer", "Bearer wrong", f"Basic {token(daemon)}", token(daemon), "Bearer ünkraut"):
        status, answer = order(daemon, {"op": "drain"}, Authorization=given)
        assert (status, answer["error"]) == (401, "authentication"), given
        assert str(daemon.runtime_dir) in answer["message"] and token(daemon) not in answer["message"]
    assert daemon.info()["status"] == "running"


BAD_ORDERS = {
    "no json": ("{", "cannot be read"),
    "no object": ("[1]", "cannot be read"),
    "not utf-8": (b'{"op": "\xff"}', "cannot be read"),
    "no op": ({}, "op"),
    "unknown op": ({"op": "disk.format"}, "disk.format"),
    "an op that is not for here": ({"op": "shutdown"}, "shutdown"),
    "computing": ({"op": "echo"}, "echo"),
    "wrong type": ({"op": "models.load", "model": "sdxl"}, "model"),
    "missing field": ({"op": "models.load"}, "model"),
    "kind": ({"op": "models.load", "model": {"kind": "unet", "name": "x"}}, "unet"),
    "too long": (json.dumps({"op": "models.unload", "model": "x" * 70_000}), "65536"),
}


@pytest.mark.parametrize("call, words", BAD_ORDERS.values(), ids=BAD_ORDERS)
def test_bad_calls(daemon, call, words):
    """400 and what is wrong, with the value."""
    status, answer = order(daemon, call)
    assert (status, answer["error"]) == (400, "bad_request") and words in answer["message"], answer


def test_a_form_is_no_call(daemon):
    """What a browser sends for any page without asking first is not taken."""
    status, answer = order(daemon, '{"op": "drain"}', **{"Content-Type": "text/plain"})
    assert status == 400 and "text/plain" in answer["message"]


def test_calls_do_what_they_say(daemon):
    """A model is loaded, pinned and unloaded; what is not there is 404."""
    status, answer = order(daemon, {"op": "models.load", "model": {"kind": "vae", "name": "demo"}, "pin": True})
    assert status == 200 and answer["result"]["latent_channels"] == 16 and answer["notes"] == []
    assert len(daemon.info()["models"]["pinned"]) == 1
    status, answer = order(daemon, {"op": "models.unload", "model": {"kind": "vae", "name": "demo"}})
    assert status == 200 and answer["result"] == {"unloaded": 1}
    assert daemon.info()["models"]["pinned"] == []
    status, answer = order(daemon, {"op": "models.load", "model": {"kind": "vae", "name": "nothing"}})
    assert (status, answer["error"]) == (404, "model_not_found") and "demo" in answer["hint"]
    assert all(client["name"] != "status page" for client in daemon.info()["clients"])


def test_loras_are_warmed_pinned_and_evicted(start_daemon, tmp_path):
    """The buttons of the LoRA table; its figures follow, without the file's folder."""
    (tmp_path / "loras").mkdir()
    save_file({"a.lora_up.weight": torch.ones(8, 8)}, tmp_path / "loras" / "ink.safetensors")
    daemon = start_daemon(model_dirs=tmp_path)
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    status, answer = order(daemon, {"op": "lora.warm", "name": "ink.safetensors"})
    assert status == 200 and answer["result"]["bytes"] > 0, answer
    assert order(daemon, {"op": "lora.pin", "name": "ink.safetensors"})[0] == 200
    figures = samples(daemon)
    label = '{"lora": "ink.safetensors"}'
    assert figures[f"luna_lora_pinned{label}"] == 1 and figures[f"luna_lora_misses_total{label}"] == 1
    assert figures[f"luna_lora_load_seconds{label}"] > 0 and figures[f"luna_lora_bytes{label}"] > 0
    text = ask(daemon, "/api/info")[2]
    assert str(tmp_path) not in text and "ink.safetensors" in text
    assert order(daemon, {"op": "lora.evict", "name": "ink.safetensors"})[0] == 200
    assert f"luna_lora_bytes{label}" not in samples(daemon)
    status, answer = order(daemon, {"op": "lora.warm", "name": "nothing.safetensors"})
    assert status == 404 and "nothing.safetensors" in answer["message"]


def test_files_of_the_page_only(daemon):
    """Files come with their type; folders and what is outside do not come."""
    status, headers, _ = ask(daemon, "/web/docs/LunaLoadVAE.md")
    assert status == 200 and headers["Content-Type"] == "text/markdown; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff" and "default-src 'self'" in headers["Content-Security-Policy"]
    for path in ("/web/", "/web/docs", "/web/docs/", "/web/nothing.js", "/web/%00", "/web/" + "x" * 5000):
        assert ask(daemon, path)[0] == 404, path
    for path in (
        "../pyproject.toml",
        "..%2fpyproject.toml",
        "%2e%2e/pyproject.toml",
        "/etc/passwd",
        "..%5cpyproject.toml",
    ):
        with socket.create_connection(("127.0.0.1", daemon.ws_port), timeout=5) as sock:
            sock.sendall(f"GET /web/{path} HTTP/1.1\r\nHost: 127.0.0.1:{daemon.ws_port}\r\n\r\n".encode())
            assert sock.recv(64).startswith(b"HTTP/1.1 404 "), path


# --- nobody is waited for ---


def open_socket(daemon, receive_bytes: int = 0) -> socket.socket:
    """A WebSocket whose user reads nothing of his own accord."""
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(5)
    sock.connect(("127.0.0.1", daemon.ws_port))
    sock.sendall(
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{daemon.ws_port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    return sock


def frame(text: str) -> bytes:
    """A masked text frame, as clients send them."""
    return bytes([0x81, 0x80 | len(text)]) + struct.pack("I", 0) + text.encode()


def assert_as_fast_as(daemon, twin, rounds: int = 200) -> None:
    """The median of a ping is not much more than that of ``twin``, a daemon that is left alone."""
    with daemon.client(use_arena=False) as client, twin.client(use_arena=False) as other:
        mine, alone = (statistics.median(times) * 1000 for times in ping_beside(client, other, rounds))
    assert mine < 5 * alone + 2, f"a ping takes {mine:.2f} ms, and {alone:.2f} ms to a daemon that is left alone"


def test_a_reader_that_never_reads_is_dropped(start_daemon, daemon):
    """It asks without end and takes no answer: it is cut off, while others are told in time."""
    twin, daemon = daemon, start_daemon()
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    with open_socket(daemon, 4096) as sock:
        end = time.monotonic() + 60
        with pytest.raises(OSError):  # cut off: what is sent meets a reset
            while time.monotonic() < end:
                sock.sendall(frame('{"type": "get_status"}') * 50)
                assert_as_fast_as(daemon, twin, 50)
        assert samples(daemon)["luna_watchers_dropped_total"] == 1

    async def hear() -> None:
        async with watcher(daemon) as websocket:
            await until(websocket, lambda message: message["type"] == "status", 3)

    asyncio.run(hear())
    assert samples(daemon)["luna_watchers"] == 0


def test_a_thousand_watchers(start_daemon, daemon):
    """The first 64 are served, the rest refused; the daemon answers its clients as before, and nothing is left over."""
    twin, daemon = daemon, start_daemon()
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    files = open_files(daemon)
    sockets = []
    try:
        for _ in range(1000):
            sockets.append(open_socket(daemon))
        answers = [first_line(sock) for sock in sockets]
        assert answers.count(b"HTTP/1.1 101") == 64 and b"HTTP/1.1 503" in answers
        assert set(answers) <= {b"HTTP/1.1 101", b"HTTP/1.1 503", b""}  # nothing: too many at once
        assert_as_fast_as(daemon, twin)
        assert samples(daemon)["luna_watchers"] == 64
        call = daemon.client().call(m.Echo(4096, 0))
        assert call.tensors[0].numel() == 1024
    finally:
        for sock in sockets:
            sock.close()
    wait_until(
        lambda: not samples(daemon)["luna_watchers"] and open_files(daemon) <= files + 5,
        what=lambda: f"{open_files(daemon)} files are open; {files} were before",
    )


def test_connections_that_ask_for_nothing(start_daemon, daemon):
    """They are hung up on before long, and what is too many at once; the daemon's clients do not notice."""
    twin, daemon = daemon, start_daemon()
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    files = open_files(daemon)
    sockets = [socket.create_connection(("127.0.0.1", daemon.ws_port), timeout=60) for _ in range(700)]
    try:
        assert_as_fast_as(daemon, twin)
        assert open_files(daemon) < files + 530
        assert all(first_line(sock) == b"" for sock in sockets)
        assert ask(daemon, "/healthz")[0] == 200
    finally:
        for sock in sockets:
            sock.close()


def first_line(sock: socket.socket) -> bytes:
    try:
        return sock.recv(12)
    except ConnectionError:
        return b""


def open_files(daemon) -> int:
    import psutil

    process = psutil.Process(daemon.process.pid)
    return process.num_handles() if hasattr(process, "num_handles") else process.num_fds()


def test_watching_while_it_ends(start_daemon):
    """A daemon that ends does not wait for who watches."""
    daemon = start_daemon()
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    with open_socket(daemon), open_socket(daemon, 4096), within(4):
        daemon.stop()


def test_reading_does_not_hold_up_the_daemon(daemon, start_daemon):
    """Pings stay fast beside a page that asks for everything all the time."""
    twin, reads, ended = start_daemon(), [], threading.Event()

    async def read() -> None:
        async with aiohttp.ClientSession() as session:
            while not ended.is_set():
                for path in ("/api/info", "/metrics"):
                    async with session.get(f"http://127.0.0.1:{daemon.ws_port}{path}") as answer:
                        await answer.read()
                        reads.append(answer.status)

    reader = Background(lambda: asyncio.run(read()))
    try:
        wait_until(lambda: reads, what="the page reads")
        assert_as_fast_as(daemon, twin)
        wait_until(lambda: len(reads) > 10, what="the page reads on")
    finally:
        ended.set()
    reader.wait()


# --- the log ---


def test_the_log_as_json_and_in_a_file(start_daemon, tmp_path):
    """Each line is an object, in the file as on stderr; the worker's traceback of a bug is there too."""
    file = tmp_path / "logs" / "daemon.log"
    daemon = start_daemon(toml=DEMO_TOML, log_json="true", log_file=file)
    daemon.client().call(m.Echo())
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert all({"time", "level", "message", "logger"} <= line.keys() for line in lines)
    assert any("worker 1 is ready" in line["message"] for line in lines)
    printed = [json.loads(line) for line in daemon.log.read_text("utf-8").splitlines()]
    first = printed.index(lines[0])  # the daemon goes on logging between the two readings
    assert printed[first : first + len(lines)] == lines


def test_a_busy_worker_is_counted_by_state(start_daemon):
    """While it computes, its state says so."""
    daemon = start_daemon()
    work = Background(lambda: daemon.client().call(m.Echo(0, 1.5)))
    daemon.wait_for(is_busy)
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    figures = samples(daemon)
    states = {state: figures[f'luna_workers{{"state": "{state}"}}'] for state in ("idle", "busy", "loading")}
    assert states["busy"] + states["loading"] == 1 and states["idle"] == 0 and figures["luna_requests_in_flight"] == 1
    work.value()
