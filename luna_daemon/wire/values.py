"""Values inside messages: tensor descriptors, models, files, ComfyUI installations, tile sizes."""

from __future__ import annotations

import hashlib

import msgspec

Tokens = dict[str, list[list[tuple[int, float]]]]
"""Per text encoder (``l``, ``g``, ``t5xxl``) its chunks of ``(token id, weight)``, as ComfyUI's tokenizers make."""


class TensorRef(msgspec.Struct, array_like=True, frozen=True):
    """Descriptor of a tensor: dtype, shape, and where its bytes lie (contiguous, little-endian)."""

    dtype: str
    """torch's name without the prefix: ``float32``, ``bfloat16``, ``uint8`` ..."""
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    """Bytes from the start of the segment, or of this frame's payload when ``slot`` is 0."""
    slot: int = 0
    """Number of the arena slot; 0 means that the bytes are in this frame's payload."""
    segment: str = ""
    """Name of the arena segment that holds the slot."""
    shared: bool = False
    """Whether other processes read the same slot: copy before use, then release."""
    order: tuple[int, ...] = ()
    """Dimensions from the slowest to the fastest in memory; empty for C order. torch chooses kernels by memory layout,
    so a bit-equal result needs the same layout."""

    def placed(self, offset: int, slot: int = 0, segment: str = "", shared: bool = False) -> TensorRef:
        """A copy of this descriptor with another place: in a slot, or inline."""
        return msgspec.structs.replace(self, offset=offset, slot=slot, segment=segment, shared=shared)


class Tiling(msgspec.Struct, frozen=True):
    """ComfyUI's tile arguments. Latent units for decode, pixels for encode; ``None`` is ComfyUI's default."""

    tile_x: int | None = None
    tile_y: int | None = None
    overlap: int | None = None
    tile_t: int | None = None
    overlap_t: int | None = None

    def given(self) -> dict[str, int]:
        """The arguments that are not ``None``, so that ComfyUI's own defaults apply to the rest."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None}


class FileId(msgspec.Struct, frozen=True):
    """A model file as the client sees it. Size and mtime (and inode, on one host) must agree with the daemon's."""

    path: str
    size: int = 0
    mtime_ns: int = 0
    inode: int = 0
    digest: str = ""
    """``sha256:...`` of the content, where the two sides do not share a disk."""


class ComfyId(msgspec.Struct, frozen=True):
    """The ComfyUI installation that a client runs; a worker of this installation computes for the client."""

    root: str
    """ComfyUI's folder."""
    python: str
    """The interpreter that runs ComfyUI."""
    version: str = ""
    torch: str = ""
    flags: tuple[str, ...] = ()
    """Command-line flags that change results, such as ``--fp32-vae``."""

    @property
    def key(self) -> str:
        """Short name of folder, interpreter and flags."""
        parts = "\0".join((self.root, self.python, *self.flags))
        return hashlib.blake2b(parts.encode(), digest_size=5).hexdigest()


class ModelRef(msgspec.Struct, frozen=True):
    """Which model: a name from the configuration, or files; ``type`` is the family (``sdxl``, ``flux`` ...)."""

    kind: str
    name: str = ""
    files: tuple[FileId, ...] = ()
    type: str = ""
    checkpoint: bool = False
    """Whether ``files`` is a single checkpoint that contains the VAE or the text encoders."""
    comfy: ComfyId | None = None
    """The ComfyUI that runs the model, for a bit-equal result; ``None`` is the daemon's own backend."""


class PatchUse(msgspec.Struct, array_like=True, frozen=True):
    """A patch set by ``name`` (the hash of its content, see ``PatchPut``), and the strength of its application."""

    name: str
    strength_patch: float = 1.0
    strength_model: float = 1.0
