"""``python -m luna_daemon`` is the ``luna-daemon`` command."""

from .cli import main

main()
