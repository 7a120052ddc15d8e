"""Unit tests: hypothesis is repeatable and keeps no files; surroundings that are nobody's."""

from __future__ import annotations

import logging
import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit", deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("unit")


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """No luna.toml, no variables of whoever runs the tests, and logging as it was."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("LUNA_", "COMFYUI_"))]:
        monkeypatch.delenv(name)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
