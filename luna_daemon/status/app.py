"""The HTTP application: status page, WebSocket, ``info``, metrics, health, and calls that need the token.

Reading needs no token. To keep foreign web pages from reading or calling through a browser, every request must name
this server in its ``Host`` header (else a foreign domain could resolve to 127.0.0.1), and the ``Origin`` header of
WebSockets and calls, if present, must be allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
from aiohttp import web

from ..control.state import State
from ..core import (
    AuthenticationError,
    BadRequest,
    Busy,
    DaemonConnectionError,
    DeadlineExceeded,
    LunaError,
    ModelError,
    ModelNotFound,
    OutOfMemory,
    RequestCancelled,
    ShuttingDown,
    WorkerCrashed,
)
from ..wire import messages as m
from .inside import InsideCaller
from .metrics import render
from .watchers import Watchers

_BODY_BYTES = 64 << 10
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_COMFYUI_PORT = 8188
_TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".json": "application/json",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".woff2": "font/woff2",
    ".md": "text/markdown; charset=utf-8",
}  # fmt: skip
"""Content types by suffix; ``mimetypes`` reads Windows' registry, where ``.js`` may be text/plain."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STATUS: tuple[tuple[type[LunaError], int], ...] = (
    (AuthenticationError, 401), (BadRequest, 400), (ModelNotFound, 404), (ModelError, 409), (Busy, 503),
    (ShuttingDown, 503), (DaemonConnectionError, 503), (DeadlineExceeded, 504), (RequestCancelled, 409),
    (OutOfMemory, 507), (WorkerCrashed, 503),
)  # fmt: skip
"""HTTP status by error class: the first match counts; other errors are 500."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    state: State,
    watchers: Watchers,
    info: Callable[[], dict[str, Any]],
    address: Callable[[], tuple[str, int]],
    on_request: Callable[[Any], None],
) -> web.Application:
    """Build the application.

    Args:
        info: makes the public ``info`` document.
        address: returns the host and port that the server listens on.
        on_request: called with the connection of each request.
    """
    handlers = _Handlers(state, watchers, info)
    guard = _Guard(address, state.settings.allowed_origins, on_request)
    app = web.Application(middlewares=[guard.check], client_max_size=_BODY_BYTES)
    app.router.add_get("/", handlers.front)
    app.router.add_get("/ws", handlers.socket)
    app.router.add_get("/web/{path:.*}", handlers.file)
    app.router.add_get("/api/info", handlers.info)
    app.router.add_post("/api/call", handlers.call)
    app.router.add_get("/metrics", handlers.metrics)
    app.router.add_get("/healthz", handlers.health)
    app.router.add_get("/readyz", handlers.ready)
    return app


class _Guard:
    """Checks the ``Host`` and ``Origin`` headers of requests."""

    def __init__(
        self, address: Callable[[], tuple[str, int]], allowed: list[str], on_request: Callable[[Any], None]
    ) -> None:
        self._address = address
        self._on_request = on_request
        self._allowed = {
            *allowed, *(f"{s}://{host}:{_COMFYUI_PORT}" for host in _LOOPBACK for s in ("http", "https"))
        }  # fmt: skip
        self._named = {urlsplit(origin).netloc for origin in allowed}

    @property
    def check(self) -> Any:
        """The middleware."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._on_request(request.protocol)
            why = self._objection(request)
            response = web.Response(status=403, text=f"{why}\n") if why else await handler(request)
            if not response.prepared:
                for name, value in _HEADERS.items():
                    response.headers.setdefault(name, value)
            return response

        return check

    def _objection(self, request: web.Request) -> str:
        """Why the request is refused; empty if it is accepted."""
        if not self._names_this_server(request):
            return f"{request.host} is not the name of this server: use 127.0.0.1 and its port"
        origin = request.headers.get("Origin")
        is_read = request.method in ("GET", "HEAD") and not _is_upgrade(request)
        if origin is not None and not is_read and not self._is_allowed(request, origin):
            return f"pages of {origin} may not do this: see the setting allowed_origins"
        return ""

    def _names_this_server(self, request: web.Request) -> bool:
        """Whether ``Host`` is a name or address of this server."""
        host, port = self._address()
        name = request.host.lower()
        names = {f"{own}:{port}" for own in (*_LOOPBACK, f"[{host}]" if ":" in host else host.lower())}
        return name in names or name in self._named or _is_own_address(request, name, port)

    def _is_allowed(self, request: web.Request, origin: str) -> bool:
        """Whether pages of this origin may open the WebSocket or call: this server's, ComfyUI's, allowed_origins."""
        return origin.lower() in self._allowed or urlsplit(origin.lower()).netloc == request.host.lower()


def _is_own_address(request: web.Request, name: str, port: int) -> bool:
    """Whether ``Host`` is the IP address that the request arrived at, and so not a foreign domain."""
    arrived = request.transport.get_extra_info("sockname") if request.transport is not None else None
    host, _, named_port = name.rpartition(":")
    try:
        return arrived is not None and named_port == str(port) and _address(host.strip("[]")) == _address(arrived[0])
    except ValueError:
        return False


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text.partition("%")[0])


def _is_upgrade(request: web.Request) -> bool:
    return request.headers.get("Upgrade", "").lower() == "websocket"


class _Handlers:
    """One method per route."""

    def __init__(self, state: State, watchers: Watchers, info: Callable[[], dict[str, Any]]) -> None:
        self._state = state
        self._watchers = watchers
        self._info = info
        self._web = _web_folder()

    async def front(self, request: web.Request) -> web.StreamResponse:
        """Serve the page, or the WebSocket: the predecessor's panel connects here."""
        if _is_upgrade(request):
            return await self._watchers.serve(request)
        index = self._web / "index.html"
        if not index.is_file():
            raise web.HTTPFound("/api/info")
        return _served(index)

    async def socket(self, request: web.Request) -> web.StreamResponse:
        """Serve a WebSocket until it ends."""
        if not _is_upgrade(request):
            return web.Response(status=426, text="open this address as a WebSocket\n", headers={"Upgrade": "websocket"})
        return await self._watchers.serve(request)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """Serve a file of the page, and nothing outside the page's folder."""
        root = self._web.resolve()
        try:
            path = (root / unquote(request.match_info["path"])).resolve()
            is_served = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError):
            is_served = False
        if not is_served:
            return web.Response(status=404, text="file not found\n")
        return _served(path)

    async def info(self, request: web.Request) -> web.StreamResponse:
        """Serve the public ``info`` document."""
        return web.json_response(self._info())

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Serve the metrics in the format of the ``Accept`` header."""
        text, kind = await render(self._state, self._watchers, request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": kind})

    async def health(self, request: web.Request) -> web.StreamResponse:
        """Answer 200 while the process runs."""
        return web.Response(text="ok\n")

    async def ready(self, request: web.Request) -> web.StreamResponse:
        """Answer 200 if the daemon accepts requests, 503 while draining."""
        accepting = self._state.pool.accepting
        return web.Response(text="ready\n" if accepting else "draining\n", status=200 if accepting else 503)

    async def call(self, request: web.Request) -> web.StreamResponse:
        """Run a call of the protocol, if the request has the token."""
        try:
            self._state.access.check(_bearer(request))
            if request.content_type != "application/json":
                raise BadRequest(f"content type {request.content_type!r}", "Send application/json")
            answer = await InsideCaller(self._state, "status page").call(_decode(await request.read()))
            return web.json_response({"result": answer.result, "notes": answer.notes})
        except web.HTTPRequestEntityTooLarge:
            return _refusal(BadRequest(f"a body of more than {_BODY_BYTES} bytes", "Send less"))
        except LunaError as error:
            return _refusal(error)


def _bearer(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class _Op(msgspec.Struct):
    op: str


def _decode(body: bytes) -> m.Call:
    """Decode a call, and check that HTTP may carry its op.

    Raises:
        BadRequest: the body is not such a call; the message says why.
    """
    try:
        op = msgspec.json.decode(body, type=_Op).op
        if op not in m.PAGE_OPS:
            raise BadRequest(f"op {op!r} is not available by HTTP", f"Use one of {', '.join(sorted(m.PAGE_OPS))}")
        call: m.Call = msgspec.json.decode(body, type=m.Call)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the call cannot be read: {error}", "See docs/protocol.md for the ops' fields") from error
    return call


def _refusal(error: LunaError) -> web.Response:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    body = {"error": error.code, "message": error.message, "hint": error.hint}
    return web.json_response(body, status=status, headers=headers)


def _web_folder() -> Path:
    """Folder of the page's files: in an installed package, or beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    return package / "web" if (package / "web").is_dir() else package.parent / "web"


def _served(path: Path) -> web.FileResponse:
    kind = _TYPES.get(path.suffix.lower(), "application/octet-stream")
    return web.FileResponse(path, headers={"Content-Type": kind})
