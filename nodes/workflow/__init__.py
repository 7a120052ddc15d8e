"""Nodes that gather a workflow's settings."""
