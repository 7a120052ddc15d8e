"""Reload: applies those settings that may change while requests run, and names the others."""

from __future__ import annotations

from typing import Any

from ..config import RELOADABLE, Settings
from ..core import logger
from ..files.resolver import ModelResolver
from .roots import ComfyRoots
from .state import State, limits_of


def apply(state: State, new: Settings) -> dict[str, Any]:
    """Apply those new settings that are reloadable.

    Returns:
        ``taken``: names of changed settings that are applied; ``restart``: names of changed settings that are
        applied only after a restart.
    """
    old = state.settings
    changed = [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]
    live = {name for name, field in Settings.model_fields.items() if RELOADABLE in field.metadata}
    taken, restart = sorted(live.intersection(changed)), sorted(set(changed) - live)
    settings = old.model_copy(update={name: getattr(new, name) for name in taken})
    state.settings = state.pool.settings = settings
    state.resolver = ModelResolver(settings, state.resolver.base)
    state.roots = ComfyRoots(settings)
    state.limits = limits_of(settings)
    for session in state.sessions.values():
        session.comfy = {}  # checked again; a check that still runs, under the old settings, fills the old dict
    state.lora_loader.apply(settings)
    state.conditionings.resize(settings.conditioning_cache_mb << 20)
    logger.setLevel(settings.log_level)
    logger.info("settings reloaded: applied %s; need a restart: %s", _names(taken), _names(restart))
    state.pool.schedule()
    return {"taken": taken, "restart": restart}


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"
