"""LoRA files on the daemon's side: finding, checking, converting and loading them."""
