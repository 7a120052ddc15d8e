"""Luna Daemon: one service that holds VAEs and text encoders once and serves every ComfyUI instance on the machine."""

__version__ = "0.1.0"

__all__ = ["__version__"]
