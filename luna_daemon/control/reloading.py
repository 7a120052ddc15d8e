"""New settings for a running daemon: those that can be taken while requests run are, the others are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import Settings
from ..core import logger
from ..files.resolver import ModelResolver
from .roots import ComfyRoots

if TYPE_CHECKING:
    from .service import Service

LIVE = frozenset({
    "client_roots", "clip_g_path", "clip_l_path", "comfyui_roots", "conditioning_cache_mb", "config_only",
    "drain_timeout_sec", "idle_timeout_sec", "log_level", "lora_cache_entries", "lora_cache_gb", "lora_copy",
    "max_clients", "max_clip_workers", "max_vae_workers", "min_clip_workers", "min_vae_workers",
    "model_dirs", "model_memory_gb", "model_type", "models", "queue_limit", "queue_threshold", "scale_up_delay_sec",
    "service_type", "vae_path", "vram_safety_margin_gb", "worker_keep_sec", "worker_start_sec",
})  # fmt: skip
"""Looked up whenever they matter. The rest is bound into sockets, shared memory, limits that clients were told, or
workers that run."""


def take(service: Service, new: Settings) -> dict[str, Any]:
    """Take what can be taken.

    Returns:
        ``taken``: names of settings that changed and hold from now on; ``restart``: those that need a new start.
    """
    old = service.settings
    changed = [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]
    taken = sorted(name for name in changed if name in LIVE)
    restart = sorted(name for name in changed if name not in LIVE)
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
