"""Entry of the ComfyUI node pack: ``luna_daemon`` is the package, ``nodes`` holds the nodes.

ComfyUI loads this file with its folder's path as the module's name; tests and tools import it under other names, and
without ComfyUI. Nodes import ``luna_daemon`` absolutely, so that only one module of that name exists.
"""

import importlib.util
import os
import sys

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

_HERE = os.path.dirname(os.path.abspath(__file__))

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = "./web" if os.path.isdir(os.path.join(_HERE, "web")) else None


def _is_installed() -> bool:
    """Whether the package is found; a bare folder of that name, as an uninstall may leave, does not count."""
    spec = importlib.util.find_spec("luna_daemon")
    return spec is not None and spec.origin is not None


def _become_the_package() -> None:
    """Load the package inside in place of this file: a checkout named ``luna_daemon`` was imported from outside."""
    path = os.path.join(_HERE, "luna_daemon", "__init__.py")
    spec = importlib.util.spec_from_file_location(__name__, path)
    if spec is not None and spec.loader is not None:
        package = importlib.util.module_from_spec(spec)
        sys.modules[__name__] = package
        spec.loader.exec_module(package)


if __name__ == "luna_daemon":
    _become_the_package()
elif __package__:  # not if a tool has loaded this file as a plain module
    if not _is_installed():
        # Appended, never inserted: ComfyUI has top-level modules named nodes and server.
        sys.path.append(_HERE)
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .nodes.startup import begin

    begin()
