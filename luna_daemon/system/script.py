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

    Before that, the paths that direct execution put at the front of ``sys.path`` are removed, since modules in them
    shadow the standard library and ComfyUI's ``nodes``: first the entry of the header above, then the script's folder,
    which is not there with ``-P`` or ``-I``. The same paths further back stay: one may be site-packages.
    """
    package = Path(__file__).resolve().parents[1]
    for folders in ([package.parent], [package, package / "pool"]):
        if sys.path and sys.path[0] in [str(folder) for folder in folders]:
            del sys.path[0]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def run_command(*words: str) -> None:
    """Run the ``luna-daemon`` command with these arguments, importing it by name: callers are in layers below it."""
    importlib.import_module("luna_daemon.commands.cli").main(list(words))
