"""Finds a LoRA's file by name in ComfyUI's LoRA folders and those of the settings."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import Settings
from ..core import BadRequest, ModelNotFound, logger
from ..files.identity import check_same, first_existing, identity_of
from ..wire.messages import FileId

ENDINGS = (".safetensors", ".sft", ".pt", ".ckpt", ".bin", ".pth")
_MAX_NAME = 4096
_MAX_NAMES = 20_000


@dataclass(frozen=True)
class FoundLoRA:
    """A LoRA file: its name in ComfyUI's lists, and its identity."""

    name: str
    source: FileId

    @property
    def path(self) -> Path:
        """Path of the file, links resolved."""
        return Path(self.source.path)

    @property
    def is_safetensors(self) -> bool:
        """Whether the file's suffix is one of safetensors, not of torch's own formats."""
        return self.path.suffix.lower() in (".safetensors", ".sft")


class LoRAFolders:
    """ComfyUI's LoRA folders, those of ``extra_model_paths.yaml`` included, and those in ``model_dirs``.

    Every method may block on a slow disk: call it in a thread.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def folders(self) -> list[Path]:
        """The folders in search order."""
        return list(dict.fromkeys(_folders(self._settings)))

    def find(self, name: str, file: FileId | None = None) -> FoundLoRA:
        """Find a LoRA's file.

        Args:
            name: path relative to a folder, as in ComfyUI's lists, or a full path.
            file: identity of the client's own file, if the client has one.

        Raises:
            BadRequest: ``name`` is empty or too long, or its suffix is not that of a LoRA file.
            ModelNotFound: the folders have no such file; the hint suggests similar names.
            ModelMismatchError: the client's file differs from the daemon's.
        """
        if not name or "\0" in name or len(name) > _MAX_NAME:
            raise BadRequest(f"LoRA name {name[:80]!r} is empty, too long, or has a NUL character")
        path = self._first(name)
        real = path.resolve()
        roots = [folder.resolve() for folder in self.folders]
        if not any(real.is_relative_to(root) for root in roots):
            raise ModelNotFound(
                f"LoRA {name!r} is outside the LoRA folders",
                "Add its folder to model_dirs (LUNA_MODEL_DIRS), or set comfyui_path",
            )
        if not real.is_file():
            raise ModelNotFound(f"LoRA {name!r} is not a file")
        if real.suffix.lower() not in ENDINGS:
            raise BadRequest(f"LoRA {name!r} is not a LoRA file", f"Its name must end in {', '.join(ENDINGS)}")
        source = identity_of(str(real), real.stat())
        if file is not None:
            check_same(f"LoRA {name!r}", file, source)
        return FoundLoRA(self._listed_as(path, real, roots), source)

    def _first(self, name: str) -> Path:
        wanted = Path(name)
        tried = [wanted] if wanted.is_absolute() else [folder / wanted for folder in self.folders]
        path = first_existing(tried)
        if path is not None:
            return path
        if not self.folders:
            raise ModelNotFound(f"LoRA {name!r}: no LoRA folder is known", "Set comfyui_path or model_dirs")
        known = {known.lower(): known for known in self.names()}
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"Similar names: {', '.join(known[match] for match in close)}" if close else ""
        raise ModelNotFound(
            f"no LoRA is named {name!r}; looked in {', '.join(str(folder) for folder in self.folders)}", hint
        )

    def _listed_as(self, path: Path, real: Path, roots: list[Path]) -> str:
        """The name relative to the file's folder; the full path if that name means another folder's file."""
        for folder, root in zip(self.folders, roots):
            for base, place in ((folder, path), (root, real)):
                if place.is_relative_to(base):
                    name = place.relative_to(base).as_posix()
                    return name if self._is_first(name, real) else str(real)
        return str(real)

    def _is_first(self, name: str, real: Path) -> bool:
        for folder in self.folders:
            if (folder / name).exists():
                return (folder / name).resolve() == real
        return True

    def names(self) -> list[str]:
        """Names of the LoRAs that ComfyUI lists, about 20,000 at most."""
        names: dict[str, None] = {}
        for folder in self.folders:
            if folder.name.lower() not in ("lora", "loras"):
                continue  # a folder of ``model_dirs`` with models of all kinds
            for place, _, files in os.walk(folder, followlinks=True):
                for file in files:
                    if file.lower().endswith(ENDINGS):
                        names[(Path(place) / file).relative_to(folder).as_posix()] = None
                if len(names) >= _MAX_NAMES:  # probably a link that leads back to itself
                    return list(names)
        return list(names)


def _folders(settings: Settings) -> Iterable[Path]:
    if settings.comfyui_path is not None:
        first, after = extra_folders(settings.comfyui_path, settings.comfyui_args)
        yield from first
        yield settings.comfyui_path / "models" / "loras"
        yield from after
    for folder in settings.model_dirs:
        yield folder / "loras"
        yield folder


def extra_folders(comfyui: Path, arguments: list[str]) -> tuple[list[Path], list[Path]]:
    """LoRA folders of ``extra_model_paths.yaml`` and ``--extra-model-paths-config``.

    Args:
        comfyui: ComfyUI's folder.
        arguments: ComfyUI's command line.

    Returns:
        Folders that ComfyUI searches before its own, and folders searched after.
    """
    first: list[Path] = []
    after: list[Path] = []
    for file in [comfyui / "extra_model_paths.yaml", *_named_files(arguments)]:
        if file.is_file():
            for folder, is_default in _from_yaml(file):
                if is_default:
                    first.insert(0, folder)
                else:
                    after.append(folder)
    return first, after


def _named_files(arguments: list[str]) -> Iterable[Path]:
    taking = False
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if argument.startswith("--"):
            taking = flag == "--extra-model-paths-config"
            if taking and value:
                yield Path(value)
        elif taking:
            yield Path(argument)


def _from_yaml(file: Path) -> Iterable[tuple[Path, bool]]:
    """LoRA folders and whether each is searched before ComfyUI's own; warns about an unreadable file."""
    import yaml

    try:
        document = yaml.safe_load(file.read_text("utf-8")) or {}
        sections: list[dict[str, Any]] = [section for section in document.values() if section]
        for section in sections:
            base = Path(os.path.expandvars(os.path.expanduser(section.get("base_path") or "")))
            for line in str(section.get("loras") or "").split("\n"):
                if line:
                    yield Path(os.path.normpath(file.resolve().parent / base / line)), bool(section.get("is_default"))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        logger.warning("%s cannot be read: %s", file, error)
