"""VAEs and text encoders for the loader nodes: computed by the daemon or by ComfyUI itself, as ``daemon_mode`` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

from luna_daemon.client import get_client
from luna_daemon.core import DaemonConnectionError, ModelLoadError, logger

from . import host

AUTO, FORCE_DAEMON, FORCE_LOCAL = MODES = ("auto", "force_daemon", "force_local")
_PIXEL_SPACE = "pixel_space"
_FEW_TYPES = ["stable_diffusion", "sdxl", "sd3", "flux"]

T = TypeVar("T")


def check_mode(mode: str) -> bool:
    """Check that the mode can be kept; returns whether a daemon answers and the mode allows it.

    Raises:
        DaemonConnectionError: no daemon answers, and the mode needs one.
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
    """List VAEs as the stock VAELoader does, names that stand for other files (``taesd``) included."""
    return host.choices("VAELoader", "vae_name") or host.names("vae")


def clip_types() -> list[str]:
    """List the model families of all stock loaders of text encoders, each once."""
    families = [*host.choices("CLIPLoader", "type"), *host.choices("DualCLIPLoader", "type")]
    return list(dict.fromkeys(families)) or _FEW_TYPES


def vae_files(name: str) -> list[str]:
    """Find the file of a VAE, or the two of a TAESD; none for ``pixel_space``.

    Raises:
        FileNotFoundError: there is no such VAE.
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


# --- loading by name or file, as a mode says ---


def load_vae(name: str, mode: str = AUTO) -> Any:
    """Load a VAE by a name of ``vae_names``.

    Raises:
        FileNotFoundError: there is no such VAE.
        ModelLoadError: the daemon cannot serve this VAE, and the mode needs the daemon.
    """

    def stock() -> Any:
        return host.node_class("VAELoader")().load_vae(name)[0]

    files = vae_files(name)
    if not files:
        return stock()
    return _load(f"VAE {name!r}", mode, stock, lambda source: _shells().make_vae(files, source=source))


def load_clip(paths: Sequence[str], family: str, mode: str = AUTO) -> Any:
    """Load text encoders by their files, in the order of the stock loaders.

    Args:
        paths: one to four files.
        family: one of ``clip_types``.
        mode: one of ``MODES``.

    Raises:
        ModelLoadError: the daemon cannot serve these files, and the mode needs the daemon.
    """
    shells, embeddings = _shells(), host.embeddings()
    return _load(
        f"text encoder {', '.join(paths)}",
        mode,
        lambda: shells.load_local_clip(paths, family, embeddings),
        lambda source: shells.make_clip(paths, family, source=source, embedding_directory=embeddings),
    )


def load_from_checkpoint(path: str, mode: str = AUTO) -> tuple[Any, Any]:
    """Load ``(clip, vae)`` of a checkpoint; ``None`` for a part that the checkpoint does not carry.

    Raises:
        ModelLoadError: the daemon cannot serve this file, and the mode needs the daemon.
    """
    shells, embeddings = _shells(), host.embeddings()
    pair: tuple[Any, Any] = _load(
        f"checkpoint {path}",
        mode,
        lambda: shells.load_local_checkpoint(path, embeddings),
        lambda source: shells.make_from_checkpoint(path, embedding_directory=embeddings, source=source),
    )
    return pair


def _load(what: str, mode: str, local: Callable[[], T], shell: Callable[[Any], T]) -> T:
    """Load by the daemon, by ComfyUI, or by ComfyUI where the daemon cannot serve the file.

    Args:
        what: the model, for the warning.
        mode: one of ``MODES``.
        local: loads the model into this process.
        shell: makes an object that the daemon computes for, given the function that loads a local model in its place.
    """
    if mode == FORCE_LOCAL:
        return local()
    try:
        return shell(_refuse if mode == FORCE_DAEMON else local)
    except ModelLoadError as error:
        if mode == FORCE_DAEMON:
            raise
        logger.warning("%s is loaded by ComfyUI, without the daemon: %s", what, error)
        return local()


def _refuse() -> Any:
    raise DaemonConnectionError(
        f"the daemon did not answer this call, and no local model may step in: daemon_mode is {FORCE_DAEMON}",
        f"Look at the daemon's log, or choose {AUTO}",
    )


# --- the daemon's counterpart of an object that a stock loader has loaded: see the tunnel ---


def vae_of(files: Sequence[str], checkpoint: bool) -> Any:
    """Make the daemon's VAE of these files; while the daemon is away ComfyUI loads the files again.

    Raises:
        ModelLoadError: the files hold no VAE.
    """
    return _carried(files[0], 1) if checkpoint else _shells().make_vae(files)


def clip_of(files: Sequence[str], family: str, checkpoint: bool) -> Any:
    """Make the daemon's text encoders of these files; while the daemon is away ComfyUI loads the files again.

    Raises:
        ModelLoadError: the files hold no text encoders.
    """
    if checkpoint:
        return _carried(files[0], 0)
    return _shells().make_clip(files, family, embedding_directory=host.embeddings())


def _carried(path: str, place: int) -> Any:
    part = _shells().make_from_checkpoint(path, embedding_directory=host.embeddings())[place]
    if part is None:
        raise ModelLoadError(f"{path} carries no {('text encoders', 'VAE')[place]}")
    return part


def _shells() -> ModuleType:
    """Import the package's larger part only when the first model is loaded."""
    from luna_daemon.shells import build

    return build
