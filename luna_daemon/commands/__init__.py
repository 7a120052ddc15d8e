"""The ``luna-daemon`` command."""
