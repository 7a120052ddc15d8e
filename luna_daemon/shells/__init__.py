"""DaemonVAE and DaemonCLIP inside ComfyUI: real ComfyUI objects without weights."""
