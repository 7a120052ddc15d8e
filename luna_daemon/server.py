"""Old imports: ``from luna_daemon.server import LunaDaemon``."""

from .daemon_server import LunaDaemon, main

__all__ = ["LunaDaemon", "main"]

if __name__ == "__main__":
    main()
