"""The ``luna-daemon`` command: run the daemon, and ask, fill, measure and stop a running one.

``serve`` must listen as fast as it can, so what only other commands need is imported inside them. Facts go to
stdout, everything else to stderr.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..core import AuthenticationError, DaemonConnectionError, LunaError, logger
from ..system import logs
from ..system.units import count
from .terminal import LOADED, Bar, loaded_rows, print_json, show_checks, show_status, tables

if TYPE_CHECKING:
    from ..client import DaemonClient

app = typer.Typer(
    help="Hold VAEs and text encoders once and serve every ComfyUI instance on this machine.",
    epilog="Every setting is also read from LUNA_* variables and luna.toml: see docs/configuration.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_HOST = typer.Option(metavar="HOST", help="Address of the daemon [127.0.0.1].")
_PORT = typer.Option(metavar="PORT", help="Port of the daemon [19283].")
_WS_PORT = typer.Option(metavar="PORT", help="Port of its status page [19284].")
_CONFIG = typer.Option(metavar="FILE", help="Configuration file [luna.toml in this folder].")
_RUNTIME = typer.Option("--runtime-dir", metavar="FOLDER", help="Folder of its token [one per user].")
_COMFYUI = typer.Option(metavar="FOLDER", help="ComfyUI's folder [COMFYUI_PATH].")
_COMFYUI_PYTHON = typer.Option(metavar="FILE", help="The interpreter that runs it [COMFYUI_PYTHON].")
_MODEL_DIR = typer.Option(metavar="FOLDER", help="A folder with models; may be repeated.")
_DEVICE = typer.Option(metavar="DEVICE", help="auto, cpu, cuda:1 or a GPU's UUID [auto].")
_BACKEND = typer.Option(metavar="NAME", help="What runs the models: auto, comfy or diffusers [auto].")
_SERVICE = typer.Option(metavar="NAME", help="What work to accept: full, vae or clip [full].")
_PRECISION = typer.Option(metavar="NAME", help="auto, fp32, fp16 or bf16 [auto].")
_LOG_LEVEL = typer.Option(metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR [INFO].")
_LOG_JSON = typer.Option("--log-json", help="Log one JSON object per line.")
_LOG_FILE = typer.Option(metavar="FILE", help="Log to this file too, rotated at 5 MB.")
_INTERVAL = typer.Option(metavar="SECONDS", help="How often it is drawn anew.", min=0.1)
_ONCE = typer.Option("--once", help="Print one picture and end.")
_KIND = typer.Option(metavar="KIND", help="What to load of it: vae, clip or all.")
_PIN = typer.Option("--pin", help="Keep it loaded until it is unloaded.")
_TIMEOUT = typer.Option(metavar="SECONDS", help="How long to wait for its end.", min=0)
_ROUNDS = typer.Option(metavar="COUNT", help="How often each call is timed.", min=1)
_RENEW = typer.Option("--renew", help="Make another; whoever has the old one is locked out.")
_JSON = typer.Option("--json", help="Print one JSON document and nothing else.")

Host = Annotated[str | None, _HOST]
Port = Annotated[int | None, _PORT]
WsPort = Annotated[int | None, _WS_PORT]
Config = Annotated[Path | None, _CONFIG]
Runtime = Annotated[Path | None, _RUNTIME]
ComfyUI = Annotated[Path | None, _COMFYUI]
ComfyUIPython = Annotated[Path | None, _COMFYUI_PYTHON]
ModelDirs = Annotated[list[Path] | None, _MODEL_DIR]
Device = Annotated[str | None, _DEVICE]
Backend = Annotated[str | None, _BACKEND]
Precision = Annotated[str | None, _PRECISION]
Service = Annotated[str | None, _SERVICE]
AsJson = Annotated[bool, _JSON]


def main(argv: list[str] | None = None) -> None:
    """Run the command; ends with 0, 1 (no daemon, or it said no), 2 (wrong usage or setting) or 3 (port in use)."""
    from . import lora  # noqa: F401 (adds its commands)

    arguments = sys.argv[1:] if argv is None else argv
    try:
        app(arguments, prog_name="luna-daemon")
    except LunaError as error:
        if "--json" in arguments:
            status = "stopped" if isinstance(error, DaemonConnectionError) else "error"
            print_json({"status": status, "error": error.code, "message": error.message, "hint": error.hint})
        typer.echo(f"luna-daemon: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"luna-daemon {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    logging.basicConfig(format="luna-daemon: %(message)s", level=logging.WARNING)


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    ws_port: WsPort = None,
    config: Config = None,
    comfyui: ComfyUI = None,
    comfyui_python: ComfyUIPython = None,
    model_dir: ModelDirs = None,
    vae_device: Device = None,
    clip_device: Device = None,
    backend: Backend = None,
    service_type: Service = None,
    log_level: Annotated[str | None, _LOG_LEVEL] = None,
    log_json: Annotated[bool, _LOG_JSON] = False,
    log_file: Annotated[Path | None, _LOG_FILE] = None,
    runtime_dir: Runtime = None,
) -> None:
    """Run the daemon until Ctrl-C or 'luna-daemon stop'."""
    logs.set_up(log_json)  # the settings may warn already
    from ..daemon_server import LunaDaemon

    daemon = LunaDaemon(
        host, port, ws_port, service_type=service_type, config_file=config, comfyui_path=comfyui,
        comfyui_python=comfyui_python, model_dirs=model_dir or None, vae_device=vae_device, clip_device=clip_device,
        backend=backend, log_level=log_level.upper() if log_level else None, runtime_dir=runtime_dir,
        log_json=log_json or None, log_file=log_file,
    )  # fmt: skip
    logs.set_up(daemon.settings.log_json, daemon.settings.log_file)
    logger.setLevel(daemon.settings.log_level)
    daemon.run()


@app.command()
def status(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show what the running daemon does and holds."""
    with _dial(host, port, config, runtime_dir) as client:
        info = client.get_daemon_info()
        if as_json:
            print_json(info)
        else:
            show_status(info, f"{client.host}:{client.port}", _status_page(client, info, ws_port))


@app.command()
def top(
    interval: Annotated[float, _INTERVAL] = 1.0,
    once: Annotated[bool, _ONCE] = False,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
) -> None:  # fmt: skip
    """Watch the daemon: q or Ctrl-C ends it."""
    from .top import print_once, watch

    if once or not sys.stdout.isatty():
        with _dial(host, port, config, runtime_dir) as client:
            print_once(client.get_daemon_info(), f"{client.host}:{client.port}")
    else:
        with _client(host, port, config, runtime_dir) as client:
            watch(client, interval)


@app.command()
def models(
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """List the models by name, and those loaded."""
    with _dial(host, port, config, runtime_dir) as client:
        listing = client.models()
    if as_json:
        print_json(listing)
        return
    named = [
        (name, model["type"], kind, "\n".join(model[kind]))
        for name, model in listing["named"].items()
        for kind in ("vae", "clip")
        if model[kind]
    ]
    tables(("Named", "name type kind files", named), ("Loaded", LOADED, loaded_rows(listing)))


@app.command()
def warm(
    name: Annotated[str, typer.Argument(help="A name that 'luna-daemon models' lists.")],
    kind: Annotated[str, _KIND] = "all",
    pin: Annotated[bool, _PIN] = False,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Load a model before the first request needs it."""
    from ..wire.messages import ModelRef

    loaded = {}
    with _dial(host, port, config, runtime_dir) as client:
        for one in _kinds(client, name, kind):
            with Bar(f"{name} ({one})") as bar:
                loaded[one] = client.warm(ModelRef(one, name), pin, bar.progress)
        info = client.get_daemon_info()
    if as_json:
        print_json({"model": name, "pinned": pin, "loaded": loaded})
        return
    for one, properties in loaded.items():
        # Which of its kind was pinned before is not told: then nothing is promised.
        pinned_before = any(key.startswith(f"{one}:") for key in info["models"]["pinned"])
        until = "" if pinned_before else f" until it has been idle for {info['idle_timeout_s']:g} s; --pin keeps it"
        typer.echo(f"{name} ({one}) is loaded{' and pinned' if pin else until}")
        tables(("", "property value", [(key, str(value)) for key, value in properties.items()]))


@app.command()
def unload(
    name: Annotated[str | None, typer.Argument(help="A model's name.", show_default="all models")] = None,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Give the memory of one model, or of all, back."""
    from ..wire.messages import ModelRef, ModelUnload

    with _dial(host, port, config, runtime_dir) as client:
        refs = [ModelRef(kind, name) for kind in _kinds(client, name, "all")] if name else [None]
        gone = sum(client.call(ModelUnload(ref)).result["unloaded"] for ref in refs)
    if as_json:
        print_json({"unloaded": gone})
    else:
        typer.echo(f"unloaded {count(gone, 'model')}")


@app.command()
def token(
    renew: Annotated[bool, _RENEW] = False,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Print the token that lets clients in."""
    from ..system.runtime import find_token
    from ..wire.messages import TokenRenew

    with _dial(host, port, config, runtime_dir) as client:
        if renew:
            client.call(TokenRenew())
        found = find_token(client.port, client.runtime_dir, {})
    if not found:
        raise AuthenticationError(
            f"the token of {client.host}:{client.port} is not on this machine", "Ask on the daemon's own"
        )
    if as_json:
        print_json({"token": found, "renewed": renew})
    else:
        typer.echo(found)


@app.command()
def reload(
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Take new settings without a stop."""
    from ..wire.messages import Reload

    with _dial(host, port, config, runtime_dir) as client:
        found = client.call(Reload()).result
    if as_json:
        print_json(found)
        return
    typer.echo(f"taken: {', '.join(found['taken']) or 'nothing has changed'}")
    if found["restart"]:
        typer.echo(f"only after a restart: {', '.join(found['restart'])}")


@app.command()
def stop(
    timeout: Annotated[float, _TIMEOUT] = 60.0,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Let running requests finish, then end the daemon."""
    began = time.monotonic()
    with _dial(host, port, config, runtime_dir) as client:
        info = client.get_daemon_info()
        client.shutdown()
        gone = _end_of(client, info["pid"])
    while not gone() and time.monotonic() - began < timeout:
        time.sleep(0.02)
    ended, waited = gone(), time.monotonic() - began
    facts = {"status": "stopped" if ended else "draining", "pid": info["pid"], "waited_s": round(waited, 3)}
    if as_json:
        print_json(facts)
    elif ended:
        typer.echo(f"Luna Daemon (pid {info['pid']}) has stopped after {waited:.1f} s")
    if not ended:
        typer.echo(
            f"luna-daemon: process {info['pid']} still finishes its requests after {waited:.0f} s. "
            "Wait, or end the process",
            err=True,
        )
        raise typer.Exit(1)


@app.command()
def doctor(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    comfyui: ComfyUI = None, comfyui_python: ComfyUIPython = None, model_dir: ModelDirs = None,
    vae_device: Device = None, clip_device: Device = None, backend: Backend = None,
    runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Check machine and settings, and say what to do.

    Takes the options of 'serve' that decide what is loaded and where, and checks what would be served.
    """
    from .doctor import examine

    overrides = {
        "host": host, "port": port, "ws_port": ws_port, "runtime_dir": runtime_dir, "comfyui_path": comfyui,
        "comfyui_python": comfyui_python, "model_dirs": model_dir or None, "vae_device": vae_device,
        "clip_device": clip_device, "backend": backend,
    }  # fmt: skip
    checks = examine(overrides, config)
    problems = sum(check.level == "problem" for check in checks)
    if as_json:
        listing = [{"name": c.name, "level": c.level, "found": c.found, "advice": c.advice} for c in checks]
        print_json({"problems": problems, "checks": listing})
    else:
        show_checks(checks)
    raise typer.Exit(1 if problems else 0)


@app.command()
def bench(
    rounds: Annotated[int, _ROUNDS] = 30,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Time calls on this machine beside a memory copy.

    Uses the running daemon, or one of its own for as long as it takes.
    """
    from contextlib import ExitStack

    from .bench import measure, own_daemon, show_numbers

    with ExitStack() as stack:
        try:
            client, own = _dial(host, port, config, runtime_dir), False
        except DaemonConnectionError:
            client, own = own_daemon(stack, config), True
        numbers = measure(stack.enter_context(client), rounds)
    if as_json:
        print_json({"own_daemon": own, **numbers})
        return
    show_numbers(numbers)


@app.command()
def tray(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    comfyui: ComfyUI = None, comfyui_python: ComfyUIPython = None, model_dir: ModelDirs = None,
    device: Device = None, vae_precision: Precision = None, clip_precision: Precision = None,
    service_type: Service = None, runtime_dir: Runtime = None,
) -> None:  # fmt: skip
    """Start, watch and stop the daemon from a tray icon."""
    logs.set_up()
    from ..daemon_server import LunaDaemon
    from ..tray_app import TrayRunning, TrayUnavailable, run_tray

    def daemon() -> LunaDaemon:
        return LunaDaemon(
            host, port, ws_port, device=device, clip_precision=clip_precision, vae_precision=vae_precision,
            service_type=service_type, config_file=config, comfyui_path=comfyui, comfyui_python=comfyui_python,
            model_dirs=model_dir or None, runtime_dir=runtime_dir,
        )  # fmt: skip

    try:
        run_tray(daemon)
    except (TrayUnavailable, TrayRunning) as error:
        typer.echo(f"luna-daemon: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, TrayRunning) else 2) from None


# --- reaching the daemon ---


def _dial(host: str | None, port: int | None, config: Path | None, runtime_dir: Path | None) -> DaemonClient:
    """A client that has reached the daemon.

    Raises:
        DaemonConnectionError: none answers; one that is about to end is told from none at all.
    """
    from ..system.runtime import has_ended, read_facts, runtime_folder

    client = _client(host, port, config, runtime_dir)
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


def _client(host: str | None, port: int | None, config: Path | None, runtime_dir: Path | None) -> DaemonClient:
    """A client of the daemon that the settings mean; nothing is dialled yet."""
    from ..client import DaemonClient
    from ..config import load_settings
    from ..system.runtime import dial_host, runtime_folder

    settings = load_settings({"host": host, "port": port, "runtime_dir": runtime_dir}, config_file=config)
    # Given a folder, the client need not read the settings once more, and without --config.
    folder = runtime_folder(settings.port, settings.runtime_dir).parent
    return DaemonClient(dial_host(settings.host), settings.port, runtime_dir=folder, name="luna-daemon")


def _end_of(client: DaemonClient, pid: int) -> Callable[[], bool]:
    """Tells whether the daemon is gone: its process here, its socket on another machine."""
    from ..system.runtime import has_ended, read_facts, runtime_folder

    if read_facts(client.port, client.runtime_dir).get("pid") == pid:
        return lambda: has_ended(pid, runtime_folder(client.port, client.runtime_dir))

    return lambda: not _listens(client.host, client.port)


def _listens(host: str, port: int) -> bool:
    import socket

    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def _status_page(client: DaemonClient, info: dict[str, Any], asked: int | None) -> str:
    """Where the daemon says that its page is; a port of the command line is tried instead, for a forwarded one."""
    from ..system.runtime import page_address

    ws_port, tls = info["ws_port"], info["tls"]
    if asked is not None and asked != ws_port:
        address = page_address(tls, client.host, asked) + "/"
        return address if _listens(client.host, asked) else f"{address} does not answer"
    starts = "none: its port is taken, or the daemon has just started"
    return page_address(tls, client.host, ws_port) + "/" if ws_port else starts


def _kinds(client: DaemonClient, name: str, kind: str) -> list[str]:
    """Which kinds of a named model are meant. An unknown name passes: the daemon's own refusal is better."""
    if kind not in ("vae", "clip", "all"):
        raise typer.BadParameter(f"{kind!r} is not one of vae, clip, all", param_hint="--kind")
    named = client.models()["named"]
    model = named.get(name) or named.get(name.lower()) or {"vae": ["?"]}
    return [kind] if kind != "all" else [one for one in ("vae", "clip") if model.get(one)]
