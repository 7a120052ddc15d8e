"""Runs the ``luna-daemon`` command: ``python -m luna_daemon``, or ``python luna_daemon`` from any folder."""

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from luna_daemon.system.script import run_as_module

    run_as_module("luna_daemon.__main__")

from .commands.cli import main

main()
