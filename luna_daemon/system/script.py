"""Direct execution of a module's file: ``python luna_daemon/daemon_server.py``.

An entry module begins with::

    if __name__ == "__main__" and not __package__:
        import pathlib, sys
        sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
        from luna_daemon.system.script import run_as_module
        run_as_module("luna_daemon.daemon_server")
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path


def run_as_module(name: str) -> None:
    """Run a module as part of its package, and exit.

    Before that, the paths that direct execution put on ``sys.path`` are removed: a script's folder would shadow the
    standard library, and the repository's ``nodes`` folder ComfyUI's ``nodes`` module. These paths are the first entry,
    which the header inserted, and then the script's folder, unless ``-P`` or ``-I`` left it out. The same folder
    further back stays: it is site-packages, where the package was installed. The package is imported already and finds
    its submodules.
    """
    package = Path(__file__).resolve().parents[1]
    for ours in ([package.parent], [package, package / "pool"]):
        if sys.path and sys.path[0] in [str(path) for path in ours]:
            del sys.path[0]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def run_command(*words: str) -> None:
    """Run the ``luna-daemon`` command with these arguments.

    The command is imported by its name, since callers are in layers below the command.
    """
    importlib.import_module("luna_daemon.commands.cli").main(list(words))
