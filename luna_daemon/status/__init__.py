"""What people look at: the status page, its WebSocket, metrics."""
