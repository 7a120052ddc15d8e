"""LunaDaemonStatus: what the daemon does, as text."""

from __future__ import annotations

from typing import Any

from luna_daemon.client import get_client
from luna_daemon.core import LunaError

from .. import host

__all__ = ["LunaDaemonStatus", "status_text"]

_GIB = 1 << 30


class LunaDaemonStatus:
    """Asks the daemon in every prompt, and shows the answer on the node."""

    CATEGORY = "Luna"
    DESCRIPTION = "Shows whether the Luna Daemon answers, what it holds, and what it has done."
    SEARCH_ALIASES = ["daemon status", "luna status", "show daemon", "vram usage"]
    RETURN_TYPES = ("STRING", "BOOLEAN")
    RETURN_NAMES = ("status", "running")
    OUTPUT_TOOLTIPS = ("The same text as on the node.", "Whether a daemon answers.")
    FUNCTION = "status"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {"after": (host.ANY, {"tooltip": "Anything; the daemon is asked once it is there."})},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # equals nothing: runs in every prompt

    def status(self, after: Any = None) -> dict[str, Any]:
        try:
            text, running = status_text(get_client().get_daemon_info()), True
        except LunaError as error:
            text, running = f"no daemon answers: {error}", False
        return {"ui": {"text": [text]}, "result": (text, running)}


def status_text(info: dict[str, Any]) -> str:
    """The ``info`` answer in a few lines."""
    requests = ", ".join(f"{op} {count}" for op, count in sorted(info["requests"].items())) or "none yet"
    lines = [
        f"Luna Daemon {info['version']}, {info['status']}, process {info['pid']}, backend {info['backend']}",
        f"reached by {info['transport']}; {len(info['clients'])} clients; {info['queue']['waiting']} requests wait",
        f"requests: {requests}",
        f"answered locally instead: {info['fallbacks']}; weights loaded locally: {info['materialised']}",
    ]
    lines += [_worker_text(worker) for worker in info["workers"]] or ["no worker runs: nothing is loaded"]
    return "\n".join(lines)


def _worker_text(worker: dict[str, Any]) -> str:
    held = ", ".join(f"{key} ({size / _GIB:.2f} GiB)" for key, size in worker["models"].items()) or "no model"
    return f"worker {worker['number']} on {worker['device']}, {worker['state']}: {held}"
