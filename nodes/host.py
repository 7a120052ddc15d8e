"""The ComfyUI around this pack, reached when a node needs it: importing the pack needs neither ComfyUI nor torch."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["ANY", "choices", "embeddings", "module", "names", "node_class", "path", "server"]


class _AnyType(str):
    """A type that every link accepts: ComfyUI compares types with ``!=``."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False


ANY = _AnyType("*")


def module(name: str) -> Any:
    """A module of ComfyUI, such as ``folder_paths`` or ``comfy.sd``."""
    return importlib.import_module(name)


def server() -> Any:
    """ComfyUI's ``PromptServer``; ``None`` if there is none, as in a script."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def names(folder: str) -> list[str]:
    """Files of a model folder as ComfyUI's loaders list them; none if there is no such folder, or no ComfyUI."""
    paths = sys.modules.get("folder_paths")
    if paths is None:
        return []
    try:
        return list(paths.get_filename_list(folder))
    except KeyError:
        return []


def path(folder: str, name: str) -> str:
    """The full path of one of ``names(folder)``.

    Raises:
        FileNotFoundError: in ComfyUI's words.
    """
    found: str = module("folder_paths").get_full_path_or_raise(folder, name)
    return found


def embeddings() -> list[str]:
    """Folders of textual inversions."""
    return list(module("folder_paths").get_folder_paths("embeddings"))


def node_class(name: str) -> Any:
    """A node class by its id, of ComfyUI or of any pack; ``None`` if it is not there (yet: packs load in any order)."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(name)


def choices(name: str, widget: str) -> list[str]:
    """What a node lets its user choose; empty if there is no such node."""
    node = node_class(name)
    if node is None:
        return []
    kind, *options = node.INPUT_TYPES()["required"][widget]
    if isinstance(kind, str):  # newer nodes: ("COMBO", {"options": [...]})
        kind = options[0].get("options", []) if options else []
    return list(kind)
