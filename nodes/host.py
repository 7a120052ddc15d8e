"""Access to the ComfyUI around this pack at the time of a call: importing the pack needs neither ComfyUI nor torch."""

from __future__ import annotations

import importlib
import sys
from typing import Any


class _AnyType(str):
    """Type that every link accepts: ComfyUI compares types with ``!=``."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False


ANY = _AnyType("*")


def module(name: str) -> Any:
    """Import a module of ComfyUI, such as ``folder_paths`` or ``comfy.sd``."""
    return importlib.import_module(name)


def server() -> Any:
    """Return ComfyUI's ``PromptServer``; ``None`` in a script, which has no server."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def names(folder: str) -> list[str]:
    """List a model folder's files as ComfyUI's loaders do; empty without such a folder, or without ComfyUI."""
    paths = sys.modules.get("folder_paths")
    if paths is None:
        return []
    try:
        return list(paths.get_filename_list(folder))
    except KeyError:
        return []


def path(folder: str, name: str) -> str:
    """Find the full path of one of ``names(folder)``.

    Raises:
        FileNotFoundError: there is no such file; the message is ComfyUI's.
    """
    full: str = module("folder_paths").get_full_path_or_raise(folder, name)
    return full


def embeddings() -> list[str]:
    """List the folders of textual inversions."""
    return list(module("folder_paths").get_folder_paths("embeddings"))


def node_class(name: str) -> Any:
    """Find a node class of ComfyUI or any pack by its id; ``None`` if absent, or not loaded yet."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(name)


def choices(name: str, widget: str) -> list[str]:
    """List the options of a node's widget; empty if there is no such node."""
    node = node_class(name)
    if node is None:
        return []
    kind, *options = node.INPUT_TYPES()["required"][widget]
    if isinstance(kind, str):  # newer nodes: ("COMBO", {"options": [...]})
        kind = options[0].get("options", []) if options else []
    return list(kind)
