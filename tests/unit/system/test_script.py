"""Direct execution of a module's file, as users of the predecessor do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


def copy_the_start(folder: Path) -> None:
    """What a module of the package needs to be run by its path."""
    (folder / "luna_daemon" / "system").mkdir(parents=True)
    for name in ("__init__.py", "system/__init__.py", "system/script.py"):
        (folder / "luna_daemon" / name).write_text((ROOT / "luna_daemon" / name).read_text())


@pytest.mark.parametrize("where", ["luna_daemon", "luna_daemon/pool"])
def test_our_folders_do_not_shadow_other_modules(tmp_path, where):
    """The module runs as part of its package, and what direct execution put on the path is gone."""
    (tmp_path / "luna_daemon" / "pool").mkdir(parents=True)
    copy_the_start(tmp_path)
    (tmp_path / "luna_daemon" / "pool" / "__init__.py").touch()
    (tmp_path / "shadowing.py").write_text("raise SystemExit('shadowed')")
    depth = where.count("/") + 1
    script = tmp_path / where / "entry.py"
    script.write_text(
        "if __name__ == '__main__' and not __package__:\n"
        "    import pathlib, sys\n"
        f"    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[{depth}]))\n"
        "    from luna_daemon.system.script import run_as_module\n"
        f"    run_as_module('{where.replace('/', '.')}.entry')\n"
        "from importlib.util import find_spec\n"
        "print(__name__, __package__, find_spec('shadowing'), find_spec('script'))\n"
    )
    ran = run(str(script), cwd=tmp_path)
    assert ran.stdout == f"__main__ {where.replace('/', '.')} None None\n", ran.stderr


def test_an_installed_package_finds_what_lies_beside_it(tmp_path):
    """In site-packages the package's own folder is on the path for good: it must stay there, with the dependencies."""
    site = tmp_path / "site"
    copy_the_start(site)
    (site / "dependency.py").touch()
    script = site / "luna_daemon" / "entry.py"
    script.write_text(
        "if __name__ == '__main__' and not __package__:\n"
        "    import pathlib, sys\n"
        "    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))\n"
        "    from luna_daemon.system.script import run_as_module\n"
        "    run_as_module('luna_daemon.entry')\n"
        "import dependency\n"
        "from importlib.util import find_spec\n"
        "print(__package__, find_spec('script'))\n"
    )
    for flags in ([], ["-P"]):
        if flags and sys.version_info < (3, 11):
            continue
        ran = run(*flags, str(script), env={**os.environ, "PYTHONPATH": str(site)})
        assert ran.stdout == "luna_daemon None\n", ran.stderr


def test_the_server_runs_by_its_path(tmp_path):
    """``python luna_daemon/daemon_server.py --help`` is the command's own help, from any folder."""
    ran = run(str(ROOT / "luna_daemon" / "daemon_server.py"), "--help", cwd=tmp_path)
    assert ran.returncode == 0 and "--port" in ran.stdout, ran.stderr
