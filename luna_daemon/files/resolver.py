"""Finds the files of a client's ``ModelRef`` on disk. No path from the wire leads out of the model folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from ..config import Settings
from ..core import BadRequest, ModelKind, ModelNotFound
from ..wire.messages import ComfyId, FileId, LoadSpec, ModelRef
from .identity import ON_ONE_DISK, check_same, file_id, first_existing, weight_files

_FOLDERS = {
    ModelKind.VAE: ("vae", "vae_approx", "checkpoints"),
    ModelKind.CLIP: ("text_encoders", "clip", "checkpoints"),
}
"""ComfyUI's folders below ``models`` that its loaders of each kind read."""


class NeedsIO(Exception):
    """A request depends on information whose retrieval would block the event loop.

    Args:
        what: description of the information, for the log.
        look: retrieves and caches the information, on any thread; an error that ``look`` raises answers the request.
    """

    def __init__(self, what: str, look: Callable[[], object]) -> None:
        super().__init__(what)
        self.look = look


class DigestUnknown(NeedsIO):
    """A client names a file by its content, which has not been hashed yet."""


class ModelResolver:
    """Resolves a ``ModelRef`` to a ``LoadSpec``, and checks every path.

    Args:
        base: the configuration file's folder, to which its paths are relative.
    """

    def __init__(self, settings: Settings, base: Path | None = None) -> None:
        self.settings = settings
        self.base = base
        self.named = settings.named_models()
        comfyui = [] if settings.comfyui_path is None else [settings.comfyui_path / "models"]
        self.roots = [path.resolve() for path in [*comfyui, *settings.model_dirs]]
        self._digests: dict[FileId, str] = {}

    def resolve(self, ref: ModelRef, comfy: ComfyId | None = None) -> LoadSpec:
        """Find the files of a model, and how to load them.

        Args:
            comfy: the ComfyUI that will load the model, already checked; its models folder is one of the model folders.

        Raises:
            BadRequest: the kind is unknown, or both or neither of name and files are set.
            ModelNotFound: the name or file does not exist; lists the paths tried.
            ModelMismatchError: the client's file is not the daemon's.
            DigestUnknown: the file's digest must be computed with ``hash`` first.
        """
        if ref.kind == ModelKind.ECHO:
            return LoadSpec("echo", "echo", "", (), "cpu", "auto")
        if ref.kind not in (ModelKind.VAE, ModelKind.CLIP):
            raise BadRequest(f"model kind {ref.kind!r} is unknown", "Use 'vae' or 'clip'")
        if bool(ref.name) == bool(ref.files):
            raise BadRequest("a model is requested either by name or by files", f"Names: {', '.join(self.named)}")
        if ref.name:
            family, paths = self._by_name(ref.name, ModelKind(ref.kind))
        else:
            family, paths = self._by_files(ref.files, ModelKind(ref.kind), comfy)
        return self._spec(ref, ref.type or family, paths, comfy)

    def _by_name(self, name: str, kind: ModelKind) -> tuple[str, list[Path]]:
        """Look up family and files of a model of the configuration."""
        known = {key.lower(): model for key, model in self.named.items()} | self.named
        model = known.get(name) or known.get(name.lower())
        if model is None:
            raise ModelNotFound(f"no model is named {name!r}", f"Names: {', '.join(self.named)}")
        paths = [self._from_config(file, kind) for file in (model.vae if kind is ModelKind.VAE else model.clip)]
        if not paths:
            raise ModelNotFound(f"model {name!r} has no {kind.value}", "Add its files to the configuration")
        return model.type, paths

    def _by_files(self, files: Iterable[FileId], kind: ModelKind, comfy: ComfyId | None) -> tuple[str, list[Path]]:
        """Give the default family, and the client's files after checking them."""
        if self.settings.config_only:
            raise ModelNotFound("models by file are switched off (config_only)", f"Names: {', '.join(self.named)}")
        roots = [*self.roots, *map(_real, self._configured_folders())]
        if comfy is not None:
            roots.append(_real(Path(comfy.root, "models")))
        return self.settings.model_type, [self._from_client(file, kind, roots) for file in files]

    def _spec(self, ref: ModelRef, family: str, paths: list[Path], comfy: ComfyId | None) -> LoadSpec:
        device, precision = (getattr(self.settings, f"{ref.kind}_{setting}") for setting in ("device", "precision"))
        digest = hashlib.blake2b(digest_size=8)
        for file in (file for path in paths for file in weight_files(path)):
            identity = file_id(file)
            digest.update(f"{identity.path}|{identity.size}|{identity.mtime_ns}|{identity.inode};".encode())
        digest.update(f"{family}|{device}|{precision}|{ref.checkpoint}|{comfy.key if comfy else ''}".encode())
        # The key does not contain the name of the request: a file is loaded once, under whatever names clients use.
        key = f"{ref.kind}:{paths[0].stem}:{digest.hexdigest()}"
        return LoadSpec(key, ref.kind, family, tuple(map(str, paths)), device, precision, ref.checkpoint, comfy)

    # --- paths ---

    def _from_config(self, name: str, kind: ModelKind) -> Path:
        """Find a file of the configuration: absolute, below ComfyUI, in a model folder, or beside the configuration."""
        path = Path(name).expanduser()
        beside = [folder / path for folder in (self.base, Path.cwd()) if folder is not None]
        return _first(name, [path] if path.is_absolute() else [*self._below_roots(path, kind), *beside]).resolve()

    def _below_roots(self, path: Path, kind: ModelKind) -> list[Path]:
        comfyui = self.settings.comfyui_path
        tried = [] if comfyui is None else [comfyui / path]
        for root in self.roots:
            tried += [root / folder / path for folder in (*_FOLDERS[kind], "")]
        return tried

    def _from_client(self, file: FileId, kind: ModelKind, roots: list[Path]) -> Path:
        """Find a client's file, below ``roots`` after following links, and check that it is the same file."""
        path = Path(file.path)
        if "\0" in file.path or not file.path:
            raise BadRequest(f"model path {file.path!r} is not a path")
        real = _first(file.path, [path] if path.is_absolute() else self._below_roots(path, kind)).resolve()
        if not any(real.is_relative_to(root) for root in roots):
            raise ModelNotFound(
                f"model file {file.path!r} is outside the model folders",
                "Add its folder to model_dirs (LUNA_MODEL_DIRS) or set comfyui_path",
            )
        if not (real.is_file() or real.is_dir()):
            raise ModelNotFound(f"model file {file.path!r} is neither a file nor a folder")
        self._check_identity(file, real)
        return real

    def _check_identity(self, file: FileId, real: Path) -> None:
        """Refuse a file that is not the client's: compare digests if the client sent one, else ``ON_ONE_DISK``."""
        daemons = file_id(real)
        if file.digest and daemons not in self._digests:
            raise DigestUnknown(str(real), lambda: self.hash(real))
        daemons = msgspec.structs.replace(daemons, digest=self._digests.get(daemons, ""))
        check_same(f"model file {file.path!r}", file, daemons, ("digest",) if file.digest else ON_ONE_DISK)

    def hash(self, path: Path) -> None:
        """Compute a file's SHA-256 and keep it until the file changes; takes seconds for gigabytes."""
        identity = file_id(path)
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
        self._digests[identity] = f"sha256:{digest.hexdigest()}"

    def _configured_folders(self) -> Iterable[Path]:
        """Folders of the absolute files in the configuration: the user trusts these folders by naming the files."""
        names = (name for model in self.named.values() for name in [*model.vae, *model.clip])
        return (path.parent for name in names if (path := Path(name).expanduser()).is_absolute())


def _real(folder: Path) -> Path:
    """Follow links; a loop of links, for which ``Path.resolve`` raises, stays as it is."""
    return Path(os.path.realpath(folder))


def _first(name: str, tried: list[Path]) -> Path:
    if (path := first_existing(tried)) is not None:
        return path
    places = ", ".join(dict.fromkeys(str(path) for path in tried)) or "no folder: set comfyui_path or model_dirs"
    raise ModelNotFound(f"model file {name!r} does not exist; tried {places}")
