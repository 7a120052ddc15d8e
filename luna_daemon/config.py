"""Settings: one typed object, from the command line, ``LUNA_*`` variables, ``luna.toml``, or the defaults below.

The sources are listed by precedence. The constants below may be edited, but an update overwrites them. Every setting is
a field of ``Settings``; its environment variable is ``LUNA_`` and the field's name in capitals (``LUNA_PORT``).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings.sources import InitSettingsSource

from .core import ConfigError, ServiceType, logger

__all__ = ["NamedModel", "Settings", "load_settings"]

Precision = Literal["auto", "fp32", "fp16", "bf16"]

# Files of the model named after MODEL_TYPE: absolute, relative to ComfyUI's folder, or as ComfyUI's loaders list them.
VAE_PATH = "models/vae/sdxl_vae.safetensors"
CLIP_L_PATH = "models/clip/clip_l.safetensors"
CLIP_G_PATH = "models/clip/clip_g.safetensors"
MODEL_TYPE = "sdxl"

DAEMON_HOST = "127.0.0.1"
DAEMON_PORT = 19283
DAEMON_WS_PORT = 19284

VAE_DEVICE = "auto"
CLIP_DEVICE = "auto"
VAE_PRECISION: Precision = "auto"
CLIP_PRECISION: Precision = "auto"

MAX_VAE_WORKERS = 2
MAX_CLIP_WORKERS = 2
MIN_VAE_WORKERS = 0
MIN_CLIP_WORKERS = 0
QUEUE_THRESHOLD = 2
SCALE_UP_DELAY_SEC = 1.0
IDLE_TIMEOUT_SEC = 30
WORKER_KEEP_SEC = 600
VRAM_SAFETY_MARGIN_GB = 1.0

_T = TypeVar("_T")
RELOADABLE = "reloadable"
Live = Annotated[_T, RELOADABLE]
"""A setting that a reload changes. Other settings are fixed by open sockets, shared memory, limits announced to
clients, or running workers."""
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?|GPU-[0-9a-fA-F-]+)$")]
Port = Annotated[int, Field(ge=0, le=65535)]
_DEVICES = "must be auto, cpu, cuda, cuda:1 (any number), mps, xpu, xpu:1 or a GPU's UUID (GPU-...)"
_PATHS = (
    "comfyui_path", "comfyui_python", "arena_dir", "runtime_dir", "log_file", "model_dirs", "comfyui_roots",
    "tls_cert", "tls_key",
)  # fmt: skip
_MAY_BE_EMPTY = ("vae_path", "clip_l_path", "clip_g_path")
"""Settings whose environment variable may be empty, which means "no file"; other empty variables are ignored."""
_NOT_SETTINGS = (
    "LUNA_CONFIG", "LUNA_OVERRIDES", "LUNA_START_FROM_COMFYUI", "LUNA_START_ID", "LUNA_TLS_CA", "LUNA_TOKEN",
    "LUNA_TOKEN_FILE",
)  # fmt: skip
"""Environment variables that other modules read."""


class NamedModel(BaseModel):
    """Files of a model that clients may name: ``[models.NAME]`` in ``luna.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vae: list[str] = []
    """One file, or both files of a split TAESD."""
    clip: list[str] = []
    """One to four text encoder files."""
    type: str = MODEL_TYPE
    """Family: ``sd15``, ``sdxl``, ``sd3``, ``flux``, or any of ComfyUI's types with the comfy backend."""


class Settings(BaseSettings):
    """All settings; names of sizes and times end with the unit."""

    model_config = SettingsConfigDict(env_prefix="LUNA_", extra="forbid", frozen=True, protected_namespaces=())
    toml_path: ClassVar[Path | None] = None
    """Path of the ``luna.toml`` that ``load_settings`` read, if any."""
    environ: ClassVar[Mapping[str, str] | None] = None
    """Environment variables passed to ``load_settings``."""

    host: str = Field(
        DAEMON_HOST, min_length=1, description="Address to listen on; by default only this host connects."
    )
    port: Port = Field(DAEMON_PORT, description="Port for clients and workers.")
    ws_port: Port = Field(DAEMON_WS_PORT, description="HTTP port: status page, WebSocket, metrics, health.")
    tls_cert: Path | None = Field(None, description="PEM certificate; with it both ports use TLS.")
    tls_key: Path | None = Field(None, description="Private key, if tls_cert does not contain the key.")
    service_type: Live[ServiceType] = Field(ServiceType.FULL, description="full, vae or clip: which models are served.")
    config_only: Live[bool] = Field(False, description="Serve only models named in the settings, no files by path.")

    vae_path: Live[str] = Field(VAE_PATH, description="VAE of the model named after model_type.")
    clip_l_path: Live[str] = Field(CLIP_L_PATH, description="CLIP-L text encoder of that model.")
    clip_g_path: Live[str] = Field(CLIP_G_PATH, description="CLIP-G text encoder of that model; empty for none.")
    model_type: Live[str] = Field(MODEL_TYPE, description="Name and family of that model.")
    models: Live[dict[str, NamedModel]] = Field({}, description="Further models by name.")
    model_dirs: Live[Annotated[list[Path], NoDecode]] = Field(
        [], description="Folders, besides ComfyUI's, with models for clients."
    )
    comfyui_path: Path | None = Field(None, description="ComfyUI's folder; COMFYUI_PATH is read too.")
    comfyui_python: Path | None = Field(None, description="Interpreter that runs ComfyUI; COMFYUI_PYTHON is read too.")
    comfyui_args: Annotated[list[str], NoDecode] = Field(
        [], description="ComfyUI's flags for workers, such as --fp32-vae."
    )
    client_roots: Live[bool] = Field(True, description="Run a client's own ComfyUI, if no other user could change it.")
    comfyui_roots: Live[Annotated[list[Path], NoDecode]] = Field(
        [], description="Folders whose ComfyUIs and interpreters workers may run, whatever their owner."
    )
    backend: Literal["auto", "comfy", "diffusers"] = Field("auto", description="Library that runs the models.")

    vae_device: Device = Field(VAE_DEVICE, description="auto, cpu, cuda:1, or a GPU's UUID.")
    clip_device: Device = Field(CLIP_DEVICE, description="auto, cpu, cuda:1, or a GPU's UUID.")
    vae_precision: Precision = Field(VAE_PRECISION, description="auto chooses as ComfyUI does.")
    clip_precision: Precision = Field(CLIP_PRECISION, description="auto chooses as ComfyUI does.")
    cpu_threads: int = Field(0, ge=0, le=1024, description="CPU threads of a worker; 0 is torch's default.")

    max_vae_workers: Live[int] = Field(MAX_VAE_WORKERS, ge=1, le=64, description="Maximum number of VAE workers.")
    max_clip_workers: Live[int] = Field(
        MAX_CLIP_WORKERS, ge=1, le=64, description="Maximum number of text encoder workers."
    )
    min_vae_workers: Live[int] = Field(MIN_VAE_WORKERS, ge=0, le=64, description="Idle VAE workers kept.")
    min_clip_workers: Live[int] = Field(MIN_CLIP_WORKERS, ge=0, le=64, description="Idle text encoder workers kept.")
    queue_threshold: Live[int] = Field(QUEUE_THRESHOLD, ge=1, description="Waiting requests that start another worker.")
    scale_up_delay_sec: Live[float] = Field(SCALE_UP_DELAY_SEC, ge=0, description="Time that these must have waited.")
    idle_timeout_sec: Live[float] = Field(IDLE_TIMEOUT_SEC, ge=0.1, description="Idle time until memory is released.")
    worker_keep_sec: Live[float] = Field(WORKER_KEEP_SEC, ge=0.1, description="Idle time until the last worker ends.")
    worker_start_sec: Live[float] = Field(120.0, ge=1, description="How long a worker may take to import its backend.")
    vram_safety_margin_gb: Live[float] = Field(VRAM_SAFETY_MARGIN_GB, ge=0, description="VRAM left free by scaling up.")
    model_memory_gb: Live[float] = Field(0.0, ge=0, description="Maximum of weights per device; 0 is no limit.")

    max_watchers: int = Field(64, ge=0, description="Maximum of open status pages and other WebSockets.")
    allowed_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Other origins whose pages may use the WebSocket, as https://host:port."
    )
    log_json: bool = Field(False, description="Log one JSON object per line.")
    log_file: Path | None = Field(None, description="Additional log file; rotated at 5 MB, two old files are kept.")

    queue_limit: Live[int] = Field(
        256, ge=1, description="Maximum of waiting requests; further ones are refused as busy."
    )
    max_clients: Live[int] = Field(256, ge=1, description="Maximum of connected clients.")
    max_header_mb: int = Field(8, ge=1, le=64, description="Largest message without its tensors.")
    max_tensor_mb: int = Field(4096, ge=1, description="Largest tensor, and largest sum of a request's tensors.")
    arena: bool = Field(True, description="Use shared memory with clients on this host.")
    arena_dir: Path | None = Field(None, description="Folder of the shared memory; /dev/shm on Linux.")
    arena_mb: int = Field(0, ge=0, description="Maximum of shared memory; 0 is half of its folder's free space.")
    arena_client_mb: int = Field(2048, ge=1, description="Maximum of shared memory per client.")
    conditioning_cache_mb: Live[int] = Field(
        512, ge=0, description="Cache for repeated prompts; 0 turns the cache off."
    )
    lora_cache_gb: Live[float] = Field(8.0, ge=0, description="Maximum of LoRA files kept in RAM.")
    lora_cache_entries: Live[int] = Field(100, ge=0, description="Maximum number of LoRA files kept.")
    lora_copy: Live[Literal["auto", "always", "never"]] = Field(
        "auto", description="Copy LoRA files instead of mapping them; auto copies from network disks."
    )
    drain_timeout_sec: Live[float] = Field(30.0, ge=0, description="How long a stop waits for running requests.")
    runtime_dir: Path | None = Field(None, description="Folder of the token; one per user and port by default.")
    log_level: Live[Literal["DEBUG", "INFO", "WARNING", "ERROR"]] = Field(
        "INFO", description="Lowest level that is logged."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """List the sources by precedence, as pydantic-settings asks for them."""
        sources: list[PydanticBaseSettingsSource] = [init_settings]
        sources.append(InitSettingsSource(settings_cls, _from_environ(settings_cls, cls.environ or {})))
        if cls.toml_path is not None:
            sources.append(TomlConfigSettingsSource(settings_cls, cls.toml_path))
        return tuple(sources)

    @field_validator(*_PATHS)
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        """Expand ``~``, and resolve relative paths against the folder of ``luna.toml``, or else the current folder."""
        return _below(cls.toml_path.parent if cls.toml_path else Path.cwd(), value)

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if not re.fullmatch(r"https?://[^\s/?#@]+", origin, re.IGNORECASE):
                raise ValueError(f"{origin!r} is not an origin: write http://host:port or https://host, without a path")
        return [origin.lower() for origin in value]

    def named_models(self) -> dict[str, NamedModel]:
        """All models by name; the model of ``vae_path`` and ``clip_*_path`` is named after ``model_type``."""
        clips = [path for path in (self.clip_l_path, self.clip_g_path) if path]
        vaes = [self.vae_path] if self.vae_path else []
        return {self.model_type: NamedModel(vae=vaes, clip=clips, type=self.model_type), **self.models}


def load_settings(
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> Settings:
    """Read every setting from all sources.

    Args:
        overrides: options of the command line; ``None`` values are ignored.
        environ: ``os.environ`` by default. ``LUNA_OVERRIDES``, a JSON object set by ``LunaDaemon.start``, has the
            precedence of the command line.
        config_file: ``LUNA_CONFIG`` or ``./luna.toml`` by default; a file named explicitly must exist.

    Raises:
        ConfigError: a setting is wrong; the message names the setting, the value and the allowed values.
    """
    environ = os.environ if environ is None else environ
    path = _find_toml(environ, config_file)
    # A subclass per call: pydantic reads the sources from class attributes, which concurrent calls must not share.
    bound = type("Settings", (Settings,), {"toml_path": path, "environ": environ, "__module__": __name__})
    try:
        explicit = {**json.loads(environ.get("LUNA_OVERRIDES") or "{}"), **(overrides or {})}
        options = {key: _from_here(key, value) for key, value in explicit.items() if value is not None}
        settings: Settings = bound(**options)
    except ValidationError as error:
        raise ConfigError(_explain(error), "See docs/configuration.md for every setting") from error
    except ValueError as error:
        where = path or "environment"
        raise ConfigError(f"{where}: {error}", "Fix the file, or name another with --config") from error
    return settings


def _find_toml(environ: Mapping[str, str], config_file: Path | None) -> Path | None:
    named = config_file or (Path(environ["LUNA_CONFIG"]) if environ.get("LUNA_CONFIG") else None)
    if named is None:
        here = Path("luna.toml")
        return here.resolve() if here.is_file() else None
    if not named.is_file():
        raise ConfigError(f"configuration file {str(named)!r} does not exist", "Check --config or LUNA_CONFIG")
    return named.resolve()


def _from_environ(cls: type[BaseSettings], environ: Mapping[str, str]) -> dict[str, Any]:
    """Read settings from ``LUNA_*`` variables; warn about variables that are not settings."""
    values: dict[str, Any] = {}
    fields = cls.model_fields
    for variable, text in environ.items():
        name = variable[5:].lower()
        if not variable.startswith("LUNA_") or variable in _NOT_SETTINGS or not (text or name in _MAY_BE_EMPTY):
            continue
        if name in fields:
            try:
                values[name] = _from_here(name, _PARSERS.get(name, str)(text))
            except ValueError as error:
                raise ConfigError(f"{variable} is {text!r}: {error}", "Fix it, or use luna.toml") from error
            continue
        close = difflib.get_close_matches(name, fields, n=1)
        meant = f"; did you mean LUNA_{close[0].upper()}?" if close else ""
        logger.warning("%s is not a setting and is ignored%s", variable, meant)
    for name in ("comfyui_path", "comfyui_python"):
        if environ.get(name.upper()):
            values.setdefault(name, _from_here(name, environ[name.upper()]))
    return values


def _folders(text: str) -> list[str]:
    return [folder for folder in text.split(os.pathsep) if folder]


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "model_dirs": _folders,
    "comfyui_roots": _folders,
    "comfyui_args": shlex.split,
    "allowed_origins": lambda text: text.replace(",", " ").split(),
    "models": json.loads,
}
"""Parsers of environment variables whose text pydantic cannot convert."""


def _from_here(name: str, value: Any) -> Any:
    """Resolve paths of the command line and the environment against the current folder."""
    return _below(Path.cwd(), value) if name in _PATHS else value


def _below(base: Path, value: Any) -> Any:
    """Expand ``~`` in a path or in a list of paths, and resolve relative paths against ``base``."""
    if isinstance(value, (list, tuple)):
        return [_below(base, part) for part in value]
    return base / Path(value).expanduser() if isinstance(value, (str, Path)) else value


def _explain(error: ValidationError) -> str:
    """Describe every problem that pydantic found: setting, value and allowed values."""
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, Settings.model_fields, n=1)
            parts.append(f"unknown setting {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        elif item["type"] == "string_pattern_mismatch":  # only device settings have a pattern
            parts.append(f"setting {name!r} is {item['input']!r}: {_DEVICES}")
        else:
            what = re.sub(r"^Input should be", "must be", item["msg"])
            what = re.sub(r", unable to (parse|interpret).*", "", what)
            parts.append(f"setting {name!r} is {item['input']!r}: {what}")
    return "; ".join(parts)
