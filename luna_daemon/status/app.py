"""The HTTP application: the page and its files, the WebSocket, ``info``, metrics, health; and calls, with the token.

Everybody who reaches the port may read. Browsers are kept from reading, or calling, on behalf of foreign pages: every
request must name this server in its ``Host`` (else a foreign domain could be pointed at 127.0.0.1), and WebSockets and
calls must come from an allowed ``Origin`` where they name one.
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
"""Content types by suffix. The system's registry is not asked: on Windows ``.js`` may be text/plain there."""
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
"""HTTP status by error: the first class that fits; 500 for the rest."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    state: State,
    watchers: Watchers,
    info: Callable[[], dict[str, Any]],
    address: Callable[[], tuple[str, int]],
    has_asked: Callable[[Any], None],
) -> web.Application:
    """Build the application.

    Args:
        info: makes the document that everybody may read about the daemon.
        address: returns the host and port that the server listens on.
        has_asked: called with the connection of each request.
    """
    handlers = _Handlers(state, watchers, info)
    guard = _Guard(address, state.settings.allowed_origins, has_asked)
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
    """Decides which names of this server requests may use, and from which pages they may come."""

    def __init__(
        self, address: Callable[[], tuple[str, int]], allowed: list[str], has_asked: Callable[[Any], None]
    ) -> None:
        self._address = address
        self._has_asked = has_asked
        self._allowed = {
            *allowed, *(f"{s}://{host}:{_COMFYUI_PORT}" for host in _LOOPBACK for s in ("http", "https"))
        }  # fmt: skip
        self._named = {urlsplit(origin).netloc for origin in allowed}

    @property
    def check(self) -> Any:
        """The middleware."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._has_asked(request.protocol)
            why = self._objection(request)
            response = web.Response(status=403, text=f"{why}\n") if why else await handler(request)
            if not response.prepared:
                for name, value in _HEADERS.items():
                    response.headers.setdefault(name, value)
            return response

        return check

    def _objection(self, request: web.Request) -> str:
        """Why the request is refused; empty if it is taken."""
        if not self._is_ours(request):
            return f"{request.host} is not the name of this server: use 127.0.0.1 and its port"
        origin = request.headers.get("Origin")
        reads = request.method in ("GET", "HEAD") and not _is_upgrade(request)
        if origin is not None and not reads and not self._may_ask(request, origin):
            return f"pages of {origin} may not do this: see the setting allowed_origins"
        return ""

    def _is_ours(self, request: web.Request) -> bool:
        """Whether ``Host`` names this server."""
        host, port = self._address()
        name = request.host.lower()
        names = {f"{own}:{port}" for own in (*_LOOPBACK, f"[{host}]" if ":" in host else host.lower())}
        return name in names or name in self._named or _is_own_address(request, name, port)

    def _may_ask(self, request: web.Request, origin: str) -> bool:
        """Whether a page of this origin may open the WebSocket or send a call: this server's, allowed, or ComfyUI's."""
        return origin.lower() in self._allowed or urlsplit(origin.lower()).netloc == request.host.lower()


def _is_own_address(request: web.Request, name: str, port: int) -> bool:
    """Whether ``Host`` is the address that the request arrived at, which no foreign domain can be."""
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
        """Serve the page; for the predecessor's panel, which opens its WebSocket here, the WebSocket."""
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
        """Serve a file of the page: nothing outside its folder, no listing."""
        root = self._web.resolve()
        try:
            path = (root / unquote(request.match_info["path"])).resolve()
            is_served = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError):
            is_served = False
        if not is_served:
            return web.Response(status=404, text="no such file\n")
        return _served(path)

    async def info(self, request: web.Request) -> web.StreamResponse:
        """Serve the document about the daemon."""
        return web.json_response(self._info())

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Serve the metrics in a format that the caller accepts."""
        text, kind = await render(self._state, self._watchers, request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": kind})

    async def health(self, request: web.Request) -> web.StreamResponse:
        """Answer 200 as long as the process lives."""
        return web.Response(text="ok\n")

    async def ready(self, request: web.Request) -> web.StreamResponse:
        """Answer 200 if the daemon takes requests, 503 if it drains."""
        accepting = self._state.pool.accepting
        return web.Response(text="ready\n" if accepting else "draining\n", status=200 if accepting else 503)

    async def call(self, request: web.Request) -> web.StreamResponse:
        """Run a call of the protocol for a caller that shows the token."""
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
    """Decode a call that may come by HTTP, and check its types.

    Raises:
        BadRequest: names what is wrong.
    """
    try:
        op = msgspec.json.decode(body, type=_Op).op
        if op not in m.PAGE_OPS:
            raise BadRequest(f"op {op!r} is not taken by HTTP", f"Use one of {', '.join(sorted(m.PAGE_OPS))}")
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
    """The page's files: in the package where it was installed, beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    return package / "web" if (package / "web").is_dir() else package.parent / "web"


def _served(path: Path) -> web.FileResponse:
    kind = _TYPES.get(path.suffix.lower(), "application/octet-stream")
    return web.FileResponse(path, headers={"Content-Type": kind})
