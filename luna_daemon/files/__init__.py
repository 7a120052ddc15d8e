"""Model files on disk: identity, lookup by name, safetensors headers, mapped tensors."""
