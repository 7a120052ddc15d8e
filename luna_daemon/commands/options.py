"""Options that several commands share, and connecting to the daemon that these options name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core import DaemonConnectionError

if TYPE_CHECKING:
    from ..client import DaemonClient

Host = Annotated[str | None, typer.Option(metavar="HOST", help="Address of the daemon [127.0.0.1].")]
Port = Annotated[int | None, typer.Option(metavar="PORT", help="Port of the daemon [19283].")]
WsPort = Annotated[int | None, typer.Option(metavar="PORT", help="Port of the status page [19284].")]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Configuration file [luna.toml in the current folder].")
]
Runtime = Annotated[
    Path | None,
    typer.Option("--runtime-dir", metavar="FOLDER", help="Folder of the daemon's token [one per user]."),
]
ComfyUI = Annotated[Path | None, typer.Option(metavar="FOLDER", help="ComfyUI's folder [COMFYUI_PATH].")]
ComfyUIPython = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Interpreter that runs ComfyUI [COMFYUI_PYTHON].")
]
ModelDirs = Annotated[list[Path] | None, typer.Option(metavar="FOLDER", help="Folder with models; may be repeated.")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda:1 or a GPU's UUID [auto].")]
Backend = Annotated[
    str | None, typer.Option(metavar="NAME", help="Software that runs models: auto, comfy or diffusers [auto].")
]
Precision = Annotated[str | None, typer.Option(metavar="NAME", help="auto, fp32, fp16 or bf16 [auto].")]
Service = Annotated[str | None, typer.Option(metavar="NAME", help="Work to accept: full, vae or clip [full].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def client_for(host: str | None, port: int | None, config: Path | None, runtime_dir: Path | None) -> DaemonClient:
    """Make a client of the daemon that options and settings name, without connecting to the daemon yet.

    Raises:
        ConfigError: a setting is wrong.
    """
    from ..client import DaemonClient
    from ..config import load_settings
    from ..system.runtime import runtime_folder

    settings = load_settings({"host": host, "port": port, "runtime_dir": runtime_dir}, config_file=config)
    # Without a folder the client would load the settings again, and ignore --config.
    folder = runtime_folder(settings.port, settings.runtime_dir).parent
    return DaemonClient(settings.host, settings.port, runtime_dir=folder, name="luna-daemon")


def dial(host: str | None, port: int | None, config: Path | None, runtime_dir: Path | None) -> DaemonClient:
    """Connect to the daemon that options and settings name.

    Raises:
        ConfigError: a setting is wrong.
        DaemonConnectionError: no daemon answers; the message says if a daemon is starting or stopping.
    """
    from ..system.runtime import has_ended, read_facts, runtime_folder

    client = client_for(host, port, config, runtime_dir)
    try:
        client.ping()
    except DaemonConnectionError as error:
        pid = read_facts(client.port, client.runtime_dir).get("pid")
        if pid is None or has_ended(pid, runtime_folder(client.port, client.runtime_dir)):
            raise
        raise DaemonConnectionError(
            f"Luna Daemon (pid {pid}) does not answer on {client.host}:{client.port}",
            "It is starting, or finishing its requests: ask again in a moment",
        ) from error
    return client
