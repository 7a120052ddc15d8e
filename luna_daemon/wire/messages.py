"""LDP/1: every message on the socket, grouped by the side that reads the message.

Messages are msgspec structs in msgpack. Decoding checks types and raises ``ProtocolError``. Messages contain no
tensor bytes: a ``TensorRef`` says where these lie.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec

from .values import ComfyId as ComfyId
from .values import FileId as FileId
from .values import ModelRef as ModelRef
from .values import PatchUse as PatchUse
from .values import TensorRef as TensorRef
from .values import Tiling as Tiling
from .values import Tokens as Tokens

# --- calls: what a request may ask for; the tag is the op --------------------------------------------------------


class Ping(msgspec.Struct, tag_field="op", tag="ping", frozen=True):
    """Do nothing; the control process answers at once."""


class Info(msgspec.Struct, tag_field="op", tag="info", frozen=True):
    """Everything the daemon knows about itself."""


class ArenaProof(msgspec.Struct, tag_field="op", tag="arena", frozen=True):
    """Proof that the client sees the daemon's memory: the nonce that the client read from the arena folder."""

    nonce: str
    space: str = ""
    """The client's PID namespace: the daemon frees a dead client's memory only if it can see the client's process."""


class Alloc(msgspec.Struct, tag_field="op", tag="alloc", frozen=True):
    """Reserve an arena slot to write a tensor into. The reply's only tensor is the slot."""

    nbytes: int


class Echo(msgspec.Struct, tag_field="op", tag="echo", frozen=True):
    """Diagnostic: a worker reads the input, works for ``seconds``, and returns ``nbytes`` bytes of float32."""

    nbytes: int = 0
    seconds: float = 0.0


class VaeEncode(msgspec.Struct, tag_field="op", tag="vae.encode", frozen=True):
    """Pixels ``[B,H,W,C]`` float32 in 0..1 to latents ``[B,C,h,w]`` float32."""

    model: ModelRef
    tiling: Tiling | None = None
    raw: bool = False
    """ComfyUI's ``first_stage_model.encode`` alone: no cropping, scaling or slicing."""
    attributes: dict[str, Any] = {}
    """Attributes to set on the network's layers for this call, by layer and name; packed by ``wire.packing``."""
    generators: list[str] = []
    """Random generators (``cpu``, ``cuda``) whose states are the last tensors of the request."""


class VaeDecode(msgspec.Struct, tag_field="op", tag="vae.decode", frozen=True):
    """Latents ``[B,C,h,w]`` to pixels ``[B,H,W,C]`` float32 in 0..1."""

    model: ModelRef
    tiling: Tiling | None = None
    raw: bool = False
    """ComfyUI's ``first_stage_model.decode`` alone."""
    options: dict[str, Any] = {}
    """ComfyUI's ``vae_options``: plain values."""
    attributes: dict[str, Any] = {}
    """See ``VaeEncode``."""
    generators: list[str] = []
    """See ``VaeEncode``."""


class ClipTokenize(msgspec.Struct, tag_field="op", tag="clip.tokenize", frozen=True):
    """A prompt with ``(word:1.3)`` weights to ``Tokens``, in the result's ``tokens``."""

    model: ModelRef
    text: str


class ClipEncode(msgspec.Struct, tag_field="op", tag="clip.encode", frozen=True):
    """Text or tokens to conditioning: tensors named in the result's ``names`` (``cond``, ``pooled_output`` ...)."""

    model: ModelRef
    text: str | None = None
    tokens: Tokens | None = None
    layer: int | None = None
    """ComfyUI's ``layer_idx``: -1 last, -2 penultimate; ``None`` is the model family's default."""
    unprojected: bool = False
    """Pooled output before the text projection (``return_pooled="unprojected"``)."""
    packed: Any = None
    """ComfyUI's own tokens, embeddings included, as ``wire.packing`` packs them; instead of ``text`` and ``tokens``."""
    part: str = ""
    """The only encoder to run: ``cond_stage_model.<part>.encode_token_weights(packed)``, with ``options``."""
    options: dict[str, Any] = {}
    """Arguments of ``set_clip_options`` (of the model or the part) besides ``layer`` and ``unprojected``."""
    patches: list[PatchUse] = []
    """LoRA and other weight patches in the order of ``add_patches``."""
    hooks: list[PatchUse] = []
    """Hook patches applied after ``patches``, in order, with the strength of the current keyframe."""
    generators: list[str] = []
    """See ``VaeEncode``; with ``packed`` only."""


class PatchPut(msgspec.Struct, tag_field="op", tag="clip.patch", frozen=True):
    """Keep a patch set for ``ClipEncode.patches`` and ``hooks``: ``packed`` maps weight keys to patches."""

    name: str
    """Hash of the set's content: equal names mean equal sets."""
    packed: Any
    models: list[ModelRef] = []
    """Text encoders whose weights ``packed`` refers to by index and key; the worker uses its own copy of them."""


class ModelsList(msgspec.Struct, tag_field="op", tag="models.list", frozen=True):
    """Names from the configuration and what is loaded."""


class ModelLoad(msgspec.Struct, tag_field="op", tag="models.load", frozen=True):
    """Load a model; the result holds its properties (latent channels, ratios, encoders)."""

    model: ModelRef
    pin: bool = False
    """Whether the model stays loaded: neither unloaded when idle nor evicted."""


class ModelUnload(msgspec.Struct, tag_field="op", tag="models.unload", frozen=True):
    """Free a model's memory; ``None`` unloads all models."""

    model: ModelRef | None = None


class LoraPut(msgspec.Struct, tag_field="op", tag="lora.put", frozen=True):
    """Keep a state dict in RAM under ``name``; tensors in the order of ``keys``."""

    name: str
    keys: list[str]


class LoraGet(msgspec.Struct, tag_field="op", tag="lora.get", frozen=True):
    """The state dict kept under ``name``: the result's ``keys`` name the tensors."""

    name: str


class LoraCheck(msgspec.Struct, tag_field="op", tag="lora.check", frozen=True):
    """Whether ``name`` is in the cache: the result's ``exists``."""

    name: str


class LoraStats(msgspec.Struct, tag_field="op", tag="lora.stats", frozen=True):
    """Statistics of the LoRA cache."""


class LoraLoad(msgspec.Struct, tag_field="op", tag="lora.load", frozen=True):
    """A LoRA's tensors for the client to map copy-on-write: in the file itself or in a copy in shared memory."""

    name: str
    """Name of the file in ComfyUI's list, or its full path; or a name from ``LoraPut``."""
    file: FileId | None = None
    """The client's file, if the client has the file: the daemon's file must be the same."""
    copy: bool = False
    """Whether to send the bytes (by shared memory or socket), since the client cannot open the daemon's file."""


class LoraWarm(msgspec.Struct, tag_field="op", tag="lora.warm", frozen=True):
    """Load a LoRA file into the cache."""

    name: str


class LoraPin(msgspec.Struct, tag_field="op", tag="lora.pin", frozen=True):
    """Load a LoRA and keep it until it is evicted by name; ``pinned=False`` makes it evictable again."""

    name: str
    pinned: bool = True


class LoraEvict(msgspec.Struct, tag_field="op", tag="lora.evict", frozen=True):
    """Remove a LoRA from the cache, pinned or not; ``None`` removes all that are not pinned."""

    name: str | None = None


class Register(msgspec.Struct, tag_field="op", tag="register", frozen=True):
    """Legacy registration call: succeeds and does nothing."""

    kind: str
    type: str = ""


class Report(msgspec.Struct, tag_field="op", tag="report", frozen=True):
    """Counts of a client's work without the daemon, which ``info`` shows."""

    fallbacks: int = 0
    materialised: int = 0


class Reload(msgspec.Struct, tag_field="op", tag="reload", frozen=True):
    """Read the settings again and apply those that can change while requests run."""


class TokenRenew(msgspec.Struct, tag_field="op", tag="token.renew", frozen=True):
    """Make a new token: connections that used the old token close once their requests end."""


class Drain(msgspec.Struct, tag_field="op", tag="drain", frozen=True):
    """Refuse new requests; finish the running requests."""


class Shutdown(msgspec.Struct, tag_field="op", tag="shutdown", frozen=True):
    """Drain, then end."""


Call = Union[
    Ping, Info, ArenaProof, Alloc, Echo, VaeEncode, VaeDecode, ClipTokenize, ClipEncode, ModelsList, ModelLoad,
    ModelUnload, PatchPut, LoraPut, LoraGet, LoraCheck, LoraStats, LoraLoad, LoraWarm, LoraPin, LoraEvict,
    Register, Report, Reload, TokenRenew, Drain, Shutdown,
]  # fmt: skip


PAGE_OPS = frozenset({"models.load", "models.unload", "drain", "lora.warm", "lora.pin", "lora.evict"})
"""Calls of the status page and ComfyUI's panel: ``POST /api/call`` accepts only these."""


# --- read by the daemon ------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message of every connection."""

    protocol: int
    token: str
    role: str
    """``client`` or ``worker``."""
    name: str
    pid: int
    version: str = ""


class Request(msgspec.Struct, tag="request", frozen=True):
    """A call. ``call`` is decoded separately, so that the answer to a malformed call can name the request's id."""

    id: int
    call: msgspec.Raw
    tensors: list[TensorRef] = []
    deadline_s: float | None = None
    """Seconds from receipt; a request not started by then is answered ``DeadlineExceeded``."""
    priority: int = 1


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Cancel the request of this id: at once if queued, at the next tile if running."""

    id: int


class Release(msgspec.Struct, tag="release", frozen=True):
    """End the sender's use of these slots."""

    slots: list[int]


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """Last message of a client that closes normally and no longer uses any slot."""


class WorkerReady(msgspec.Struct, tag="ready", frozen=True):
    """A worker has imported its backend and waits for jobs."""

    backend: str
    versions: dict[str, str]
    devices: list[str]
    arena: bool
    """Whether the worker sees the shared memory."""


class WorkerStatus(msgspec.Struct, tag="status", frozen=True):
    """Models that a worker holds now (``models``: key to bytes), and its resident memory in bytes (``rss``)."""

    models: dict[str, int]
    rss: int


# --- read by clients and workers ---------------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True):
    """The daemon's limits; checked before memory is allocated."""

    header_bytes: int
    tensor_bytes: int
    arena_bytes_per_client: int
    queue: int
    clients: int


class ArenaInfo(msgspec.Struct, frozen=True):
    """The arena's folder, and the name of the file in it with the nonce for ``ArenaProof``."""

    folder: str
    nonce: str


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """Answer to an accepted ``hello``."""

    session: int
    version: str
    limits: Limits
    arena: ArenaInfo | None = None
    arena_why: str = ""
    """Why there is no arena."""


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """Result of a call."""

    id: int
    result: Any = None
    tensors: list[TensorRef] = []
    notes: list[str] = []
    """Texts for the user, such as that tiles were used for lack of memory."""


class Failure(msgspec.Struct, tag="failure", frozen=True):
    """A typed error; with id 0 an error of the connection, which then closes."""

    id: int
    code: str
    message: str
    hint: str = ""
    retry_after_s: float = 0.0
    trace: str = ""
    """The stack of a bug in a worker, for the daemon's log; empty for clients."""


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """Progress: ``queued``, ``starting``, ``loading``, ``running`` or ``tile`` (``step`` of ``total``)."""

    id: int
    stage: str
    step: int = 0
    total: int = 0


class LoadSpec(msgspec.Struct, frozen=True):
    """A resolved model for a worker to load; ``key`` is the model's name throughout the daemon."""

    key: str
    kind: str
    type: str
    files: tuple[str, ...]
    device: str
    precision: str
    checkpoint: bool = False
    comfy: ComfyId | None = None
    """The ComfyUI that loads the model, already checked; ``None`` for another backend."""


class Patch(msgspec.Struct, array_like=True, frozen=True):
    """A patch set that is new to the worker; its tensors are the job's ``tensors[start : start + count]``."""

    name: str
    packed: Any
    start: int
    count: int
    models: list[LoadSpec] = []
    """Models whose weights the patch set refers to."""


class Job(msgspec.Struct, tag="job", frozen=True):
    """Work for a worker: a call with its resolved model; the models in ``unload`` are unloaded first."""

    id: int
    call: msgspec.Raw
    model: LoadSpec
    tensors: list[TensorRef] = []
    unload: list[str] = []
    patches: list[Patch] = []
    grant: TensorRef | None = None
    """A slot for the result if its size is predictable: saves a round trip."""


class Unload(msgspec.Struct, tag="unload", frozen=True):
    """Free the memory of these models."""

    keys: list[str]


Message = Union[
    Hello, Request, Cancel, Release, Bye, WorkerReady, WorkerStatus, Welcome, Reply, Failure, Progress, Job, Unload,
]  # fmt: skip
