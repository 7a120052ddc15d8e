"""Starting the daemon along with ComfyUI, for those who ask for it (``LUNA_START_FROM_COMFYUI``).

- ``off``, the default: nothing is started.
- ``with_comfyui``: a daemon is started if none answers, and ends when this ComfyUI does, however that ends.
- ``independent``: a daemon is started if none answers, and stays.

The environment variable wins; without it the setting ``Luna.StartFromComfyUI`` of ComfyUI's window is read. The daemon
is always a process of its own. It runs on this ComfyUI's interpreter and reads this ComfyUI's model folders.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luna_daemon.client import DaemonClient, get_client
from luna_daemon.core import LunaError, PortInUse, logger

from . import host
from .toast import show_warnings, toast

__all__ = ["SETTING", "VARIABLE", "begin", "chosen", "daemon_settings", "start_daemon"]

VARIABLE, SETTING = "LUNA_START_FROM_COMFYUI", "Luna.StartFromComfyUI"
OFF, WITH_COMFYUI, INDEPENDENT = CHOICES = ("off", "with_comfyui", "independent")
_MODEL_FOLDERS = ("checkpoints", "text_encoders", "vae", "vae_approx", "loras")


def chosen(environ: Mapping[str, str], settings_file: Path | None = None) -> str:
    """What is set: one of ``off``, ``with_comfyui``, ``independent``; anything else is warned of and is ``off``."""
    value = environ.get(VARIABLE, "").strip() or _from_window(settings_file)
    if value not in CHOICES:
        logger.warning("%s is %r: it must be one of %s; no daemon is started", VARIABLE, value, ", ".join(CHOICES))
        return OFF
    return value


def _from_window(settings_file: Path | None) -> str:
    try:
        found = json.loads(settings_file.read_text("utf-8")).get(SETTING) if settings_file else None
    except (OSError, ValueError, AttributeError):
        return OFF
    return str(found or OFF)


def daemon_settings(paths: Any, given: list[Path]) -> dict[str, Any]:
    """Settings of a daemon that serves this ComfyUI.

    Args:
        paths: ComfyUI's ``folder_paths``.
        given: the model folders that the user's own settings name.
    """
    folders = [Path(folder) for kind in _MODEL_FOLDERS for folder in paths.get_folder_paths(kind)]
    return {
        "comfyui_path": Path(paths.__file__).resolve().parent,
        "comfyui_python": Path(sys.executable),
        "model_dirs": list(dict.fromkeys([*given, *(folder for folder in folders if folder.is_dir())])),
    }


def begin() -> threading.Thread | None:
    """Serve the panel, show warnings as toasts, and do what is set, on a thread: ComfyUI does not wait for it."""
    paths = sys.modules.get("folder_paths")
    if paths is None:
        return None
    show_warnings()
    _serve_panel()
    choice = chosen(os.environ, Path(paths.get_user_directory()) / "default" / "comfy.settings.json")
    if choice == OFF:
        return None
    thread = threading.Thread(target=_start_and_tell, args=(paths, choice), name="luna-start", daemon=True)
    thread.start()
    return thread


def _serve_panel() -> None:
    """Without ComfyUI's server there is no panel; and a ComfyUI that it does not fit keeps its nodes."""
    server = host.server()
    if server is None:
        return
    try:
        from .panel import install

        install(server)
    except Exception:
        logger.exception("the Luna panel cannot be shown in this ComfyUI; the nodes work without it")


def _start_and_tell(paths: Any, choice: str) -> None:
    try:
        start_daemon(paths, choice)
    except LunaError as error:
        logger.warning("the daemon was not started: %s", error)


def start_daemon(paths: Any, choice: str) -> Any:
    """Start a daemon if none answers; the ``LunaDaemon``, or None if there was one.

    Raises:
        ConfigError, DaemonConnectionError: as the daemon said.
    """
    from luna_daemon.config import load_settings
    from luna_daemon.daemon_server import LunaDaemon

    if get_client().is_running():
        return None
    daemon = LunaDaemon(**daemon_settings(paths, list(load_settings().model_dirs)))
    try:
        daemon.start()
    except PortInUse:
        if get_client().is_running():  # another ComfyUI was faster
            return None
        raise
    toast(f"Luna Daemon was started (process {daemon.pid}, port {daemon.port})", "success")
    if choice == WITH_COMFYUI:
        atexit.register(_stop, daemon)
        _watch(get_client())
    return daemon


def _stop(daemon: Any) -> None:
    daemon.stop(timeout_s=5.0)


def _watch(client: DaemonClient) -> subprocess.Popen[bytes]:
    """A process that ends the daemon when this one is gone without having said so: killed, or crashed."""
    watcher = Path(__file__).with_name("watcher.py")
    where = [client.host, str(client.port), str(client.runtime_dir or "")]
    return subprocess.Popen(
        [sys.executable, str(watcher), str(os.getpid()), *where],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )  # fmt: skip
