"""From what a client names to files on disk: names, folders, identity. A path from the wire stays in the folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from .config import NamedModel, Settings
from .core import BadRequest, ModelKind, ModelMismatchError, ModelNotFound
from .wire.messages import FileId, LoadSpec, ModelRef

__all__ = ["ModelResolver", "file_id", "load_bytes"]

_FOLDERS = {
    ModelKind.VAE: ("vae", "vae_approx", "checkpoints"),
    ModelKind.CLIP: ("text_encoders", "clip", "checkpoints"),
}
"""ComfyUI's folders below ``models`` that its loaders of each kind read."""


def file_id(path: Path) -> FileId:
    """Identity of a file on this host: what a client sends, and what the daemon compares.

    Raises:
        ModelNotFound: it is not there.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ModelNotFound(f"model file {str(path)!r}: {error.strerror or error}", "Check the path") from error
    return FileId(str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)


class ModelResolver:
    """Turns a ``ModelRef`` into a ``LoadSpec``, with every path checked.

    Args:
        settings: named models, folders, devices, precisions.
        base: folder that relative paths of the configuration file belong to.
    """

    def __init__(self, settings: Settings, base: Path | None = None) -> None:
        self.settings = settings
        self.base = base
        self.named = settings.named_models()
        self.roots = [path.resolve() for path in self._roots()]

    def _roots(self) -> Iterable[Path]:
        if self.settings.comfyui_path is not None:
            yield self.settings.comfyui_path / "models"
        yield from self.settings.model_dirs

    def resolve(self, ref: ModelRef) -> LoadSpec:
        """The model to load.

        Raises:
            BadRequest: unknown kind, or both or neither of name and files.
            ModelNotFound: no such name or file; lists what was tried.
            ModelMismatchError: the client's file is not this one.
        """
        if ref.kind == ModelKind.ECHO:
            return LoadSpec("echo", "echo", "", (), "cpu", "auto")
        if ref.kind not in (ModelKind.VAE, ModelKind.CLIP):
            raise BadRequest(f"model kind {ref.kind!r} is unknown", "Use 'vae' or 'clip'")
        if bool(ref.name) == bool(ref.files):
            raise BadRequest("a model is given either by name or by files", f"Names: {', '.join(self.named)}")
        kind = ModelKind(ref.kind)
        if ref.name:
            model = self._named(ref.name)
            paths = [self._from_config(name, kind) for name in (model.vae if kind is ModelKind.VAE else model.clip)]
            if not paths:
                raise ModelNotFound(f"model {ref.name!r} has no {kind.value}", "Add its files to the configuration")
            return self._spec(kind, ref.name, ref.type or model.type, paths)
        if self.settings.config_only:
            raise ModelNotFound("models by file are switched off (config_only)", f"Names: {', '.join(self.named)}")
        paths = [self._from_client(file, kind) for file in ref.files]
        return self._spec(kind, paths[0].stem, ref.type or self.settings.model_type, paths)

    def _named(self, name: str) -> NamedModel:
        name = name if name in self.named else name.lower()
        if name not in self.named:
            raise ModelNotFound(f"no model is named {name!r}", f"Names: {', '.join(self.named)}")
        return self.named[name]

    def _spec(self, kind: ModelKind, name: str, family: str, paths: list[Path]) -> LoadSpec:
        s = self.settings
        device, precision = (
            (s.vae_device, s.vae_precision) if kind is ModelKind.VAE else (s.clip_device, s.clip_precision)
        )
        digest = hashlib.blake2b(digest_size=4)
        for path in paths:
            facts = file_id(path)
            digest.update(f"{facts.path}|{facts.size}|{facts.mtime_ns}|{facts.inode};".encode())
        digest.update(f"{family}|{device}|{precision}".encode())
        key = f"{kind.value}:{name}:{digest.hexdigest()}"
        return LoadSpec(key, kind.value, family, tuple(str(path) for path in paths), device, precision)

    # --- paths ---

    def _from_config(self, name: str, kind: ModelKind) -> Path:
        """A path that the user wrote: absolute, below ComfyUI, in a model folder, or beside the configuration."""
        given = Path(name).expanduser()
        tried = [given] if given.is_absolute() else [*self._below_roots(given, kind), *self._beside(given)]
        return _first_existing(name, tried)

    def _beside(self, given: Path) -> list[Path]:
        return [folder / given for folder in (self.base, Path.cwd()) if folder is not None]

    def _below_roots(self, given: Path, kind: ModelKind) -> list[Path]:
        tried = []
        if self.settings.comfyui_path is not None:
            tried.append(self.settings.comfyui_path / given)
        for root in self.roots:
            tried += [root / folder / given for folder in _FOLDERS[kind]]
            tried.append(root / given)
        return tried

    def _from_client(self, file: FileId, kind: ModelKind) -> Path:
        """A path from the wire: it must end, links followed, below a model folder, and be the client's very file."""
        given = Path(file.path)
        if "\0" in file.path or not file.path:
            raise BadRequest(f"model path {file.path!r} is not a path")
        path = _first_existing(file.path, [given] if given.is_absolute() else self._below_roots(given, kind))
        real = path.resolve()
        allowed = [*self.roots, *(Path(os.path.realpath(path.parent)) for path in self._configured())]
        if not any(real.is_relative_to(root) for root in allowed):
            raise ModelNotFound(
                f"model file {file.path!r} is outside the model folders",
                "Add its folder to model_dirs (LUNA_MODEL_DIRS) or give comfyui_path",
            )
        if not (real.is_file() or real.is_dir()):
            raise ModelNotFound(f"model file {file.path!r} is neither a file nor a folder")
        mine = file_id(real)
        for field in ("size", "mtime_ns"):
            theirs = getattr(file, field)
            if theirs and theirs != getattr(mine, field):
                raise ModelMismatchError(
                    f"model file {file.path!r}: the client's {field} is {theirs}, the daemon's {getattr(mine, field)}",
                    "Both must read the same file",
                )
        return real

    def _configured(self) -> Iterable[Path]:
        """Absolute files named in the configuration: their folders are trusted too."""
        for model in self.named.values():
            yield from (Path(name) for name in [*model.vae, *model.clip] if Path(name).is_absolute())


def _first_existing(name: str, tried: list[Path]) -> Path:
    for path in tried:
        try:
            if path.exists():
                return path
        except OSError:
            continue
    places = ", ".join(str(path) for path in tried) or "no folder: give comfyui_path or model_dirs"
    raise ModelNotFound(f"model file {name!r} does not exist; tried {places}")


def load_bytes(spec: LoadSpec) -> int:
    """Bytes of a model's files: about what loading it takes."""
    total = 0
    for name in spec.files:
        path = Path(name)
        found = path.rglob("*.safetensors") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in found if file.is_file())
    return total
