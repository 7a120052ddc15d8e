"""Who may read and who may call over HTTP: by Host, Origin and token; and what a refusal looks like."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from luna_daemon import monitoring
from luna_daemon.config import load_settings
from luna_daemon.control.access import Access
from luna_daemon.control.state import State
from luna_daemon.core import AuthenticationError, BadRequest, Busy, LunaError, ModelNotFound
from luna_daemon.files.resolver import ModelResolver
from luna_daemon.status.app import _refusal, make_app
from luna_daemon.status.watchers import Watchers
from luna_daemon.wire.shared_memory import SharedMemory
from luna_daemon.workers import WorkerPool

Ask = Callable[..., Coroutine[Any, Any, tuple[int, Any]]]
CALL = '{"op": "models.unload"}'
JSON = {"Content-Type": "application/json"}
TOKEN = {"Authorization": "Bearer token"}


@pytest.fixture
def state(tmp_path) -> State:
    """A daemon that lets one foreign page in."""
    settings = load_settings({"allowed_origins": ["https://pictures.example"]}, {})
    return State(
        settings, WorkerPool(settings, tmp_path), ModelResolver(settings), SharedMemory(None, "off"),
        Access("token", "nowhere", lambda: "another"), lambda state: {}, lambda: None, dict,
    )  # fmt: skip


def served(state: State, questions: Callable[[Ask, int], Coroutine[Any, Any, None]]) -> None:
    """Ask a server of this state; ``ask`` answers with status and text."""

    async def main() -> None:
        asked: list[Any] = []
        watchers = Watchers(lambda: {}, 4)
        port = 0
        app = make_app(state, watchers, lambda: {"version": "1"}, lambda: ("192.0.2.7", port), asked.append)
        async with TestClient(TestServer(app, host="127.0.0.1")) as client:
            port = client.port or 0

            async def ask(method: str, path: str, data: str | None = None, **headers: str) -> tuple[int, Any]:
                names = {name.replace("_", "-"): value for name, value in headers.items()}
                answer = await client.request(method, path, data=data, headers=names, allow_redirects=False)
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                return answer.status, await answer.text()

            await questions(ask, port)
        assert asked

    asyncio.run(main())


def test_hosts_and_origins(state):
    """Its own names, its address and allowed pages; a page that only reads is the browser's to keep from others."""

    async def questions(ask: Ask, port: int) -> None:
        hosts = {
            f"127.0.0.1:{port}": 200, f"LOCALHOST:{port}": 200, f"192.0.2.7:{port}": 200, "pictures.example": 200,
            "127.0.0.1": 403, f"127.0.0.1:{port + 1}": 403, f"evil.example:{port}": 403, "": 403,
        }  # fmt: skip
        for host, status in hosts.items():
            assert (await ask("GET", "/healthz", Host=host))[0] == status, host
        origins = {
            "https://pictures.example": 200, f"http://127.0.0.1:{port}": 200, "http://localhost:8188": 200,
            "https://evil.example": 403, "null": 403, "http://localhost:8189": 403, "http://pictures.example": 403,
        }  # fmt: skip
        for origin, status in origins.items():
            assert (await ask("POST", "/api/call", CALL, Origin=origin, **JSON, **TOKEN))[0] == status, origin
            assert (await ask("GET", "/api/info", Origin=origin))[0] == 200
        assert (await ask("GET", "/ws", Origin="https://evil.example", Upgrade="websocket"))[0] == 403

    served(state, questions)


def test_calls_need_the_token(state):
    """Missing or wrong, in whatever scheme: 401 before the body is looked at."""

    async def questions(ask: Ask, port: int) -> None:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic token"}):
            status, text = await ask("POST", "/api/call", "not JSON", **JSON, **header)
            assert status == 401 and '"authentication"' in text
        status, text = await ask("POST", "/api/call", CALL, **JSON, **TOKEN)
        assert status == 200 and '{"unloaded": 0}' in text
        assert not state.sessions, "the caller's session ends with its call"

    served(state, questions)


@pytest.mark.parametrize(
    ("body", "headers", "text"),
    [
        (CALL, {"Content-Type": "text/plain"}, "application/json"),
        ("{", JSON, "cannot be read"),
        ("\xff", JSON, "cannot be read"),
        ('{"op": "vae.decode"}', JSON, "not available by HTTP"),
        ('{"op": "models.unload", "model": 3}', JSON, "cannot be read"),
        ("x" * (65 << 10), JSON, "more than 65536 bytes"),
    ],
)
def test_bodies_that_are_refused(state, body, headers, text):
    """400 with the reason."""

    async def questions(ask: Ask, port: int) -> None:
        status, answer = await ask("POST", "/api/call", body, **headers, **TOKEN)
        assert status == 400 and text in answer

    served(state, questions)


def test_health_files_and_what_is_no_websocket(state):
    """Alive while it drains; nothing outside the page's folder."""

    async def questions(ask: Ask, port: int) -> None:
        assert (await ask("GET", "/readyz"))[0] == 200
        state.pool.accepting = False
        assert (await ask("GET", "/readyz"))[0] == 503 and (await ask("GET", "/healthz"))[0] == 200
        assert (await ask("GET", "/ws"))[0] == 426
        assert (await ask("GET", "/web/index.html"))[0] == 200
        for path in ("/web/", "/web/nowhere.js", "/web/..%2fpyproject.toml", "/web/%2fetc%2fpasswd", "/web/a%00b"):
            assert (await ask("GET", path))[0] == 404, path

    served(state, questions)


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (AuthenticationError("no"), 401, ("WWW-Authenticate", "Bearer")),
        (BadRequest("no"), 400, None),
        (ModelNotFound("no"), 404, None),
        (Busy("no", "", 2.6), 503, ("Retry-After", "3")),
        (Busy("no", "", 0.1), 503, ("Retry-After", "1")),
        (LunaError("no"), 500, None),
    ],
)
def test_errors_as_http(error, status, header):
    """The status of the nearest class, and the code of the protocol."""
    answer = _refusal(error)
    assert answer.status == status and f'"{error.code}"' in (answer.text or "")
    assert header is None or answer.headers[header[0]] == header[1]


def test_a_tls_handshake_that_never_comes_is_cut_off(state, monkeypatch):
    """Connections in a handshake are not counted yet, so each must end as soon as one without a request."""
    monkeypatch.setattr(monitoring, "_FIRST_REQUEST_S", 0.1)

    async def main() -> None:
        monitor = monitoring.Monitor(state, "127.0.0.1", 0, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        await monitor.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", monitor.port)
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()
        await monitor.stop()

    asyncio.run(main())
