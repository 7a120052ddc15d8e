"""Nodes about the daemon itself."""
