"""VAEs and text encoders for the loader nodes: the daemon's, or ComfyUI's own, as the mode says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

from luna_daemon.client import get_client
from luna_daemon.core import DaemonConnectionError, ModelLoadError, logger

from . import host

__all__ = [
    "AUTO", "FORCE_DAEMON", "FORCE_LOCAL", "MODES", "check_mode", "clip_of", "clip_types", "load_clip",
    "load_from_checkpoint", "load_vae", "vae_files", "vae_names", "vae_of",
]  # fmt: skip

AUTO, FORCE_DAEMON, FORCE_LOCAL = MODES = ("auto", "force_daemon", "force_local")
_PIXEL_SPACE = "pixel_space"
_FEW_TYPES = ["stable_diffusion", "sdxl", "sd3", "flux"]

T = TypeVar("T")


def check_mode(mode: str) -> bool:
    """Whether a daemon answers now.

    Raises:
        DaemonConnectionError: none does, and the mode needs one.
    """
    if mode == FORCE_LOCAL:
        return False
    client = get_client()
    running = client.is_running()
    if mode == FORCE_DAEMON and not running:
        raise DaemonConnectionError(
            f"daemon_mode is {FORCE_DAEMON} and no Luna Daemon answers at {client.host}:{client.port}",
            f"Start it with 'luna-daemon serve', or choose {AUTO}",
        )
    return running


# --- what users choose from ---


def vae_names() -> list[str]:
    """As the stock VAELoader lists them, names without a file of their own (``taesd``) included."""
    return host.choices("VAELoader", "vae_name") or host.names("vae")


def clip_types() -> list[str]:
    """The families of all stock loaders of text encoders, each once."""
    found = [*host.choices("CLIPLoader", "type"), *host.choices("DualCLIPLoader", "type")]
    return list(dict.fromkeys(found)) or _FEW_TYPES


def vae_files(name: str) -> list[str]:
    """The file of a VAE, or the two of a TAESD; none for ``pixel_space``.

    Raises:
        FileNotFoundError: no such VAE.
    """
    if name == _PIXEL_SPACE:
        return []
    approximate = host.names("vae_approx")
    if name not in host.names("vae"):
        if name in approximate:
            return [host.path("vae_approx", name)]
        starts = (f"{name}_encoder.", f"{name}_decoder.")
        halves = [next((file for file in approximate if file.startswith(start)), "") for start in starts]
        if all(halves):
            return [host.path("vae_approx", half) for half in halves]
    return [host.path("vae", name)]


# --- loading ---


def _shells() -> ModuleType:
    """Imported when the first one is made: it is a good part of the package."""
    from luna_daemon.shells import build

    return build


def load_vae(name: str, mode: str = AUTO) -> Any:
    """A VAE by a name of ``vae_names``."""

    def stock() -> Any:
        return host.node_class("VAELoader")().load_vae(name)[0]

    files = vae_files(name)
    if not files:
        return stock()
    return _as_mode_says(f"VAE {name!r}", mode, stock, lambda source: _shells().make_vae(files, source=source))


def load_clip(paths: Sequence[str], family: str, mode: str = AUTO) -> Any:
    """Text encoders by their files, in the loader's order; ``family`` is one of ``clip_types``."""

    def stock() -> Any:
        sd = host.module("comfy.sd")
        kind = getattr(sd.CLIPType, family.upper(), sd.CLIPType.STABLE_DIFFUSION)
        return sd.load_clip(ckpt_paths=list(paths), embedding_directory=host.embeddings(), clip_type=kind)

    def shell(source: Any) -> Any:
        return _shells().make_clip(paths, family, source=source, embedding_directory=host.embeddings())

    return _as_mode_says(f"text encoder {', '.join(paths)}", mode, stock, shell)


def load_from_checkpoint(path: str, mode: str = AUTO) -> tuple[Any, Any]:
    """``(clip, vae)`` that a checkpoint carries; ``None`` for what it does not."""

    def stock() -> tuple[Any, Any]:
        found = host.module("comfy.sd").load_checkpoint_guess_config(
            path, output_model=False, embedding_directory=host.embeddings()
        )
        return found[1], found[2]

    def shell(source: Any) -> tuple[Any, Any]:
        return _shells().make_from_checkpoint(path, embedding_directory=host.embeddings(), source=source)

    return _as_mode_says(f"checkpoint {path}", mode, stock, shell)


# --- for objects that are loaded already: if the daemon is away ComfyUI loads the files anew, theirs stay untouched ---


def vae_of(files: Sequence[str], checkpoint: bool) -> Any:
    """The daemon's VAE of these files.

    Raises:
        ModelLoadError: they hold none.
    """
    return _carried(files[0], 1) if checkpoint else _shells().make_vae(files)


def clip_of(files: Sequence[str], family: str, checkpoint: bool) -> Any:
    """The daemon's text encoders of these files.

    Raises:
        ModelLoadError: they hold none.
    """
    if checkpoint:
        return _carried(files[0], 0)
    return _shells().make_clip(files, family, embedding_directory=host.embeddings())


def _carried(path: str, place: int) -> Any:
    found = _shells().make_from_checkpoint(path, embedding_directory=host.embeddings())[place]
    if found is None:
        raise ModelLoadError(f"{path} carries no {('text encoders', 'VAE')[place]}")
    return found


def _as_mode_says(what: str, mode: str, stock: Callable[[], T], shell: Callable[[Any], T]) -> T:
    if mode == FORCE_LOCAL:
        return stock()
    try:
        return shell(_refuse if mode == FORCE_DAEMON else stock)
    except ModelLoadError as error:
        if mode == FORCE_DAEMON:
            raise
        logger.warning("%s is loaded by ComfyUI, without the daemon: %s", what, error)
        return stock()


def _refuse() -> Any:
    raise DaemonConnectionError(
        f"the daemon did not compute it and no local model may step in: daemon_mode is {FORCE_DAEMON}",
        f"Look at the daemon's log, or choose {AUTO}",
    )
