"""The backend for machines without ComfyUI, on diffusers' and transformers' modules."""
