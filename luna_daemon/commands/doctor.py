"""``luna-daemon doctor``: looks at machine, settings and daemon, and says what to do about each problem.

Nothing is changed and nothing is left behind. Only the standard library is imported until the dependencies
are known to be there; torch is never imported.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..core import DaemonConnectionError, LunaError, logger

if TYPE_CHECKING:
    from ..config import Settings
    from ..files.resolver import ModelResolver

DEPENDENCIES = {
    "aiohttp": "3.9", "filelock": "3.12", "msgspec": "0.18", "numpy": "1.24", "prometheus-client": "0.20",
    "psutil": "5.9", "pydantic-settings": "2.3", "PyYAML": "6", "rich": "13", "safetensors": "0.4", "typer": "0.12",
}  # fmt: skip
"""What pyproject.toml asks for and we import, and the least version."""

_WORKER_NEEDS = ("torch", "msgspec", "numpy", "psutil")
_DIFFUSERS_NEEDS = ("diffusers", "transformers")
_PROBE = """
import importlib.metadata, importlib.util, json, sys
sys.path[:] = [entry for entry in sys.path if entry]  # not the folder that doctor runs in
found = {}
for name in sys.argv[1:]:
    if importlib.util.find_spec(name) is not None:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "of unknown version"
print(json.dumps(found))
"""
_PROBE_S = 60
_TOKENIZER_FOLDER = Path("comfy") / "sd1_tokenizer"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

_CHECK_PORT = -1
"""Names a shared memory folder that no daemon has."""


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    level: str
    """``ok``, ``warning`` or ``problem``."""
    found: str
    advice: str = ""
    """What to do; empty if nothing."""


def examine(
    overrides: Mapping[str, Any], config_file: Path | None = None, environ: Mapping[str, str] | None = None
) -> list[Check]:
    """Every check. Those that need what an earlier one found missing are left out."""
    environ = os.environ if environ is None else environ
    checks = [_python(), *_dependencies()]
    if any(check.level == "problem" for check in checks[1:]):
        return checks
    settings, found = _settings(overrides, config_file, environ)
    checks += found
    if settings is None:
        return checks
    info, reached = _daemon(settings)
    libraries, torch = _libraries(settings)
    return [
        *checks, *libraries, _gpu(settings, torch), *_comfyui(settings), *_models(settings),
        *_tokenizer(settings), *_ports(settings, info), _runtime_folder(settings),
        _shared_memory(settings), reached,
    ]  # fmt: skip


# --- what is installed ---


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    found = f"{version} ({sys.executable})"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("Python", "ok", found)
    return Check("Python", "warning", f"{found} is not tested", "Use Python 3.10 to 3.13")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _dependencies() -> Iterator[Check]:
    for name, least in DEPENDENCIES.items():
        version = _version(name)
        if version is None:
            yield Check(name, "problem", "not installed", f"pip install '{name}>={least}'")
        elif _numbers(version) < _numbers(least):
            yield Check(name, "problem", f"{version} is too old", f"pip install '{name}>={least}'")
        else:
            yield Check(name, "ok", version)


def _uses_comfyui(settings: Settings) -> bool:
    return settings.backend == "comfy" or (settings.backend == "auto" and settings.comfyui_path is not None)


def _libraries(settings: Settings) -> tuple[list[Check], str]:
    """What workers import, in the interpreter that will run them; and its version of torch, if any."""
    comfyui = _uses_comfyui(settings)
    python = str(settings.comfyui_python or sys.executable) if comfyui else sys.executable
    names = _WORKER_NEEDS if comfyui else _WORKER_NEEDS + _DIFFUSERS_NEEDS
    try:
        found = _importable(python, names)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        advice = "Correct comfyui_python" if settings.comfyui_python and comfyui else "Mend this environment"
        return [Check("workers' Python", "problem", f"{python} cannot be run: {error}", advice)], ""
    checks = [Check("workers' Python", "ok", python)]
    for name in names:
        title = f"workers' {name}" if name in DEPENDENCIES else name
        if name in found:
            checks.append(Check(title, "ok", found[name]))
            continue
        why = "no worker can start" if name in _WORKER_NEEDS else "no worker can load a model"
        package = "'luna-daemon[standalone]'" if name in _DIFFUSERS_NEEDS else name
        advice = f"{python} -m pip install {package}"
        checks.append(Check(title, "problem", f"not found by {python}: {why}", advice))
    return checks, found.get("torch", "")


def _importable(python: str, names: Sequence[str]) -> dict[str, str]:
    """Which modules another interpreter finds, with their versions; nothing is imported.

    Raises:
        OSError, SubprocessError, ValueError: it cannot be run, or is no Python.
    """
    done = subprocess.run([python, "-c", _PROBE, *names], capture_output=True, text=True, timeout=_PROBE_S, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _tokenizer(settings: Settings) -> Iterator[Check]:
    """The diffusers backend needs a CLIP tokenizer for a text encoder that is a single file."""
    if _uses_comfyui(settings) or settings.service_type.value == "vae":
        return
    title = "CLIP tokenizer"
    folder = settings.comfyui_path / _TOKENIZER_FOLDER if settings.comfyui_path is not None else None
    if folder is not None and _is_tokenizer(folder):
        yield Check(title, "ok", str(folder))
    elif importlib.util.find_spec("instant_clip_tokenizer") is not None:
        yield Check(title, "ok", "of the package instant-clip-tokenizer")
    else:
        # A folder of the diffusers layout brings its own.
        level = "problem" if _has_single_file_encoder(settings) else "warning"
        advice = "Set comfyui_path to a ComfyUI folder, or pip install instant-clip-tokenizer (Python 3.10 to 3.12)"
        yield Check(title, level, "none: a text encoder that is a single file cannot be used", advice)


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _has_single_file_encoder(settings: Settings) -> bool:
    from ..wire.messages import ModelRef

    resolver = _resolver(settings)
    for name in (name for name, model in resolver.named.items() if model.clip):
        try:
            files = resolver.resolve(ModelRef("clip", name)).files
        except LunaError:
            continue  # said by its own check
        if not all(Path(file).is_dir() for file in files):
            return True
    return False


def _gpu(settings: Settings, torch: str) -> Check:
    from ..system.gpu import gpu_memory

    gpus = gpu_memory()
    devices = {settings.vae_device, settings.clip_device}
    wanted = {device for device in devices if device.startswith(("cuda", "GPU-"))}
    known = {"cuda", *(f"cuda:{gpu['index']}" for gpu in gpus), *(gpu["uuid"] for gpu in gpus)}
    missing = ", ".join(sorted(wanted - known if gpus else wanted))
    unseen = importlib.util.find_spec("pynvml") is None and (wanted or shutil.which("nvidia-smi"))
    found = ", ".join(f"{g['name']} ({g['free'] >> 20} of {g['total'] >> 20} MB free)" for g in gpus)
    found = found or "no NVIDIA GPU"
    if unseen:
        return Check("GPU", "warning", "unknown: nvidia-ml-py is missing", "pip install 'luna-daemon[gpu]'")
    if missing:
        advice = "Change vae_device and clip_device; auto is always right"
        return Check("GPU", "problem", f"{found}; there is no {missing}", advice)
    if gpus and torch.endswith("+cpu"):
        return Check("GPU", "warning", f"{found}; this torch computes on the CPU", "Install torch with CUDA")
    return Check("GPU", "ok", found)


# --- settings ---


class _Kept(logging.Handler):
    """Keeps what is logged instead of showing it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _settings(
    overrides: Mapping[str, Any], config_file: Path | None, environ: Mapping[str, str]
) -> tuple[Settings | None, list[Check]]:
    from ..config import load_settings

    kept, propagate = _Kept(), logger.propagate
    logger.addHandler(kept)
    logger.propagate = False
    try:
        settings = load_settings(overrides, environ, config_file)
    except LunaError as error:
        return None, [Check("configuration", "problem", error.message, error.hint)]
    finally:
        logger.removeHandler(kept)
        logger.propagate = propagate
    found = str(settings.toml_path or "no luna.toml here; LUNA_* variables and defaults")
    checks = [Check("configuration", "ok", found)]
    checks += [Check("environment", "warning", line, "Correct or unset it") for line in kept.lines]
    return settings, checks


def _comfyui(settings: Settings) -> Iterator[Check]:
    root = settings.comfyui_path
    if root is None:
        found = "not given, so only model_dirs are searched for models"
        if settings.backend == "comfy":
            yield Check("ComfyUI", "problem", found, "Give comfyui_path or COMFYUI_PATH")
        else:
            yield Check("ComfyUI", "ok", found)
    elif not (root / "comfy" / "sd.py").is_file():
        yield Check("ComfyUI", "problem", f"{root} has no comfy/sd.py: not ComfyUI", "Correct comfyui_path")
    else:
        says = root / "comfyui_version.py"
        text = says.read_text() if says.is_file() else ""
        version = re.search(r"__version__ *= *[\"']([^\"']+)", text)
        yield Check("ComfyUI", "ok", f"{version.group(1) if version else 'unknown version'} in {root}")


def _resolver(settings: Settings) -> ModelResolver:
    from ..files.resolver import ModelResolver

    return ModelResolver(settings, settings.toml_path.parent if settings.toml_path else None)


def _models(settings: Settings) -> Iterator[Check]:
    from ..wire.messages import ModelRef

    resolver = _resolver(settings)
    chosen = bool(settings.model_fields_set & {"vae_path", "clip_l_path", "clip_g_path", "model_type"})
    for name, model in resolver.named.items():
        for kind in (kind for kind in ("vae", "clip") if getattr(model, kind)):
            title = f"model {name} ({kind})"
            try:
                spec = resolver.resolve(ModelRef(kind, name))
            except LunaError as error:
                # A name that nobody configured is only a promise of the defaults.
                level = "problem" if chosen or name in settings.models else "warning"
                where = f"models.{name}" if name in settings.models else "vae_path and clip_*_path"
                advice = error.hint or f"Correct {where}, or give comfyui_path or model_dirs"
                yield Check(title, level, error.message, advice)
            else:
                yield Check(title, "ok", ", ".join(spec.files))


# --- the machine ---


def _ports(settings: Settings, info: Mapping[str, Any]) -> Iterator[Check]:
    for field, level in (("port", "problem"), ("ws_port", "warning")):
        port = getattr(settings, field)
        why = _why_not_bound(settings.host, port)
        holder, pid = _holder(port) if why == "taken" else ("", None)
        title = f"{field} {port}"
        if not why:
            yield Check(title, "ok", "free")
        elif why != "taken":
            yield Check(title, "problem", f"{settings.host}: {why}", f"Choose another host or {field}")
        elif info and pid in (info["pid"], None):
            yield Check(title, "ok", f"the running Luna Daemon (pid {info['pid']})")
        else:
            yield Check(title, level, f"held by {holder}", f"Stop it, or choose another {field}")


def _why_not_bound(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return "taken" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return ""


def _holder(port: int) -> tuple[str, int | None]:
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})", connection.pid
    except (psutil.Error, OSError):
        pass
    return "a process of another user", None


def _runtime_folder(settings: Settings) -> Check:
    from ..system.runtime import runtime_folder

    folder = runtime_folder(settings.port, settings.runtime_dir)
    if not os.path.lexists(folder):
        parent = next(place for place in folder.parents if place.exists())
        if os.access(parent, os.W_OK):
            return Check("runtime folder", "ok", f"{folder}, made when the daemon starts")
        return Check("runtime folder", "problem", f"{parent} cannot be written", "Give another --runtime-dir")
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        return Check("runtime folder", "problem", f"{folder} is not a plain folder", "Remove it")
    if hasattr(os, "getuid") and facts.st_uid != os.getuid():
        advice = "Run as that user, or choose another port"
        return Check("runtime folder", "problem", f"{folder} belongs to uid {facts.st_uid}", advice)
    if os.name == "posix" and facts.st_mode & 0o077:
        found = f"{folder} is open to others ({stat.S_IMODE(facts.st_mode):o})"
        return Check("runtime folder", "problem", found, f"chmod 700 {folder}")
    return Check("runtime folder", "ok", str(folder))


def _shared_memory(settings: Settings) -> Check:
    """Make an arena of our own, reserve a segment in it, and remove both."""
    from ..wire.arena import ArenaUnavailable, default_folder, open_arena

    if not settings.arena:
        return Check("shared memory", "ok", "switched off (arena = false); tensors go by TCP")
    made: Path | None = None
    try:
        place = settings.arena_dir or default_folder(settings.port).parent
        made = next((part for part in [*reversed(place.parents), place] if not part.exists()), None)
        arena = open_arena(place, _CHECK_PORT - os.getpid(), settings.arena_mb << 20)
        try:
            memory = arena.grow(1)[2]
            memory.close()
        finally:
            arena.close()
        free = shutil.disk_usage(place).free
    except (ArenaUnavailable, LunaError) as error:
        text = error.message if isinstance(error, LunaError) else str(error)
        return Check("shared memory", "warning", f"{text}; tensors go by TCP", "Free some, or set arena_dir")
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    found = f"{place} has {free >> 20} MB free; at most {arena.max_bytes >> 20} MB are used"
    return Check("shared memory", "ok", found)


def _daemon(settings: Settings) -> tuple[dict[str, Any], Check]:
    """What the running daemon says about itself; empty without one."""
    from ..client import DaemonClient
    from ..system.runtime import dial_host, runtime_folder

    address = dial_host(settings.host)
    folder = runtime_folder(settings.port, settings.runtime_dir).parent
    try:
        with DaemonClient(address, settings.port, runtime_dir=folder, name="luna-daemon doctor") as client:
            info = client.get_daemon_info()
    except DaemonConnectionError as error:
        return {}, Check("daemon", "warning", error.message, error.hint)
    except LunaError as error:
        return {}, Check("daemon", "problem", error.message, error.hint)
    found = f"pid {info['pid']}, version {info['version']}, by {info['transport']} ({info['transport_why']})"
    if info["version"] != __version__:
        return info, Check("daemon", "warning", found, f"This is {__version__}: restart the daemon")
    if info["transport"] != "shared memory" and settings.arena:
        return info, Check("daemon", "warning", found, "Large tensors go faster by shared memory")
    return info, Check("daemon", "ok", found)
