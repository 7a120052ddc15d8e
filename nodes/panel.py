"""Proxy for the panel: ``/luna/*`` on ComfyUI's own server, so that the panel works wherever ComfyUI does.

The daemon's token stays on the server. The setting ``Luna.AllowChanges`` says who may change something, and is looked
up for each call. Everybody who reaches a ComfyUI can change that ComfyUI's settings, so the setting guards against
mishaps and curious visitors, not against an attacker who can send requests to ComfyUI.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any

import aiohttp
from aiohttp import web

from luna_daemon.client import get_client
from luna_daemon.config import load_settings
from luna_daemon.core import AuthenticationError, BadRequest, DaemonConnectionError, LunaError, logger
from luna_daemon.system.runtime import find_token, is_loopback, page_address, read_facts
from luna_daemon.wire.dial import tls_towards
from luna_daemon.wire.messages import PAGE_OPS
from luna_daemon.wire.tls import no_handshake

ALLOW, FORWARD = "Luna.AllowChanges", "Luna.ForwardFreeMemory"
LOCAL, ALL, OFF = "local", "all", "off"
_CONNECT_S, _SILENCE_S, _RETRY_S, _CALL_S = 3.0, 5.0, 1.0, 600.0
_MESSAGE_BYTES = 16 << 20
_FREE = ("/free", "/api/free")
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")
_UNREACHABLE = (LunaError, aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)
"""What asking the daemon may raise: no daemon, no connection, or an answer that is not JSON."""


def install(server: Any) -> Panel:
    """Add the routes, and the middleware for ``/free``, before ComfyUI's server starts.

    Args:
        server: ComfyUI's ``PromptServer``.
    """
    panel = Panel(server)
    server.routes.get("/luna/info")(panel.info)
    server.routes.get("/luna/ws")(panel.socket)
    server.routes.post("/luna/call")(panel.call)
    server.app.middlewares.append(panel.middleware())
    return panel


class Panel:
    """Handlers of the routes.

    Args:
        server: ComfyUI's ``PromptServer``.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()

    # --- reading ---

    async def info(self, request: web.Request) -> web.Response:
        """Answer with the daemon's ``info`` as JSON; 503 while no daemon answers."""
        try:
            base, _, tls = _daemon()
            async with _session(tls) as session, session.get(f"{base}/api/info") as answer:
                return web.json_response(await answer.json(), status=answer.status)
        except _UNREACHABLE as error:
            return _refusal(503, _away(error))

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        """Relay the daemon's messages, or ``away`` while no daemon answers. What the browser sends is ignored."""
        browser = web.WebSocketResponse(heartbeat=20.0, max_msg_size=4096)
        await browser.prepare(request)
        feeder = asyncio.get_running_loop().create_task(_feed(browser))
        try:
            async for _ in browser:
                pass
        finally:
            feeder.cancel()
        return browser

    # --- changing ---

    async def call(self, request: web.Request) -> web.Response:
        """Pass one of ``PAGE_OPS`` on with the daemon's token; the answer is that of the daemon's ``/api/call``."""
        if not self._may_change(request):
            text = "this ComfyUI does not let the panel change anything from here"
            return _refusal(403, AuthenticationError(text, "Luna.AllowChanges in ComfyUI's settings says who may"))
        try:
            body = await _call_in(request)
        except BadRequest as error:
            return _refusal(400, error)
        try:
            answer, status = await _ask(body)
        except _UNREACHABLE as error:
            return _refusal(503, _away(error))
        return web.json_response(answer, status=status)

    def _may_change(self, request: web.Request) -> bool:
        choice = self._setting(request, ALLOW, LOCAL)
        return choice == ALL or (choice == LOCAL and _is_local(request))

    def _setting(self, request: web.Request, name: str, default: Any) -> Any:
        """Look up a setting of the requesting user; ``None`` for a user that ComfyUI does not know."""
        try:
            return self._server.user_manager.settings.get_settings(request).get(name, default)
        except web.HTTPException:
            return None

    # --- "free memory" ---

    def middleware(self) -> Any:
        """Make a middleware that acts on ``/free`` after ComfyUI has answered it."""

        @web.middleware
        async def after_free(request: web.Request, handler: Any) -> web.StreamResponse:
            response: web.StreamResponse = await handler(request)
            if request.method == "POST" and request.path in _FREE and response.status == 200:
                await self._forward(request)
            return response

        return after_free

    async def _forward(self, request: web.Request) -> None:
        body = json.loads(await request.text())
        frees = body.get("unload_models") or body.get("free_memory")
        if frees and self._setting(request, FORWARD, False) is True:
            task = asyncio.get_running_loop().create_task(_free())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _call_in(request: web.Request) -> dict[str, Any]:
    """The call in a request's body.

    Raises:
        BadRequest: the body is not JSON, or names no op of the page.
    """
    try:
        body = json.loads(await request.text()) if request.content_type == "application/json" else None
    except ValueError:
        body = None
    op = body.get("op") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(op, str) or op not in PAGE_OPS:
        raise BadRequest(f"op {op!r} is not one of the panel's", f"Use one of {', '.join(sorted(PAGE_OPS))}")
    return body


async def _free() -> None:
    try:
        answer, status = await _ask({"op": "models.unload"})
        why = "" if status == 200 else answer.get("message", "")
    except _UNREACHABLE as error:
        why = str(_away(error))
    if why:
        logger.warning("the daemon's models were not unloaded along with ComfyUI's: %s", why)


async def _feed(browser: web.WebSocketResponse) -> None:
    """Relay the daemon's messages until the browser closes, connecting again when the daemon goes away."""
    while not browser.closed:
        try:
            await _relay(browser)
            why: Exception = DaemonConnectionError("the daemon closed the connection")
        except _UNREACHABLE as error:
            why = error
        try:
            await browser.send_json({"v": 1, "type": "away", "data": {"message": str(_away(why))}})
        except (ConnectionError, RuntimeError):
            return
        await asyncio.sleep(_RETRY_S)


async def _relay(browser: web.WebSocketResponse) -> None:
    base, _, tls = _daemon()
    async with _session(tls) as session:
        daemon = await asyncio.wait_for(session.ws_connect(f"{base}/ws", max_msg_size=_MESSAGE_BYTES), _CONNECT_S)
        async with daemon:
            while (message := await daemon.receive(timeout=_SILENCE_S)).type is aiohttp.WSMsgType.TEXT:
                await browser.send_str(message.data)


async def _ask(body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The daemon's answer to a call, and the answer's HTTP status."""
    base, token, tls = _daemon()
    headers = {"Authorization": f"Bearer {token}"}
    async with _session(tls) as session, session.post(f"{base}/api/call", json=body, headers=headers) as answer:
        return await answer.json(), answer.status


def _session(tls: ssl.SSLContext | None) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(ssl=tls) if tls is not None else None
    timeout = aiohttp.ClientTimeout(total=_CALL_S, sock_connect=_CONNECT_S)
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


def _daemon() -> tuple[str, str, ssl.SSLContext | None]:
    """Address of the daemon's HTTP port, token and TLS context, looked up each time: a restart changes them.

    Raises:
        ConfigError: a setting is wrong.
        AuthenticationError: the token or the certificate cannot be read.
    """
    client = get_client()
    port = read_facts(client.port, client.runtime_dir).get("ws_port") or load_settings().ws_port
    tls = tls_towards(client.port, client.runtime_dir, client.tls_ca)
    base = page_address(tls is not None, client.host, port)
    return base, find_token(client.port, client.runtime_dir), tls


def _away(error: Exception) -> LunaError:
    """Word the reason why the daemon cannot be reached."""
    if isinstance(error, LunaError):
        return error
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return DaemonConnectionError(f"the daemon refuses the panel's WebSocket (HTTP {error.status})")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return no_handshake(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return no_handshake(error.os_error)
    if isinstance(error, asyncio.TimeoutError):
        return DaemonConnectionError("the daemon accepts connections, but does not answer")
    return DaemonConnectionError("no Luna Daemon answers", "Start it with 'luna-daemon serve'")


def _refusal(status: int, error: LunaError) -> web.Response:
    return web.json_response({"error": error.code, "message": error.message, "hint": error.hint}, status=status)


def _is_local(request: web.Request) -> bool:
    """Whether the browser runs on this machine, and no proxy on this machine speaks for another."""
    if any(name in request.headers for name in _FORWARDED):
        return False
    return is_loopback(request.remote or "")
