"""Nodes that collect a workflow's settings."""
