"""Settings read anew and tokens renewed in a running daemon: what holds from then on, and who notices."""

from __future__ import annotations

import contextlib
import io
import json
import signal

import pytest

from luna_daemon.client import DaemonClient
from luna_daemon.commands.cli import main
from luna_daemon.core import AuthenticationError, DaemonConnectionError, ModelNotFound
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import encode_call
from tests.integration.helpers import DEMO_TOML, DEMO_VAE, Background, RawPeer, is_busy
from tests.waiting import wait_until


def command(daemon, *arguments):
    """What ``luna-daemon ...`` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*arguments, "--port", str(daemon.port), "--runtime-dir", str(daemon.runtime_dir)])
    return out.getvalue()


def config_of(daemon):
    return daemon.log.with_name(daemon.log.name.replace("daemon-", "luna-")).with_suffix(".toml")


@pytest.mark.parametrize("way", ["command", "signal"])
def test_a_model_is_added_while_it_runs(start_daemon, way):
    """A new entry of luna.toml can be used at once; connections and loaded models stay."""
    if way == "signal" and not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")
    daemon = start_daemon()
    client = daemon.client()
    with pytest.raises(ModelNotFound, match="'demo'"):
        client.warm(m.ModelRef("vae", "demo"))
    session = client.link().welcome.session
    config_of(daemon).write_text(DEMO_TOML + "\n")
    if way == "command":
        assert "applied: models" in command(daemon, "reload")
    else:
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for(lambda info: "demo" in info["models"]["named"])
    assert client.warm(m.ModelRef("vae", "demo"))["latent_channels"] == 16
    assert client.link().welcome.session == session


def test_what_needs_a_restart_is_named(start_daemon):
    """A setting that is bound into sockets or workers is not taken silently, nor half."""
    daemon = start_daemon(toml="idle_timeout_sec = 5\n")
    config_of(daemon).write_text("idle_timeout_sec = 0.5\nmax_tensor_mb = 7\n")
    found = json.loads(command(daemon, "reload", "--json"))
    assert found == {"taken": ["idle_timeout_sec"], "restart": ["max_tensor_mb"]}
    info = daemon.info()
    assert info["idle_timeout_s"] == 0.5 and info["limits"]["tensor_bytes"] == 4096 << 20
    assert "nothing has changed" in command(daemon, "reload") or "restart: max_tensor_mb" in command(daemon, "reload")


@pytest.mark.parametrize("way", ["command", "signal"])
def test_bad_settings_change_nothing(start_daemon, way, capsys):
    """A slip in luna.toml is named, and the daemon goes on as before."""
    if way == "signal" and not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")
    daemon = start_daemon(toml="idle_timeout_sec = 5\n")
    config_of(daemon).write_text("idle_timeout_sec = 'soon'\nqueue_limit = 3\n")
    if way == "command":
        with pytest.raises(SystemExit) as ended:
            main(["reload", "--port", str(daemon.port), "--runtime-dir", str(daemon.runtime_dir)])
        assert ended.value.code == 2 and "'idle_timeout_sec' is 'soon'" in capsys.readouterr().err
    else:
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "settings not reloaded" in daemon.log.read_text(), what=daemon.log.read_text)
        assert "'idle_timeout_sec' is 'soon'" in daemon.log.read_text()
    info = daemon.info()
    assert info["idle_timeout_s"] == 5 and info["queue"]["limit"] == 256


def test_an_idle_timeout_reaches_workers_that_run(start_daemon):
    """The new value holds for models that were loaded before."""
    daemon = start_daemon(toml=DEMO_TOML + "\n", idle_timeout_sec=300)
    daemon.client().warm(m.ModelRef("vae", "demo"))
    assert daemon.info()["models"]["loaded"]
    # The environment comes before the file, so this one stays; the file's is what a user would edit.
    config_of(daemon).write_text("worker_keep_sec = 1\n" + DEMO_TOML)
    assert "worker_keep_sec" in command(daemon, "reload")
    assert daemon.info()["models"]["loaded"]


def test_a_folder_is_added_while_it_runs(start_daemon, tmp_path):
    """``model_dirs`` too: what was refused is found."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = elsewhere / "vae.safetensors"
    copy.write_bytes(DEMO_VAE.read_bytes())
    daemon = start_daemon(model_dirs="")
    from luna_daemon.files.identity import file_id

    ref = m.ModelRef("vae", files=(file_id(copy),), type="sd3")
    client = daemon.client()
    with pytest.raises(ModelNotFound):
        client.warm(ref)
    config_of(daemon).write_text(f'model_dirs = ["{elsewhere.as_posix()}"]\n')
    assert "model_dirs" in command(daemon, "reload")
    assert client.warm(ref)


def test_token_prints_what_lets_in(start_daemon, tmp_path, monkeypatch):
    """The printed token is the one that a client elsewhere needs."""
    daemon = start_daemon()
    printed = command(daemon, "token").strip()
    monkeypatch.setenv("LUNA_TOKEN", printed)
    with DaemonClient("127.0.0.1", daemon.port, runtime_dir=tmp_path) as client:
        assert client.ping() > 0


def test_a_renewed_token_locks_the_old_one_out(start_daemon, tmp_path, monkeypatch):
    """Whoever has only the old token is out, with the connections that they had; the same user notices nothing."""
    daemon = start_daemon()
    mine = daemon.client()
    mine.ping()
    old = command(daemon, "token").strip()
    monkeypatch.setenv("LUNA_TOKEN", old)
    with DaemonClient("127.0.0.1", daemon.port, runtime_dir=tmp_path) as thief:
        thief.ping()
        link = thief.link()
        monkeypatch.delenv("LUNA_TOKEN")
        new = command(daemon, "token", "--renew").strip()
        assert new != old and len(new) > 30
        wait_until(lambda: link.broken, what="the daemon hangs up on who has the old token")
        monkeypatch.setenv("LUNA_TOKEN", old)
        with pytest.raises(AuthenticationError, match="the token is wrong"):
            thief.ping()
    monkeypatch.delenv("LUNA_TOKEN")
    assert mine.ping() > 0


def test_a_renewed_token_lets_running_requests_finish(start_daemon):
    """What was asked before is answered; a request after it on the same connection is not."""
    daemon = start_daemon()
    client = daemon.client()
    call = Background(lambda: client.call(m.Echo(1 << 20, 1.5)))
    daemon.wait_for(is_busy)
    with RawPeer(daemon) as other:
        assert isinstance(other.hello(), m.Welcome)
        other.channel.send(m.Request(7, encode_call(m.Echo(64, 1.0))))
        daemon.wait_for(lambda info: info["in_flight"] == 2)
        command(daemon, "token", "--renew")
        answer = other.ask(m.Ping(), 8)
        assert isinstance(answer, m.Failure) and (answer.id, answer.code) == (8, "authentication")
        assert isinstance(other.receive(), m.Reply)
        with pytest.raises(DaemonConnectionError):  # and then the daemon closes
            other.channel.receive(8)
    assert call.value().tensors[0].nbytes == 1 << 20
    assert client.ping() > 0


def test_workers_keep_their_place_when_a_token_is_renewed(start_daemon):
    """Workers have tokens of their own."""
    daemon = start_daemon()
    daemon.client().call(m.Echo(64))
    pids = [worker["pid"] for worker in daemon.info()["workers"]]
    command(daemon, "token", "--renew")
    daemon.client().call(m.Echo(64))
    assert [worker["pid"] for worker in daemon.info()["workers"]] == pids
