"""TLS on the socket: who is let in, who is not, and that everything works behind it."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import ssl
import threading
from types import SimpleNamespace

import aiohttp
import psutil
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from luna_daemon.client import DaemonClient
from luna_daemon.core import AuthenticationError, DaemonConnectionError
from luna_daemon.wire import messages as m
from tests.integration.conftest import ROOT
from tests.integration.helpers import DEMO_TOML, make_certificate
from tests.waiting import within

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    return {name: make_certificate(folder, name) for name in ("daemon", "stranger")}


@pytest.fixture(scope="module")
def daemon(start_module_daemon, certificates):
    cert, key = certificates["daemon"]
    return start_module_daemon(toml=DEMO_TOML, tls_cert=cert, tls_key=key)


def stranger(daemon, tmp_path, monkeypatch, **options):
    """A client that has the token, but not the runtime folder: another user, or another machine."""
    token = (daemon.runtime_dir / str(daemon.port) / "token").read_text()
    monkeypatch.setenv("LUNA_TOKEN", token)
    return DaemonClient("127.0.0.1", daemon.port, runtime_dir=tmp_path, **options)


def test_the_page_is_behind_tls_too(daemon, certificates):
    """https and wss with the same certificate; plain http gets nothing."""
    daemon.wait_for(lambda info: info["ws_port"] is not None)
    trust = ssl.create_default_context(cafile=str(certificates["daemon"][0]))

    async def go():
        url = f"//127.0.0.1:{daemon.ws_port}/"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"https:{url}api/info", ssl=trust) as answer:
                assert (await answer.json())["tls"] is True
            own = {"Origin": f"https:{url}"[:-1]}
            async with session.ws_connect(f"wss:{url}ws", ssl=trust, headers=own) as websocket:
                assert (await websocket.receive_json(timeout=20))["type"] == "status"
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http:{url}healthz")

    asyncio.run(go())


@pytest.fixture(scope="module")
def panel():
    """The node pack's panel, without ComfyUI."""
    spec = importlib.util.spec_from_file_location("luna_panel_under_test", ROOT / "nodes" / "panel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask_through(panel, ask):
    """What ``ask`` gets from a server with the panel's routes, whose users changed no setting."""

    async def run():
        settings = SimpleNamespace(get_settings=lambda request: {})
        server = SimpleNamespace(
            routes=web.RouteTableDef(), app=web.Application(), user_manager=SimpleNamespace(settings=settings)
        )
        panel.install(server)
        server.app.add_routes(server.routes)
        async with TestClient(TestServer(server.app)) as browser:
            return await ask(browser)

    return asyncio.run(run())


def test_the_panel_reaches_it_behind_tls(panel, daemon, monkeypatch):
    """ComfyUI's panel reads, watches and calls over https and wss, by the certificate that the runtime folder names."""
    monkeypatch.setattr(panel, "get_client", daemon.client)
    daemon.wait_for(lambda info: info["ws_port"] is not None)

    async def ask(browser):
        async with browser.ws_connect("/luna/ws") as socket:
            told = await socket.receive_json(timeout=20)
        info = await (await browser.get("/luna/info")).json()
        call = await browser.post("/luna/call", json={"op": "models.unload"})
        return told["type"], info["tls"], call.status

    told, tls, status = ask_through(panel, ask)
    assert (told, tls, status) == ("status", True, 200)


def test_the_panel_gives_no_token_to_another_daemon(panel, daemon, certificates, monkeypatch):
    """A certificate that is not the one expected ends it before anything is sent, and the panel says so."""
    monkeypatch.setattr(panel, "get_client", lambda: daemon.client(tls_ca=certificates["stranger"][0]))

    async def ask(browser):
        call = await browser.post("/luna/call", json={"op": "models.unload"})
        return call.status, await call.json()

    status, answer = ask_through(panel, ask)
    assert (status, answer["error"]) == (503, "authentication")
    assert "certificate is not trusted" in answer["message"]


def test_the_panel_says_that_a_daemon_has_no_tls(panel, start_daemon, certificates, monkeypatch):
    """As any client says it, if an authority was named for nothing."""
    plain = start_daemon()
    plain.wait_for(lambda info: info["ws_port"] is not None)
    monkeypatch.setattr(panel, "get_client", lambda: plain.client(tls_ca=certificates["daemon"][0]))

    async def ask(browser):
        answer = await browser.get("/luna/info")
        return answer.status, await answer.json()

    status, answer = ask_through(panel, ask)
    assert (status, answer["error"]) == (503, "connection")
    assert "the TLS handshake failed" in answer["message"] and "LUNA_TLS_CA" in answer["hint"]


@pytest.mark.parametrize("use_arena", [True, False])
def test_calls_work_behind_tls(daemon, use_arena):
    """The same user needs to set nothing; a 12 MB result arrives whole, by shared memory and through TLS."""
    client = daemon.client(use_arena=use_arena)
    pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    latents = client.vae_encode(pixels, "demo")
    assert client.vae_decode(latents, "demo").shape == (1, 64, 64, 3)
    out = client.call(m.Echo(12 << 20)).tensors[0]
    assert out.nbytes == 12 << 20 and torch.equal(out, daemon.client().call(m.Echo(12 << 20)).tensors[0])


def test_what_passes_is_encrypted(daemon, certificates):
    """The bytes on the wire hold neither the token nor the op's name; a relay in the middle looks."""
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as relay:

        def serve():
            near, _ = relay.accept()
            far = socket.create_connection(("127.0.0.1", daemon.port))

            def pump(source, sink):
                while data := source.recv(65536):
                    seen.extend(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

            back = threading.Thread(target=pump, args=(far, near), daemon=True)
            back.start()
            pump(near, far)
            back.join(5)
            near.close()
            far.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        token = (daemon.runtime_dir / str(daemon.port) / "token").read_text()
        port = relay.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LUNA_TOKEN", token)
            with DaemonClient("127.0.0.1", port, tls_ca=certificates["daemon"][0]) as client:
                client.get_daemon_info()
        thread.join(5)
    assert len(seen) > 2000
    assert token.encode() not in seen and b"conditioning" not in seen and b"hello" not in seen


def test_another_user_names_the_authority(daemon, tmp_path, monkeypatch, certificates):
    """LUNA_TLS_CA or tls_ca lets in whoever has the token; the name in the certificate is checked."""
    with stranger(daemon, tmp_path, monkeypatch, tls_ca=certificates["daemon"][0]) as client:
        assert client.ping() > 0
    monkeypatch.setenv("LUNA_TLS_CA", str(certificates["daemon"][0]))
    with stranger(daemon, tmp_path, monkeypatch) as client:
        assert client.ping() > 0


def test_an_impostor_gets_no_token(certificates, tmp_path, monkeypatch, start_daemon):
    """A daemon with a certificate that is not the named one is refused before the token is sent."""
    cert, key = certificates["stranger"]
    impostor = start_daemon(tls_cert=cert, tls_key=key)
    with (
        stranger(impostor, tmp_path, monkeypatch, tls_ca=certificates["daemon"][0]) as client,
        pytest.raises(AuthenticationError, match=r"not trusted: self.signed certificate.*LUNA_TLS_CA"),
    ):
        client.ping()
    assert impostor.info()["errors"] == {}


def test_the_name_is_checked(start_daemon, tmp_path, monkeypatch):
    """A good authority is not enough: the certificate must be for the host that was dialled."""
    cert, key = make_certificate(tmp_path, "elsewhere", "DNS:elsewhere.example")
    daemon = start_daemon(tls_cert=cert, tls_key=key)
    with (
        stranger(daemon, tmp_path, monkeypatch, tls_ca=cert) as client,
        pytest.raises(AuthenticationError, match=r"not trusted: .*127\.0\.0\.1"),
    ):
        client.ping()


def test_a_client_without_tls_is_told(daemon, tmp_path, monkeypatch):
    """No hang: the error says what is missing."""
    refused = pytest.raises(DaemonConnectionError, match="LUNA_TLS_CA")
    with stranger(daemon, tmp_path, monkeypatch) as client, within(3), refused:
        client.ping()


def test_a_daemon_without_tls_is_told(start_daemon, tmp_path, monkeypatch, certificates):
    """The other way round."""
    daemon = start_daemon()
    with (
        stranger(daemon, tmp_path, monkeypatch, tls_ca=certificates["daemon"][0]) as client,
        pytest.raises(DaemonConnectionError, match=r"the TLS handshake failed.*unset LUNA_TLS_CA"),
    ):
        client.ping()


def test_a_restart_is_noticed_behind_tls(start_daemon, certificates):
    """An idle connection whose daemon has gone is made anew, as without TLS."""
    cert, key = certificates["daemon"]
    first = start_daemon(tls_cert=cert, tls_key=key)
    client = first.client()
    client.ping()
    pid = client.get_daemon_info()["pid"]
    first.clients.clear()
    first.stop()
    second = start_daemon(port=first.port, tls_cert=cert, tls_key=key)
    assert client.get_daemon_info()["pid"] != pid
    client.close()
    second.stop()


def test_threads_share_one_encrypted_connection(daemon):
    """One thread sends while another receives: nothing is mixed up."""
    client = daemon.client(use_arena=False)
    wrong = []

    def work(number):
        for round_ in range(20):
            nbytes = 4 * (1000 * number + round_ + 1)
            if client.call(m.Echo(nbytes)).tensors[0].nbytes != nbytes:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_workers_dial_loopback_only(daemon):
    """The port for workers is open on loopback alone, and lets nobody in without a token."""
    process = psutil.Process(daemon.process.pid)
    listening = {c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert all(address.ip == "127.0.0.1" for address in listening)


@pytest.mark.parametrize(
    "settings, what",
    [
        ({"tls_cert": "/nowhere/cert.pem"}, "'tls_cert' is '/nowhere/cert.pem': no such file"),
        ({"tls_key": "{key}"}, "'tls_key' is set without 'tls_cert'"),
        ({"tls_cert": "{cert}", "tls_key": "{other}"}, "KEY_VALUES_MISMATCH"),
        ({"tls_cert": "{key}", "tls_key": "{key}"}, "tls_cert"),
    ],
)
def test_bad_certificates_are_named(start_daemon, certificates, settings, what):
    """Before any port is opened, with the file and what to do; exit code 2."""
    cert, key = certificates["daemon"]
    other = certificates["stranger"][1]
    filled = {name: text.format(cert=cert, key=key, other=other) for name, text in settings.items()}
    daemon = start_daemon(wait=False, **filled)
    daemon.expected_to_die = True
    assert daemon.process.wait(20) == 2
    assert what in daemon.log.read_text() and "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("tls", [False, True])
def test_binding_beyond_loopback_warns_without_tls(start_daemon, certificates, tls):
    """Whoever opens the port to the network without TLS reads what that means."""
    cert, key = certificates["daemon"]
    daemon = start_daemon(host="0.0.0.0", **({"tls_cert": cert, "tls_key": key} if tls else {}))
    daemon.client().ping()
    assert ("without TLS" in daemon.log.read_text()) is not tls
