"""ComfyUI as data: flags, patches, attributes and weightless models, for clients and workers alike."""
