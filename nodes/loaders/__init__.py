"""Nodes that load models, or put the daemon under loaded ones."""
