"""LunaDaemonStatus: the daemon's status as text."""

from __future__ import annotations

from typing import Any

from luna_daemon.client import get_client
from luna_daemon.core import LunaError

from .. import host

_GIB = 1 << 30


class LunaDaemonStatus:
    """Node that asks the daemon in every run of a workflow and shows the answer."""

    CATEGORY = "Luna"
    DESCRIPTION = "Shows whether the Luna Daemon answers, which models it holds, and how many requests it has served."
    SEARCH_ALIASES = ["daemon status", "luna status", "show daemon", "vram usage"]
    RETURN_TYPES = ("STRING", "BOOLEAN")
    RETURN_NAMES = ("status", "running")
    OUTPUT_TOOLTIPS = ("The text that the node shows.", "Whether a daemon answers.")
    FUNCTION = "status"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Take any value, which decides when the daemon is asked."""
        return {
            "required": {},
            "optional": {"after": (host.ANY, {"tooltip": "Any value; the daemon is asked after its computation."})},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        """Make ComfyUI run the node each time, also with unchanged inputs."""
        return float("nan")  # equals nothing

    def status(self, after: Any = None) -> dict[str, Any]:
        """Ask the daemon; the result is the text, and whether a daemon answers."""
        try:
            text, running = status_text(get_client().get_daemon_info()), True
        except LunaError as error:
            text, running = f"no daemon answers: {error}", False
        return {"ui": {"text": [text]}, "result": (text, running)}


def status_text(info: dict[str, Any]) -> str:
    """Word an ``info`` answer in a few lines."""
    requests = ", ".join(f"{op} {count}" for op, count in sorted(info["requests"].items())) or "none yet"
    lines = [
        f"Luna Daemon {info['version']}, {info['status']}, process {info['pid']}, backend {info['backend']}",
        f"transport: {info['transport']}; {len(info['clients'])} clients; {info['queue']['waiting']} requests queued",
        f"requests: {requests}",
        f"fallbacks to local models: {info['fallbacks']}; models loaded locally: {info['materialised']}",
    ]
    lines += [_worker_text(worker) for worker in info["workers"]] or ["no worker is running: nothing is loaded"]
    return "\n".join(lines)


def _worker_text(worker: dict[str, Any]) -> str:
    held = ", ".join(f"{key} ({size / _GIB:.2f} GiB)" for key, size in worker["models"].items()) or "no model"
    return f"worker {worker['number']} on {worker['device']}, {worker['state']}: {held}"
