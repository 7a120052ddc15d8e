"""The baseline of every comparison: models whose weights are copied into the process, as ``load_state_dict`` does.

Luna's own loading maps the file instead, so that processes share its pages; ComfyUI and the usual scripts copy.
"""

from __future__ import annotations

import gc

import torch

__all__ = ["copy_weights"]


def copy_weights() -> None:
    """Replace the memory of every parameter in this process by a private copy."""
    for item in gc.get_objects():
        if torch.nn.Parameter in type(item).__mro__:  # isinstance would wake every lazy object in the process
            item.data = item.data.clone()
