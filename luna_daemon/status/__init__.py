"""The HTTP side of the daemon: status page, WebSocket, metrics."""
