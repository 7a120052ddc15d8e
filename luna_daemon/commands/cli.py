"""The ``luna-daemon`` command: runs the daemon, and queries, reloads, measures and stops a running one.

``serve`` must listen as fast as it can, so each command imports inside itself what only that command needs. Results go
to stdout, everything else to stderr.
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
from ..system.ports import answers
from . import models
from .lora import lora_app
from .options import (
    AsJson,
    Backend,
    ComfyUI,
    ComfyUIPython,
    Config,
    Device,
    Host,
    ModelDirs,
    Port,
    Precision,
    Runtime,
    Service,
    WsPort,
    client_for,
    dial,
)
from .terminal import print_json, print_result, show_checks, show_status

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

_LOG_LEVEL = typer.Option(metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR [INFO].")
_LOG_JSON = typer.Option("--log-json", help="Log one JSON object per line.")
_LOG_FILE = typer.Option(metavar="FILE", help="Log to this file too, rotated at 5 MB.")
_INTERVAL = typer.Option(metavar="SECONDS", help="Time between two updates.", min=0.1)
_ONCE = typer.Option("--once", help="Print the tables once and end.")
_TIMEOUT = typer.Option(metavar="SECONDS", help="Longest wait for the daemon's end.", min=0)
_ROUNDS = typer.Option(metavar="COUNT", help="How often each call is timed.", min=1)
_RENEW = typer.Option("--renew", help="Make a new token; clients that have the old one are refused.")


def main(argv: list[str] | None = None) -> None:
    """Run the command and exit with 0, 1 (no daemon, or an error), 2 (wrong usage or setting) or 3 (port in use)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        app(arguments, prog_name="luna-daemon")
    except LunaError as error:
        if "--json" in arguments:
            status = "stopped" if isinstance(error, DaemonConnectionError) else "error"
            print_json({"status": status, "error": error.code, "message": error.message, "hint": error.hint})
        typer.echo(f"luna-daemon: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"luna-daemon {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    logging.basicConfig(format="luna-daemon: %(message)s", level=logging.WARNING)


@app.command()
def serve(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    comfyui: ComfyUI = None, comfyui_python: ComfyUIPython = None, model_dir: ModelDirs = None,
    vae_device: Device = None, clip_device: Device = None, backend: Backend = None, service_type: Service = None,
    log_level: Annotated[str | None, _LOG_LEVEL] = None, log_json: Annotated[bool, _LOG_JSON] = False,
    log_file: Annotated[Path | None, _LOG_FILE] = None, runtime_dir: Runtime = None,
) -> None:  # fmt: skip
    """Run the daemon until Ctrl-C or 'luna-daemon stop'."""
    logs.set_up(log_json)  # loading the settings may log warnings
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
    """Show the running daemon's work, workers, models and clients."""
    with dial(host, port, config, runtime_dir) as client:
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
    """Show a live view of the daemon; q or Ctrl-C quits."""
    from .top import print_once, watch

    if once or not sys.stdout.isatty():
        with dial(host, port, config, runtime_dir) as client:
            print_once(client.get_daemon_info(), f"{client.host}:{client.port}")
    else:
        with client_for(host, port, config, runtime_dir) as client:
            watch(client, interval)


for command in (models.models, models.warm, models.unload):
    app.command()(command)


@app.command()
def token(
    renew: Annotated[bool, _RENEW] = False,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Print the token that clients need to connect."""
    from ..system.runtime import find_token
    from ..wire.messages import TokenRenew

    with dial(host, port, config, runtime_dir) as client:
        # Asked first: a renewed token ends this connection too.
        here = _is_here(client, client.get_daemon_info()["pid"])
        if renew:
            client.call(TokenRenew())
        text = find_token(client.port, client.runtime_dir, {}) if here else ""
    if not text:
        raise AuthenticationError(
            f"the token of {client.host}:{client.port} is not on this machine", "Run this on the daemon's machine"
        )
    print_result(as_json, {"token": text, "renewed": renew}, text)


@app.command()
def reload(
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Apply changed settings without a restart."""
    from ..wire.messages import Reload

    with dial(host, port, config, runtime_dir) as client:
        changes = client.call(Reload()).result
    restart = f"\nneeds a restart: {', '.join(changes['restart'])}" if changes["restart"] else ""
    print_result(as_json, changes, f"applied: {', '.join(changes['taken']) or 'nothing has changed'}{restart}")


@app.command()
def stop(
    timeout: Annotated[float, _TIMEOUT] = 60.0,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Let running requests finish, then end the daemon."""
    began = time.monotonic()
    with dial(host, port, config, runtime_dir) as client:
        info = client.get_daemon_info()
        client.shutdown()
        has_stopped = _end_of(client, info["pid"])
    while not has_stopped() and time.monotonic() - began < timeout:
        time.sleep(0.02)
    ended, waited = has_stopped(), time.monotonic() - began
    if as_json:
        state = "stopped" if ended else "draining"
        print_json({"status": state, "pid": info["pid"], "waited_s": round(waited, 3)})
    elif ended:
        typer.echo(f"Luna Daemon (pid {info['pid']}) has stopped after {waited:.1f} s")
    if not ended:
        still = f"process {info['pid']} still finishes requests after {waited:.0f} s. Wait, or kill the process"
        typer.echo(f"luna-daemon: {still}", err=True)
        raise typer.Exit(1)


@app.command()
def doctor(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    comfyui: ComfyUI = None, comfyui_python: ComfyUIPython = None, model_dir: ModelDirs = None,
    vae_device: Device = None, clip_device: Device = None, backend: Backend = None,
    runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Check machine and settings, and say how to fix each problem.

    Takes the options of 'serve', and checks what 'serve' would do with them.
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
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compare calls on this machine with a memory copy.

    Measures the running daemon; without one, starts a daemon for the measurement.
    """
    from contextlib import ExitStack

    from .bench import measure, own_daemon, show_numbers

    with ExitStack() as stack:
        try:
            client, own = dial(host, port, config, runtime_dir), False
        except DaemonConnectionError:
            client, own = own_daemon(stack, config), True
        numbers = measure(stack.enter_context(client), rounds)
    if as_json:
        print_json({"own_daemon": own, **numbers})
    else:
        show_numbers(numbers)


@app.command()
def tray(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    comfyui: ComfyUI = None, comfyui_python: ComfyUIPython = None, model_dir: ModelDirs = None,
    device: Device = None, vae_precision: Precision = None, clip_precision: Precision = None,
    service_type: Service = None, runtime_dir: Runtime = None,
) -> None:  # fmt: skip
    """Show a tray icon that starts, watches and stops the daemon."""
    logs.set_up()
    from ..daemon_server import LunaDaemon
    from ..tray_app import run_tray

    def daemon() -> LunaDaemon:
        return LunaDaemon(
            host, port, ws_port, device=device, clip_precision=clip_precision, vae_precision=vae_precision,
            service_type=service_type, config_file=config, comfyui_path=comfyui, comfyui_python=comfyui_python,
            model_dirs=model_dir or None, runtime_dir=runtime_dir,
        )  # fmt: skip

    run_tray(daemon)


def _is_here(client: DaemonClient, pid: int) -> bool:
    """Return whether the runtime folder on this machine is that of the client's daemon."""
    from ..system.runtime import read_facts

    return read_facts(client.port, client.runtime_dir).get("pid") == pid


def _end_of(client: DaemonClient, pid: int) -> Callable[[], bool]:
    """Make a function that checks if the daemon has ended: here by its process, on another machine by its port."""
    from ..system.runtime import has_ended, runtime_folder

    if _is_here(client, pid):
        return lambda: has_ended(pid, runtime_folder(client.port, client.runtime_dir))
    return lambda: not answers(client.host, client.port)


def _status_page(client: DaemonClient, info: dict[str, Any], asked: int | None) -> str:
    """Give the address of the status page, at the port ``asked`` if any: the daemon's own port may be forwarded."""
    from ..system.runtime import page_address

    ws_port, tls = info["ws_port"], info["tls"]
    if asked is not None and asked != ws_port:
        address = page_address(tls, client.host, asked) + "/"
        return address if answers(client.host, asked) else f"{address} does not answer"
    no_page = "none: its port is taken, or the daemon has just started"
    return page_address(tls, client.host, ws_port) + "/" if ws_port else no_page


app.add_typer(lora_app, name="lora")
