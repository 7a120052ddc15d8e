"""Whose ComfyUI a worker may run: nobody else could have put code there, or the settings name it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from luna_daemon.config import load_settings
from luna_daemon.control import roots as comfy_roots
from luna_daemon.control.roots import ComfyRoots, canonical_python
from luna_daemon.core import BadRequest, ComfyRefused
from luna_daemon.wire.messages import ComfyId

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes of POSIX")


@dataclass
class Place:
    """A ComfyUI and an environment, as far as the check looks."""

    root: Path
    env: Path

    @property
    def python(self) -> Path:
        return self.env / "bin" / "python"

    def id(self, **changes: object) -> ComfyId:
        given = {"root": str(self.root), "python": str(self.python), **changes}
        return ComfyId(**given)  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path) -> Place:
    root, env = tmp_path / "ComfyUI", tmp_path / "env"
    for folder in (
        "comfy/ldm", "comfy/__pycache__", "comfy_extras", "custom_nodes/pack", "models/vae", "output", ".git", "venv"
    ):  # fmt: skip
        (root / folder).mkdir(parents=True)
    for file in ("comfy/sd.py", "comfy/ldm/a.py", "comfy/__pycache__/sd.pyc", "main.py", "venv/pyvenv.cfg"):
        (root / file).write_text("")
    (root / "comfyui_version.py").write_text('# generated\n__version__ = "0.8.0"\n')
    (env / "bin").mkdir(parents=True)
    (env / "lib" / "python3.12" / "site-packages").mkdir(parents=True)
    (env / "pyvenv.cfg").write_text("")
    (env / "bin" / "python3.12").write_text("#!/bin/sh\n")
    (env / "bin" / "python3.12").chmod(0o755)
    (env / "bin" / "python3").symlink_to("python3.12")
    (env / "bin" / "python").symlink_to("python3")
    for path in tmp_path.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)
    return Place(root, env)


def check(given: ComfyId, here: bool = True, **settings: object) -> ComfyId:
    return ComfyRoots(load_settings(settings, {})).check(given, here)


def test_ones_own_is_fine(place):
    """What comes back is what a worker runs: no link on the way but the one that makes an environment."""
    found = check(place.id(version="0.8.0", torch="2.9", flags=("--fp32-vae", "--deterministic")))
    python = str(place.env / "bin" / "python3.12")
    assert found == ComfyId(str(place.root), python, "0.8.0", "2.9", ("--deterministic", "--fp32-vae"))


def test_one_place_has_one_name(place, tmp_path):
    """Two instances of one installation share a worker, however they were started."""
    (tmp_path / "link").symlink_to(place.root)
    (tmp_path / "env2").symlink_to(place.env)
    names = [
        place.id(), place.id(root=str(tmp_path / "link")), place.id(python=str(place.env / "bin" / "python3")),
        place.id(python=str(tmp_path / "env2" / "bin" / "python3.12")), place.id(root=f"{place.root}/../ComfyUI"),
    ]  # fmt: skip
    assert len({check(name).key for name in names}) == 1
    other = [place.id(flags=("--fp32-vae",)), place.id(flags=("--fp32-vae", "--deterministic"))]
    assert len({check(name).key for name in [place.id(), *other]}) == 3


def test_two_environments_of_one_python_are_two(place, tmp_path):
    """A virtual environment is known by its own link, not by the interpreter that it links to."""
    other = tmp_path / "other" / "bin"
    other.mkdir(parents=True)
    (other / "python").symlink_to(place.env / "bin" / "python3.12")
    assert canonical_python(other / "python") == other / "python"
    assert check(place.id(python=str(other / "python"))).key != check(place.id()).key


@pytest.mark.parametrize(
    "path",
    ["", "comfy", "comfy/ldm", "comfy/sd.py", "comfy/__pycache__", "comfy/__pycache__/sd.pyc", "main.py",
     "comfy_extras", "../env", "../env/bin", "../env/bin/python3.12", "../env/pyvenv.cfg",
     "../env/lib/python3.12/site-packages", "comfyui_version.py"],
)  # fmt: skip
def test_writable_by_everybody(place, path):
    """The folder itself, any code in it, the interpreter, or where its packages lie: refused, and named."""
    target = (place.root / path).resolve()
    target.chmod(0o777)
    with pytest.raises(ComfyRefused, match="is writable by everybody, so no worker runs it") as caught:
        check(place.id())
    assert f"{target} is" in str(caught.value) and "comfyui_roots" in caught.value.hint


@pytest.mark.parametrize("path", ["models/vae", "custom_nodes/pack", "output", ".git", "venv"])
def test_what_holds_no_code_of_a_worker_may_be_anybodys(place, path):
    """Models on a disk for all, and packs: a worker imports neither."""
    (place.root / path).chmod(0o777)
    check(place.id())


def test_a_folder_above_that_others_may_change(place, tmp_path):
    """Who may rename what is in it may put another in its place; not so with a sticky folder, such as /tmp."""
    tmp_path.chmod(0o777)
    with pytest.raises(ComfyRefused, match="is writable by everybody"):
        check(place.id())
    tmp_path.chmod(0o1777)
    check(place.id())
    tmp_path.chmod(0o700)


def foreign(path: Path, monkeypatch) -> None:
    """Make it another user's; who may not do that becomes another user."""
    if os.getuid() == 0:
        os.chown(path, 65534, 65534, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 65533)


@pytest.mark.parametrize("path", ["", "comfy/sd.py", "../env", "../env/bin/python"])
def test_another_users(place, path, monkeypatch):
    """Folder, file, environment or link: refused, with the owner."""
    foreign(place.root / path, monkeypatch)
    with pytest.raises(ComfyRefused, match=r"belongs to user \d+, not to the daemon's user"):
        check(place.id())


def test_a_group_with_others(place, monkeypatch):
    """A group of one's own, as many systems give each user, is no stranger."""
    (place.root / "comfy").chmod(0o775)
    monkeypatch.setattr(comfy_roots, "_is_private", lambda group: True)
    check(place.id())
    monkeypatch.setattr(comfy_roots, "_is_private", lambda group: False)
    with pytest.raises(ComfyRefused, match="is writable by group"):
        check(place.id())


def test_groups_as_the_system_has_them():
    """root's own group is ours alone; one that somebody else is in by default is not."""
    import pwd

    stranger = next(user for user in pwd.getpwall() if user.pw_uid not in (0, os.getuid()))
    assert not comfy_roots._is_private(stranger.pw_gid)
    assert comfy_roots._is_private(4_000_000)


def test_a_link_on_the_way_that_others_may_change(place, tmp_path):
    """The link's own folder counts, although it is not part of the real path."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "env").symlink_to(place.env)
    (tmp_path / "python").symlink_to(shared / "env" / "bin" / "python")
    for python in (shared / "env" / "bin" / "python", tmp_path / "python"):
        with pytest.raises(ComfyRefused, match="shared is writable by everybody"):
            check(place.id(python=str(python)))


def test_code_behind_a_link(place, tmp_path):
    """A file may be a link to what is ours; a folder behind a link is not looked into, and refused."""
    (tmp_path / "elsewhere.py").write_text("")
    (place.root / "extra.py").symlink_to(tmp_path / "elsewhere.py")
    check(place.id())
    (tmp_path / "elsewhere.py").chmod(0o666)
    with pytest.raises(ComfyRefused, match=r"elsewhere.py is writable by everybody"):
        check(place.id())
    (place.root / "extra.py").unlink()
    (place.root / "more").symlink_to(tmp_path)
    with pytest.raises(ComfyRefused, match="more is a link to a folder"):
        check(place.id())


def test_a_circle_of_links(place, tmp_path):
    """Ends, with an error that can be read."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ComfyRefused):
        check(place.id(python=str(tmp_path / "a")))


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"root": "ComfyUI"}, "not absolute"), ({"python": "python3"}, "not absolute"), ({"root": ""}, "not absolute"),
     ({"root": "/no/such"}, "/no/such"), ({"python": "/no/such"}, "/no/such"), ({"root": "/tmp\0"}, "not absolute"),
     ({"version": "0.3.64"}, r"runs ComfyUI 0\.3\.64, but the files in .* are of 0\.8\.0")],
)  # fmt: skip
def test_what_is_not_there(place, changes, why):
    with pytest.raises(ComfyRefused, match=why):
        check(place.id(**changes))


def test_neither_comfyui_nor_an_interpreter(place):
    (place.env / "bin" / "python3.12").chmod(0o644)
    with pytest.raises(ComfyRefused, match="is not an executable file"):
        check(place.id())
    (place.root / "comfy" / "sd.py").unlink()
    with pytest.raises(ComfyRefused, match=r"has no comfy/sd\.py"):
        check(place.id())


def test_what_the_settings_name_is_fine(place, tmp_path):
    """comfyui_path with its interpreter, or what lies below comfyui_roots, whoever may write there, for anybody."""
    place.root.chmod(0o777)
    place.env.chmod(0o777)
    own = {"comfyui_path": place.root, "comfyui_python": place.python, "client_roots": False}
    assert check(place.id(), here=False, **own).key == ComfyRoots(load_settings(own, {})).own.key
    assert check(place.id(), here=False, comfyui_roots=[place.root, place.env])
    assert check(place.id(), comfyui_roots=[tmp_path])
    with pytest.raises(ComfyRefused, match=r"env is writable by everybody"):
        check(place.id(), comfyui_roots=[place.root])
    with pytest.raises(ComfyRefused, match="ComfyUI is writable by everybody"):
        check(place.id(), comfyui_roots=[place.env, tmp_path / "Comfy"])


def test_not_from_elsewhere_and_not_if_it_is_switched_off(place):
    with pytest.raises(ComfyRefused, match="the client is not on the daemon's host"):
        check(place.id(), here=False)
    with pytest.raises(ComfyRefused, match="client_roots"):
        check(place.id(), client_roots=False)
    with pytest.raises(ComfyRefused, match=r"interpreter .* is not the daemon's"):
        check(place.id(), client_roots=False, comfyui_roots=[place.root])


def test_flags_are_checked_even_where_the_folder_is_fine(place):
    with pytest.raises(BadRequest, match="--listen"):
        check(place.id(flags=("--listen",)), comfyui_path=place.root, comfyui_python=place.python)


def test_the_daemons_own(place):
    """Its flags that decide bits are part of it, memory policy is not; without a folder there is none."""
    given = {"comfyui_path": place.root, "comfyui_python": place.python, "comfyui_args": ["--lowvram", "--fp32-vae"]}
    own = ComfyRoots(load_settings(given, {})).own
    assert own == ComfyId(str(place.root), str(place.env / "bin" / "python3.12"), flags=("--fp32-vae",))
    assert ComfyRoots(load_settings({**given, "backend": "diffusers"}, {})).own is None
    assert ComfyRoots(load_settings({}, {})).own is None


def test_windows_knows_only_the_profile(place, tmp_path, monkeypatch):
    """Access lists are not read: below the user's own folder is fine, elsewhere is refused."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert comfy_roots._why_outside_the_profile(place.root) == ""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "somebody")
    assert "lies outside of" in comfy_roots._why_outside_the_profile(place.root)
