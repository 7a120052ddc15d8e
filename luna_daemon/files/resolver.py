"""From what a client names to files on disk: names, folders, identity. A path from the wire stays in the folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from ..config import NamedModel, Settings
from ..core import BadRequest, ModelKind, ModelNotFound
from ..wire.messages import ComfyId, FileId, LoadSpec, ModelRef
from .identity import ON_ONE_DISK, check_same, file_id, first_existing, weight_files

_FOLDERS = {
    ModelKind.VAE: ("vae", "vae_approx", "checkpoints"),
    ModelKind.CLIP: ("text_encoders", "clip", "checkpoints"),
}
"""ComfyUI's folders below ``models`` that its loaders of each kind read."""


class NeedsIO(Exception):
    """Something about a request is not known yet, and too slow to find out on the event loop.

    Args:
        what: for the log.
        look: finds it out and keeps it, on any thread; what it raises is the request's answer.
    """

    def __init__(self, what: str, look: Callable[[], object]) -> None:
        super().__init__(what)
        self.look = look


class DigestUnknown(NeedsIO):
    """A client names a file by its content, which has not been hashed yet."""


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
        self._digests: dict[FileId, str] = {}

    def _roots(self) -> Iterable[Path]:
        if self.settings.comfyui_path is not None:
            yield self.settings.comfyui_path / "models"
        yield from self.settings.model_dirs

    def resolve(self, ref: ModelRef, comfy: ComfyId | None = None) -> LoadSpec:
        """The model to load.

        Args:
            comfy: the ComfyUI that loads it, checked; its own model folder is one of ours then.

        Raises:
            BadRequest: unknown kind, or both or neither of name and files.
            ModelNotFound: no such name or file; lists what was tried.
            ModelMismatchError: the client's file is not this one.
            DigestUnknown: ``hash`` this file first.
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
            names = model.vae if kind is ModelKind.VAE else model.clip
            paths = [self._from_config(name, kind).resolve() for name in names]
            if not paths:
                raise ModelNotFound(f"model {ref.name!r} has no {kind.value}", "Add its files to the configuration")
            return self._spec(kind, ref.type or model.type, paths, ref.checkpoint, comfy)
        if self.settings.config_only:
            raise ModelNotFound("models by file are switched off (config_only)", f"Names: {', '.join(self.named)}")
        theirs = [] if comfy is None else [Path(os.path.realpath(os.path.join(comfy.root, "models")))]
        paths = [self._from_client(file, kind, theirs) for file in ref.files]
        return self._spec(kind, ref.type or self.settings.model_type, paths, ref.checkpoint, comfy)

    def _named(self, name: str) -> NamedModel:
        known = {own.lower(): model for own, model in self.named.items()} | self.named
        model = known.get(name) or known.get(name.lower())
        if model is None:
            raise ModelNotFound(f"no model is named {name!r}", f"Names: {', '.join(self.named)}")
        return model

    def _spec(
        self, kind: ModelKind, family: str, paths: list[Path], checkpoint: bool, comfy: ComfyId | None
    ) -> LoadSpec:
        s = self.settings
        device, precision = (
            (s.vae_device, s.vae_precision) if kind is ModelKind.VAE else (s.clip_device, s.clip_precision)
        )
        digest = hashlib.blake2b(digest_size=8)
        for file in (file for path in paths for file in weight_files(path)):
            facts = file_id(file)
            digest.update(f"{facts.path}|{facts.size}|{facts.mtime_ns}|{facts.inode};".encode())
        digest.update(f"{family}|{device}|{precision}|{checkpoint}|{comfy.key if comfy else ''}".encode())
        # By content, not by the name that was asked for: one file is loaded once, whatever a client calls it.
        key = f"{kind.value}:{paths[0].stem}:{digest.hexdigest()}"
        files = tuple(str(path) for path in paths)
        return LoadSpec(key, kind.value, family, files, device, precision, checkpoint, comfy)

    # --- paths ---

    def _from_config(self, name: str, kind: ModelKind) -> Path:
        """A path that the user wrote: absolute, below ComfyUI, in a model folder, or beside the configuration."""
        given = Path(name).expanduser()
        tried = [given] if given.is_absolute() else [*self._below_roots(given, kind), *self._beside(given)]
        return _found(name, tried)

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

    def _from_client(self, file: FileId, kind: ModelKind, theirs: list[Path]) -> Path:
        """A path from the wire: it must end, links followed, below a model folder, and be the client's very file."""
        given = Path(file.path)
        if "\0" in file.path or not file.path:
            raise BadRequest(f"model path {file.path!r} is not a path")
        path = _found(file.path, [given] if given.is_absolute() else self._below_roots(given, kind))
        real = path.resolve()
        allowed = [*self.roots, *theirs, *(Path(os.path.realpath(path.parent)) for path in self._configured())]
        if not any(real.is_relative_to(root) for root in allowed):
            raise ModelNotFound(
                f"model file {file.path!r} is outside the model folders",
                "Add its folder to model_dirs (LUNA_MODEL_DIRS) or give comfyui_path",
            )
        if not (real.is_file() or real.is_dir()):
            raise ModelNotFound(f"model file {file.path!r} is neither a file nor a folder")
        self._check_identity(file, real)
        return real

    def _check_identity(self, file: FileId, real: Path) -> None:
        """Whether the client's file is the daemon's: by content if it says so, else by what one disk tells."""
        mine = file_id(real)
        if file.digest and mine not in self._digests:
            raise DigestUnknown(str(real), lambda: self.hash(real))
        mine = msgspec.structs.replace(mine, digest=self._digests.get(mine, ""))
        check_same(f"model file {file.path!r}", file, mine, ("digest",) if file.digest else ON_ONE_DISK)

    def hash(self, path: Path) -> None:
        """Compute a file's digest and keep it as long as the file does not change; takes seconds for gigabytes."""
        mine = file_id(path)
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
        self._digests[mine] = f"sha256:{digest.hexdigest()}"

    def _configured(self) -> Iterable[Path]:
        """Absolute files named in the configuration: their folders are trusted too."""
        for model in self.named.values():
            yield from (Path(name) for name in [*model.vae, *model.clip] if Path(name).is_absolute())


def _found(name: str, tried: list[Path]) -> Path:
    path = first_existing(tried)
    if path is not None:
        return path
    places = ", ".join(dict.fromkeys(str(path) for path in tried)) or "no folder: give comfyui_path or model_dirs"
    raise ModelNotFound(f"model file {name!r} does not exist; tried {places}")
