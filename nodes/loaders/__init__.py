"""Nodes that load models, or replace loaded ones by the daemon's."""
