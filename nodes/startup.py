"""Start of the pack in ComfyUI: panel, toasts, and the daemon, if ``LUNA_START_FROM_COMFYUI`` says so.

- ``off``, the default: nothing is started.
- ``with_comfyui``: a daemon is started if none answers, and stops when this ComfyUI ends, even by a crash.
- ``independent``: a daemon is started if none answers, and stays.

The environment variable wins; without it the setting ``Luna.StartFromComfyUI`` of ComfyUI's window is read. The daemon
is always a separate process, which runs on this ComfyUI's interpreter and reads this ComfyUI's model folders.
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

VARIABLE, SETTING = "LUNA_START_FROM_COMFYUI", "Luna.StartFromComfyUI"
OFF, WITH_COMFYUI, INDEPENDENT = CHOICES = ("off", "with_comfyui", "independent")
_MODEL_FOLDERS = ("checkpoints", "text_encoders", "vae", "vae_approx", "loras")


def chosen(environ: Mapping[str, str], settings_file: Path | None = None) -> str:
    """Read the choice: ``off``, ``with_comfyui`` or ``independent``; another value is logged and counts as ``off``."""
    value = environ.get(VARIABLE, "").strip() or _from_window(settings_file)
    if value not in CHOICES:
        names = f"{VARIABLE} (or {SETTING} in ComfyUI's settings)"
        logger.warning("%s is %r, and must be one of %s; no daemon is started", names, value, ", ".join(CHOICES))
        return OFF
    return value


def _from_window(settings_file: Path | None) -> str:
    try:
        value = json.loads(settings_file.read_text("utf-8")).get(SETTING) if settings_file else None
    except (OSError, ValueError, AttributeError):
        return OFF
    return str(value or OFF)


def daemon_settings(paths: Any, configured: list[Path]) -> dict[str, Any]:
    """Settings of a daemon that serves this ComfyUI.

    Args:
        paths: ComfyUI's ``folder_paths``.
        configured: ``model_dirs`` of the user's own settings.
    """
    folders = [Path(folder) for kind in _MODEL_FOLDERS for folder in paths.get_folder_paths(kind)]
    return {
        "comfyui_path": Path(paths.__file__).resolve().parent,
        "comfyui_python": Path(sys.executable),
        "model_dirs": list(dict.fromkeys([*configured, *(folder for folder in folders if folder.is_dir())])),
    }


def begin() -> threading.Thread | None:
    """Serve the panel, show warnings as toasts, and start the daemon if that is chosen.

    Returns:
        The thread that starts the daemon, so that ComfyUI need not wait; ``None`` if nothing is started.
    """
    paths = sys.modules.get("folder_paths")
    if paths is None:
        return None
    show_warnings()
    _serve_panel()
    choice = chosen(os.environ, Path(paths.get_user_directory()) / "default" / "comfy.settings.json")
    if choice == OFF:
        return None
    thread = threading.Thread(target=_start_or_warn, args=(paths, choice), name="luna-start", daemon=True)
    thread.start()
    return thread


def _serve_panel() -> None:
    """Add the panel's routes to ComfyUI's server, if there is one; an incompatible ComfyUI keeps the nodes."""
    server = host.server()
    if server is None:
        return
    try:
        from .panel import install

        install(server)
    except Exception:
        logger.exception("the Luna panel does not fit this ComfyUI; the nodes work without the panel")


def _start_or_warn(paths: Any, choice: str) -> None:
    try:
        start_daemon(paths, choice)
    except LunaError as error:
        logger.warning("the daemon was not started: %s", error)


def start_daemon(paths: Any, choice: str) -> Any:
    """Start a daemon if none answers.

    Args:
        paths: ComfyUI's ``folder_paths``.
        choice: ``with_comfyui`` or ``independent``.

    Returns:
        The ``LunaDaemon``; ``None`` if a daemon runs already.

    Raises:
        ConfigError, PortInUse: the daemon's reason not to start.
        DaemonConnectionError: the daemon did not answer in time.
    """
    from luna_daemon.config import load_settings
    from luna_daemon.daemon_server import LunaDaemon

    client = get_client()
    if client.is_running():
        return None
    daemon = LunaDaemon(**daemon_settings(paths, list(load_settings().model_dirs)))
    try:
        daemon.start()
    except PortInUse:
        if client.is_running():  # another ComfyUI was faster
            return None
        raise
    toast(f"Luna Daemon was started (process {daemon.pid}, port {daemon.port})", "success")
    if choice == WITH_COMFYUI:
        atexit.register(daemon.stop, timeout_s=5.0)
        _watch(client)
    return daemon


def _watch(client: DaemonClient) -> subprocess.Popen[bytes]:
    """Start a process that stops the daemon when this one was killed or has crashed."""
    watcher = Path(__file__).with_name("watcher.py")
    where = [client.host, str(client.port), str(client.runtime_dir or "")]
    return subprocess.Popen(
        [sys.executable, str(watcher), str(os.getpid()), *where],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )  # fmt: skip
