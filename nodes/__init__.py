"""Nodes of this pack, by class id."""

from __future__ import annotations

from .loaders.luna_checkpoint_tunnel import LunaCheckpointTunnel
from .loaders.luna_load_clip import LunaLoadCLIP
from .loaders.luna_load_lora import LunaLoadLoRA
from .loaders.luna_load_vae import LunaLoadVAE
from .loaders.luna_model_router import LunaModelRouter
from .system.luna_daemon_status import LunaDaemonStatus
from .system.luna_free_models import LunaFreeModels
from .workflow.luna_config_gateway import LunaConfigGateway
from .workflow.luna_pipe_out import LunaPipeOut

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS = {
    "LunaModelRouter": LunaModelRouter,
    "LunaConfigGateway": LunaConfigGateway,
    "LunaPipeOut": LunaPipeOut,
    "LunaLoadVAE": LunaLoadVAE,
    "LunaLoadCLIP": LunaLoadCLIP,
    "LunaLoadLoRA": LunaLoadLoRA,
    "LunaCheckpointTunnel": LunaCheckpointTunnel,
    "LunaDaemonStatus": LunaDaemonStatus,
    "LunaFreeModels": LunaFreeModels,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "LunaModelRouter": "Luna Model Router",
    "LunaConfigGateway": "Luna Config Gateway",
    "LunaPipeOut": "Luna Pipe Out",
    "LunaLoadVAE": "Luna Load VAE",
    "LunaLoadCLIP": "Luna Load CLIP",
    "LunaLoadLoRA": "Luna Load LoRA",
    "LunaCheckpointTunnel": "Luna Checkpoint Tunnel",
    "LunaDaemonStatus": "Luna Daemon Status",
    "LunaFreeModels": "Luna Free Models",
}
