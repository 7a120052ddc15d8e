"""The backend that users run: ComfyUI's own ``comfy.sd`` in a worker, so results equal ComfyUI's bit for bit."""
