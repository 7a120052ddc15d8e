"""The predecessor's import ``from luna_daemon.server import LunaDaemon``, and its file as a command."""

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from luna_daemon.system.script import run_as_module

    run_as_module("luna_daemon.server")

from .daemon_server import LunaDaemon, main

__all__ = ["LunaDaemon", "main"]

if __name__ == "__main__":
    main()
