"""``luna-daemon models``, ``warm`` and ``unload``: lists, loads and frees models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..system.units import count
from .options import AsJson, Config, Host, Port, Runtime, dial
from .terminal import LOADED, Bar, loaded_rows, print_json, print_result, tables

if TYPE_CHECKING:
    from ..client import DaemonClient

_KIND = typer.Option(metavar="KIND", help="Part of the model to load: vae, clip or all.")
_PIN = typer.Option("--pin", help="Keep the model loaded until it is unloaded.")


def models(
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """List the named models and the loaded models."""
    with dial(host, port, config, runtime_dir) as client:
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


def warm(
    name: Annotated[str, typer.Argument(help="A name that 'luna-daemon models' lists.")],
    kind: Annotated[str, _KIND] = "all",
    pin: Annotated[bool, _PIN] = False,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Load a model before the first request needs it."""
    from ..wire.messages import ModelRef

    loaded = {}
    with dial(host, port, config, runtime_dir) as client:
        for part in _kinds(client, name, kind):
            with Bar(f"{name} ({part})") as bar:
                loaded[part] = client.warm(ModelRef(part, name), pin, bar.progress)
        info = client.get_daemon_info()
    if as_json:
        print_json({"model": name, "pinned": pin, "loaded": loaded})
        return
    for part, properties in loaded.items():
        # A pinned model may be this one: the daemon lists pinned models by key, not by name.
        pinned_before = any(key.startswith(f"{part}:") for key in info["models"]["pinned"])
        until = "" if pinned_before else f" until it has been idle for {info['idle_timeout_s']:g} s; --pin keeps it"
        typer.echo(f"{name} ({part}) is loaded{' and pinned' if pin else until}")
        tables(("", "property value", [(key, str(value)) for key, value in properties.items()]))


def unload(
    name: Annotated[str | None, typer.Argument(help="A model's name.", show_default="all models")] = None,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Free the memory of one model, or of all models."""
    from ..wire.messages import ModelRef, ModelUnload

    with dial(host, port, config, runtime_dir) as client:
        refs = [ModelRef(kind, name) for kind in _kinds(client, name, "all")] if name else [None]
        unloaded = sum(client.call(ModelUnload(ref)).result["unloaded"] for ref in refs)
    print_result(as_json, {"unloaded": unloaded}, f"unloaded {count(unloaded, 'model')}")


def _kinds(client: DaemonClient, name: str, kind: str) -> list[str]:
    """List the kinds that ``kind`` stands for. An unknown name passes, so that the daemon refuses it with a reason."""
    if kind not in ("vae", "clip", "all"):
        raise typer.BadParameter(f"{kind!r} is not one of vae, clip, all", param_hint="--kind")
    named = client.models()["named"]
    model = named.get(name) or named.get(name.lower()) or {"vae": ["?"]}
    return [kind] if kind != "all" else [part for part in ("vae", "clip") if model.get(part)]
