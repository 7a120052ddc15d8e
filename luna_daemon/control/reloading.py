"""New settings for a running daemon: those that can be taken while requests run are, the others are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import RELOADABLE, Settings
from ..core import logger
from ..files.resolver import ModelResolver
from .roots import ComfyRoots

if TYPE_CHECKING:
    from .service import Service


def take(service: Service, new: Settings) -> dict[str, Any]:
    """Take what can be taken.

    Returns:
        ``taken``: names of settings that changed and hold from now on; ``restart``: those that need a new start.
    """
    old = service.settings
    changed = [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]
    live = {name for name, field in Settings.model_fields.items() if RELOADABLE in field.metadata}
    taken, restart = sorted(live.intersection(changed)), sorted(set(changed) - live)
    settings = old.model_copy(update={name: getattr(new, name) for name in taken})
    service.settings = service.pool.settings = settings
    service.resolver = ModelResolver(settings, service.resolver.base)
    service.roots = ComfyRoots(settings)
    for session in service.sessions.values():
        session.comfy.clear()  # looked at anew, under the new settings
    service.lora_loader.take(settings)
    service.cache.resize(settings.conditioning_cache_mb << 20)
    logger.setLevel(settings.log_level)
    logger.info("settings read anew: %s taken; %s after a restart", _names(taken), _names(restart))
    service.pool.schedule()
    return {"taken": taken, "restart": restart}


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"
