"""LoRA files on the daemon's side: where they lie, and how they get into RAM."""
