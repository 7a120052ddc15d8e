"""``luna-daemon doctor``: checks machine, settings and daemon, and says what to do about each problem.

Changes nothing, and calls the functions with which the daemon checks the same things. Dependencies are imported inside
functions, after the check that they are installed; torch is not imported.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import AuthenticationError, DaemonConnectionError, LunaError, logger
from ..system import ports
from .installed import Check, dependencies, libraries, python

if TYPE_CHECKING:
    from ..config import Settings

_CHECK_PORT = -1
"""Port in the name of the shared memory folder, which no daemon has."""


def examine(
    overrides: Mapping[str, Any], config_file: Path | None = None, environ: Mapping[str, str] | None = None
) -> list[Check]:
    """Run all checks, except those that depend on dependencies or settings found wrong.

    Args:
        overrides: settings from the command line; ``None`` values are ignored.
        config_file: as for ``load_settings``.
        environ: ``os.environ`` by default.
    """
    environ = os.environ if environ is None else environ
    checks = [python(), *dependencies()]
    if any(check.level == "problem" for check in checks[1:]):
        return checks
    settings, read = _settings(overrides, config_file, environ)
    checks += read
    if settings is None:
        return checks
    from ..pool.launch import backend_of

    comfyui = backend_of(settings) == "comfy"
    info, daemon = _daemon(settings)
    installed, torch = libraries(settings, comfyui)
    return [
        *checks, *installed, _gpu(settings, torch), *_comfyui(settings), *_models(settings),
        *([] if comfyui else _tokenizer(settings)), *_ports(settings, info), _runtime_folder(settings),
        _shared_memory(settings), daemon,
    ]  # fmt: skip


# --- what models need ---


def _tokenizer(settings: Settings) -> Iterator[Check]:
    """Check for the CLIP tokenizer that the diffusers backend needs for a text encoder in a single file."""
    if settings.service_type.value == "vae":
        return
    title = "CLIP tokenizer"
    folder = settings.comfyui_path / "comfy" / "sd1_tokenizer" if settings.comfyui_path is not None else None
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        yield Check(title, "ok", str(folder))
    elif importlib.util.find_spec("instant_clip_tokenizer") is not None:
        yield Check(title, "ok", "package instant-clip-tokenizer")
    else:
        # A folder of the diffusers layout brings its own tokenizer.
        level = "problem" if _has_single_file_encoder(settings) else "warning"
        advice = "Set comfyui_path to a ComfyUI folder, or pip install instant-clip-tokenizer (Python 3.10 to 3.12)"
        yield Check(title, level, "none: a text encoder that is a single file cannot be used", advice)


def _has_single_file_encoder(settings: Settings) -> bool:
    return any(
        kind == "clip" and not isinstance(files, LunaError) and not all(Path(file).is_dir() for file in files)
        for _, kind, files in _model_files(settings)
    )


def _gpu(settings: Settings, torch: str) -> Check:
    from ..system.gpu import gpu_memory

    gpus = gpu_memory()
    devices = {settings.vae_device, settings.clip_device}
    wanted = {device for device in devices if device.startswith(("cuda", "GPU-"))}
    known = {"cuda", *(f"cuda:{gpu['index']}" for gpu in gpus), *(gpu["uuid"] for gpu in gpus)}
    missing = ", ".join(sorted(wanted - known if gpus else wanted))
    unseen = importlib.util.find_spec("pynvml") is None and (wanted or shutil.which("nvidia-smi"))
    if unseen:
        return Check("GPU", "warning", "unknown: nvidia-ml-py is missing", "pip install 'luna-daemon[gpu]'")
    names = [f"{gpu['name']} ({gpu['free'] >> 20} of {gpu['total'] >> 20} MB free)" for gpu in gpus]
    found = ", ".join(names) or "no NVIDIA GPU"
    if missing:
        advice = "Change vae_device and clip_device; auto fits every machine"
        return Check("GPU", "problem", f"{found}; {missing} does not exist", advice)
    if gpus and torch.endswith("+cpu"):
        return Check("GPU", "warning", f"{found}; this torch computes on the CPU", "Install torch with CUDA")
    return Check("GPU", "ok", found)


# --- settings ---


def _settings(
    overrides: Mapping[str, Any], config_file: Path | None, environ: Mapping[str, str]
) -> tuple[Settings | None, list[Check]]:
    from ..config import load_settings

    # Warnings about unknown variables become checks instead of log lines.
    kept, propagate = BufferingHandler(1000), logger.propagate
    logger.addHandler(kept)
    logger.propagate = False
    try:
        settings = load_settings(overrides, environ, config_file)
    except LunaError as error:
        return None, [Check("configuration", "problem", error.message, error.hint)]
    finally:
        logger.removeHandler(kept)
        logger.propagate = propagate
    found = str(settings.toml_path or "LUNA_* variables and defaults, without a luna.toml in this folder")
    warnings = [Check("environment", "warning", r.getMessage(), "Correct or unset the variable") for r in kept.buffer]
    return settings, [Check("configuration", "ok", found), *warnings]


def _comfyui(settings: Settings) -> Iterator[Check]:
    from ..control.roots import is_comfyui, version_of

    root = settings.comfyui_path
    if root is None:
        found = "not set, so only model_dirs are searched for models"
        if settings.backend == "comfy":
            yield Check("ComfyUI", "problem", found, "Set comfyui_path or COMFYUI_PATH")
        else:
            yield Check("ComfyUI", "ok", found)
    elif not is_comfyui(root):
        yield Check("ComfyUI", "problem", f"{root} is not ComfyUI: it has no comfy/sd.py", "Correct comfyui_path")
    else:
        yield Check("ComfyUI", "ok", f"{version_of(root) or 'unknown version'} in {root}")


def _model_files(settings: Settings) -> Iterator[tuple[str, str, tuple[str, ...] | LunaError]]:
    """Find the files of every named model, or the reason why there are none: (name, kind, files or error)."""
    from ..files.resolver import ModelResolver
    from ..wire.messages import ModelRef

    resolver = ModelResolver(settings, settings.toml_path.parent if settings.toml_path else None)
    for name, model in resolver.named.items():
        for kind in (kind for kind in ("vae", "clip") if getattr(model, kind)):
            try:
                yield name, kind, resolver.resolve(ModelRef(kind, name)).files
            except LunaError as error:
                yield name, kind, error


def _models(settings: Settings) -> Iterator[Check]:
    chosen = bool(settings.model_fields_set & {"vae_path", "clip_l_path", "clip_g_path", "model_type"})
    for name, kind, files in _model_files(settings):
        title = f"model {name} ({kind})"
        if isinstance(files, LunaError):
            # Missing files of the default model are not a problem: the user has not configured them.
            level = "problem" if chosen or name in settings.models else "warning"
            where = f"models.{name}" if name in settings.models else "vae_path and clip_*_path"
            advice = files.hint or f"Correct {where}, or set comfyui_path or model_dirs"
            yield Check(title, level, files.message, advice)
        else:
            yield Check(title, "ok", ", ".join(files))


# --- the machine ---


def _ports(settings: Settings, info: Mapping[str, Any]) -> Iterator[Check]:
    for field, level in (("port", "problem"), ("ws_port", "warning")):
        port = getattr(settings, field)
        title = f"{field} {port}"
        try:
            ports.bind(settings.host, port).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                found = f"{settings.host}: {error.strerror or error}"
                yield Check(title, "problem", found, f"Choose another host or {field}")
                continue
        else:
            yield Check(title, "ok", "free")
            continue
        name, pid = ports.listener(port) or ("a process of another user", None)
        if info and pid in (info["pid"], None):
            yield Check(title, "ok", f"the running Luna Daemon (pid {info['pid']})")
        else:
            holder = f"{name} (pid {pid})" if pid else name
            yield Check(title, level, f"in use by {holder}", f"Stop this process, or choose another {field}")


def _runtime_folder(settings: Settings) -> Check:
    from ..system.runtime import check_folder, runtime_folder

    folder = runtime_folder(settings.port, settings.runtime_dir)
    if not os.path.lexists(folder):
        parent = next(place for place in folder.parents if place.exists())
        if os.access(parent, os.W_OK):
            return Check("runtime folder", "ok", f"{folder}, which the daemon makes when it starts")
        return Check("runtime folder", "problem", f"{parent} cannot be written", "Choose another --runtime-dir")
    try:
        check_folder(folder)
    except AuthenticationError as error:
        return Check("runtime folder", "problem", error.message, error.hint)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        return Check("runtime folder", "problem", f"{folder} is open to others ({mode:o})", f"chmod 700 {folder}")
    return Check("runtime folder", "ok", str(folder))


def _shared_memory(settings: Settings) -> Check:
    """Check shared memory: make an arena and a segment as the daemon does, and remove both."""
    from ..wire.arena import ArenaUnavailable, default_folder, open_arena

    if not settings.arena:
        return Check("shared memory", "ok", "switched off (arena = false); tensors travel by TCP")
    made: Path | None = None
    try:
        place = settings.arena_dir or default_folder(settings.port).parent
        made = next((part for part in [*reversed(place.parents), place] if not part.exists()), None)
        arena = open_arena(place, _CHECK_PORT - os.getpid(), settings.arena_mb << 20)
        try:
            arena.grow(1)[2].close()
        finally:
            arena.close()
        free = shutil.disk_usage(place).free
    except (ArenaUnavailable, LunaError) as error:
        text = error.message if isinstance(error, LunaError) else str(error)
        return Check("shared memory", "warning", f"{text}; tensors travel by TCP", "Free some memory, or set arena_dir")
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    found = f"{place} has {free >> 20} MB free; at most {arena.max_bytes >> 20} MB are used"
    return Check("shared memory", "ok", found)


def _daemon(settings: Settings) -> tuple[dict[str, Any], Check]:
    """Check the running daemon; returns its ``info`` as well, empty if no daemon answers."""
    from ..client import DaemonClient
    from ..system.runtime import runtime_folder

    folder = runtime_folder(settings.port, settings.runtime_dir).parent
    try:
        with DaemonClient(settings.host, settings.port, runtime_dir=folder, name="luna-daemon doctor") as client:
            info = client.get_daemon_info()
    except DaemonConnectionError as error:
        return {}, Check("daemon", "warning", error.message, error.hint)
    except LunaError as error:
        return {}, Check("daemon", "problem", error.message, error.hint)
    found = f"pid {info['pid']}, version {info['version']}, by {info['transport']} ({info['transport_why']})"
    if info["version"] != __version__:
        return info, Check("daemon", "warning", found, f"This is {__version__}: restart the daemon")
    if info["transport"] != "shared memory" and settings.arena:
        return info, Check("daemon", "warning", found, "Large tensors travel faster by shared memory")
    return info, Check("daemon", "ok", found)
