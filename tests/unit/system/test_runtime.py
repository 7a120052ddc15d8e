"""The runtime folder: one rule for daemon and clients, nobody else's folder, one daemon per port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luna_daemon.core import AuthenticationError, PortInUse
from luna_daemon.system.runtime import Runtime, find_token, read_facts, runtime_folder

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="uids and modes")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def opened(tmp_path):
    """A runtime folder taken for port 5."""
    runtime = Runtime(5, tmp_path)
    runtime.open({"pid": 42})
    yield runtime
    runtime.close()


# --- finding the token -------------------------------------------------------------------------------------------


def test_a_client_finds_the_daemons_token(opened, tmp_path):
    """What the daemon wrote is what its user's clients read."""
    assert find_token(5, tmp_path, {}) == opened.token and len(opened.token) > 30


def test_no_daemon_no_token(tmp_path):
    """Without a token file the token is empty: the refusal says what to do."""
    assert find_token(5, tmp_path, {}) == ""


def test_the_token_of_another_port_is_not_taken(opened, tmp_path):
    """Two daemons of one user have two tokens."""
    assert find_token(6, tmp_path, {}) == ""


def test_luna_token_wins(opened, tmp_path):
    """A token given outright beats file and folder."""
    (tmp_path / "given").write_text("from file")
    environ = {"LUNA_TOKEN": "given", "LUNA_TOKEN_FILE": str(tmp_path / "given")}
    assert find_token(5, tmp_path, environ) == "given"


def test_luna_token_file_beats_the_folder(opened, tmp_path):
    """A file that is named is read, line end and all."""
    (tmp_path / "given").write_text("from file\n")
    assert find_token(5, tmp_path, {"LUNA_TOKEN_FILE": str(tmp_path / "given")}) == "from file"


@pytest.mark.parametrize("environ", [{"LUNA_TOKEN": ""}, {"LUNA_TOKEN_FILE": ""}])
def test_empty_variables_do_not_count(opened, tmp_path, environ):
    """A variable that is set to nothing is not set."""
    assert find_token(5, tmp_path, environ) == opened.token


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_named_file_must_be_readable(tmp_path, name):
    """Whoever names a file means it: the error names it, nothing else is tried."""
    with pytest.raises(AuthenticationError, match=r"LUNA_TOKEN_FILE .* cannot be read"):
        find_token(5, tmp_path, {"LUNA_TOKEN_FILE": str(tmp_path / name)})


def test_a_named_file_of_garbage(tmp_path):
    """A binary file named by mistake is a typed error too."""
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(AuthenticationError):
        find_token(5, tmp_path, {"LUNA_TOKEN_FILE": str(tmp_path / "image.png")})


# --- the folder --------------------------------------------------------------------------------------------------


@posix_only
def test_the_folder_ignores_the_environment():
    """HOME and XDG variables differ between a desktop, a service and sudo: the folder is the same for all."""
    script = "from luna_daemon.system.runtime import runtime_folder; print(runtime_folder(5))"
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    other = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_DATA_HOME", "TMPDIR", "USER"), "/nowhere")
    places = {
        subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
        for env in (base, base | other)
    }
    assert len(places) == 1 and "/nowhere" not in places.pop()


@posix_only
def test_the_default_folder_names_the_port():
    """One folder per port."""
    assert runtime_folder(5).name == "5" and runtime_folder(5).parent == runtime_folder(6).parent


@posix_only
def test_only_the_owner_may_look(opened):
    """Folder and files are the user's alone."""
    assert opened.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in opened.folder.iterdir()} == {0o600}


@posix_only
def test_a_folder_that_was_open_to_others_is_closed(tmp_path):
    """A folder left with wide rights is narrowed before the token is written."""
    (tmp_path / "5").mkdir(mode=0o777)
    (tmp_path / "5").chmod(0o777)
    runtime = Runtime(5, tmp_path)
    runtime.open({})
    assert runtime.folder.stat().st_mode & 0o777 == 0o700
    runtime.close()


@posix_only
def test_a_link_is_refused(tmp_path):
    """A link could lead the token anywhere: nothing behind it is touched."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").touch()
    (tmp_path / "5").symlink_to(tmp_path / "target")
    with pytest.raises(AuthenticationError, match="not a plain folder"):
        Runtime(5, tmp_path).open({})
    assert (tmp_path / "target" / "precious").exists() and not (tmp_path / "target" / "token").exists()


@posix_only
@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/nowhere")], ids=["file", "dangling link"])
def test_a_file_in_the_way_is_refused(tmp_path, make):
    """A file or a dangling link where the folder should be is the same typed error."""
    make(tmp_path / "5")
    with pytest.raises(AuthenticationError, match="not a plain folder"):
        Runtime(5, tmp_path).open({})


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_another_users_folder_is_refused(tmp_path):
    """Whoever owns the folder could read the token: the error names both users."""
    (tmp_path / "5").mkdir()
    os.chown(tmp_path / "5", 12345, 12345)
    with pytest.raises(AuthenticationError, match="belongs to uid 12345, not to uid 0"):
        Runtime(5, tmp_path).open({})
    assert not list((tmp_path / "5").iterdir())


# --- one daemon --------------------------------------------------------------------------------------------------


def test_the_second_daemon_is_refused(opened, tmp_path):
    """While one lives no other takes its folder, and its token stays."""
    with pytest.raises(PortInUse, match="port 5"):
        Runtime(5, tmp_path).open({})
    assert find_token(5, tmp_path, {}) == opened.token


def test_another_port_is_another_daemon(opened, tmp_path):
    """Two ports, two daemons."""
    other = Runtime(6, tmp_path)
    other.open({})
    assert find_token(6, tmp_path, {}) != find_token(5, tmp_path, {})
    other.close()


def test_what_a_dead_daemon_left_is_swept(tmp_path):
    """Files and folders without a live daemon go; the token is a new one."""
    folder = tmp_path / "5"
    (folder / "logs").mkdir(parents=True)
    for stale in ("token", "daemon.json", "worker-1.log", "logs/x"):
        (folder / stale).write_text("stale")
    runtime = Runtime(5, tmp_path)
    runtime.open({"pid": 1})
    assert sorted(path.name for path in folder.iterdir()) == ["daemon.json", "token"]
    assert find_token(5, tmp_path, {}) == runtime.token
    runtime.close()


@posix_only
def test_a_stale_link_is_swept_and_not_followed(tmp_path):
    """A link to a folder among the leftovers is removed, its target is not."""
    (tmp_path / "target").mkdir()
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "link").symlink_to(tmp_path / "target")
    runtime = Runtime(5, tmp_path)
    try:
        runtime.open({})
    finally:
        runtime.close()
    assert (tmp_path / "target").exists()


def test_closing_removes_everything(tmp_path):
    """No token, no folder and no lock is left, and the port is free for the next daemon."""
    first = Runtime(5, tmp_path)
    first.open({"pid": 1})
    first.close()
    assert list(tmp_path.iterdir()) == []
    second = Runtime(5, tmp_path)
    second.open({"pid": 2})
    assert second.token != first.token
    second.close()


def test_a_lock_without_a_daemon_is_no_obstacle(tmp_path):
    """A lock file that a killed daemon left does not lock."""
    (tmp_path / "5.lock").touch()
    runtime = Runtime(5, tmp_path)
    runtime.open({})
    runtime.close()


def test_the_daemons_facts(opened, tmp_path):
    """Pid and port can be read by a second daemon that wants to say who is there."""
    assert read_facts(5, tmp_path) == {"pid": 42}
    assert read_facts(6, tmp_path) == {}


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_broken_facts_are_no_facts(tmp_path, text):
    """A file that was half written when the power went is nothing, not an error."""
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "daemon.json").write_text(text)
    assert read_facts(5, tmp_path) == {}


def test_facts_are_json(opened):
    """Other tools may read them."""
    assert json.loads((opened.folder / "daemon.json").read_text()) == {"pid": 42}
