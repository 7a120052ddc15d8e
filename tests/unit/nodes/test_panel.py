"""The panel's routes on a server, with a stand-in for the daemon: who may call what, and what is passed on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from luna_daemon.core import ConfigError

UNLOAD = {"op": "models.unload"}
BUSY = {"error": "busy", "message": "the queue is full"}


class World:
    """ComfyUI's server with the panel, the user's settings, and a daemon that notes the calls."""

    def __init__(self, panel, monkeypatch):
        self.panel, self.monkeypatch, self.settings, self.calls = panel, monkeypatch, {}, []
        self.failure = None

    def ask(self, *requests):
        """Send requests ``(method, path, options)``; the last status and JSON."""
        return asyncio.run(self._ask(requests))

    async def _ask(self, requests):
        async with TestServer(self._daemon()) as daemon:
            self.monkeypatch.setattr(self.panel, "_daemon", lambda: self._address(daemon))
            async with TestClient(TestServer(self._comfyui())) as client:
                for method, path, options in requests:
                    async with client.request(method, path, **options) as answer:
                        status, body = answer.status, await answer.json()
                await asyncio.gather(*self.installed._tasks)
                return status, body

    def _address(self, daemon):
        if self.failure:
            raise self.failure
        return str(daemon.make_url("")).rstrip("/"), "the token", None

    def _daemon(self):
        async def call(request):
            self.calls.append((request.headers["Authorization"], await request.json()))
            return web.json_response(BUSY, status=503)

        async def info(request):
            return web.json_response({"status": "running"})

        app = web.Application()
        app.add_routes([web.post("/api/call", call), web.get("/api/info", info)])
        return app

    def _settings_of(self, request):
        if self.settings is None:
            raise web.HTTPUnauthorized
        return self.settings

    def _comfyui(self):
        async def free(request):
            return web.json_response({})

        routes = web.RouteTableDef()
        routes.post("/free")(free)
        app = web.Application()
        manager = SimpleNamespace(settings=SimpleNamespace(get_settings=self._settings_of))
        self.installed = self.panel.install(SimpleNamespace(routes=routes, app=app, user_manager=manager))
        app.add_routes(routes)
        return app


@pytest.fixture
def world(part, monkeypatch):
    return World(part("panel"), monkeypatch)


def test_a_call_gets_the_token_on_the_way(world):
    """And the daemon's answer comes back with its status."""
    assert world.ask(("POST", "/luna/call", {"json": UNLOAD})) == (503, BUSY)
    assert world.calls == [("Bearer the token", UNLOAD)]
    assert world.ask(("GET", "/luna/info", {})) == (200, {"status": "running"})


@pytest.mark.parametrize(
    ("choice", "header", "allowed"),
    [
        ("local", None, True), ("local", "X-Forwarded-For", False), ("local", "Forwarded", False),
        ("all", "X-Real-IP", True), ("off", None, False), ("unheard of", None, False),
    ],
)  # fmt: skip
def test_the_setting_says_who_may_change_something(world, choice, header, allowed):
    """A proxy on this machine may speak for others."""
    world.settings["Luna.AllowChanges"] = choice
    headers = {header: "10.0.0.7"} if header else {}
    status, body = world.ask(("POST", "/luna/call", {"json": UNLOAD, "headers": headers}))
    assert bool(world.calls) == allowed and (status == 403) != allowed
    assert allowed or "does not let the panel change anything" in body["message"]


@pytest.mark.parametrize(
    "options",
    [{"json": {"op": "shutdown"}}, {"json": ["op"]}, {"json": {"op": ["drain"]}}, {"json": {}}, {"data": b"op"},
     {"data": b"{", "headers": {"Content-Type": "application/json"}}],
)  # fmt: skip
def test_only_the_panels_calls_are_passed_on(world, options):
    """Another op, or a body that is not such a call, is refused with the ops that there are."""
    status, body = world.ask(("POST", "/luna/call", options))
    assert status == 400 and "models.unload" in body["hint"] and not world.calls


@pytest.mark.parametrize(
    ("failure", "words"), [(OSError("refused"), "no Luna Daemon answers"), (ConfigError("a bad port"), "a bad port")]
)
def test_a_daemon_that_cannot_be_reached(world, failure, words):
    """Both routes say why, with 503."""
    world.failure = failure
    for request in (("GET", "/luna/info", {}), ("POST", "/luna/call", {"json": UNLOAD})):
        status, body = world.ask(request)
        assert status == 503 and words in body["message"]


@pytest.mark.parametrize(
    ("forward", "body", "unloads"),
    [
        (True, {"unload_models": True}, 1),
        (True, {"free_memory": True}, 1),
        (True, {}, 0),
        (None, {"free_memory": True}, 0),
    ],
)
def test_freeing_memory_is_forwarded_if_that_is_set(world, caplog, forward, body, unloads):
    """After ComfyUI has answered; a daemon that refuses is a warning."""
    if forward is not None:
        world.settings["Luna.ForwardFreeMemory"] = forward
    assert world.ask(("POST", "/free", {"json": body})) == (200, {})
    assert [call["op"] for _, call in world.calls] == ["models.unload"] * unloads
    assert ("were not unloaded along with ComfyUI's: the queue is full" in caplog.text) == bool(unloads)


def test_a_user_that_comfyui_does_not_know_changes_nothing(world):
    """Neither by a call nor by freeing memory."""
    world.settings = None
    assert world.ask(("POST", "/luna/call", {"json": UNLOAD}))[0] == 403
    assert world.ask(("POST", "/free", {"json": {"free_memory": True}}))[0] == 200 and not world.calls
