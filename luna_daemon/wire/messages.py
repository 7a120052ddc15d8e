"""LDP/1: every message on the socket, grouped by who reads it.

Messages are msgspec structs in msgpack. Decoding checks types; anything else is a ``ProtocolError`` or, inside a
request, a ``BadRequest``. Tensor bytes are never here: a ``TensorRef`` says where they lie.
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
    """Answered at once by the control process."""


class Info(msgspec.Struct, tag_field="op", tag="info", frozen=True):
    """Everything the daemon knows about itself."""


class ArenaProof(msgspec.Struct, tag_field="op", tag="arena", frozen=True):
    """The nonce that the client read from the arena folder: proof that both see the same memory."""

    nonce: str
    space: str = ""
    """The client's process number space: memory of a client that dies is taken back only if we can see it die."""


class Alloc(msgspec.Struct, tag_field="op", tag="alloc", frozen=True):
    """Reserve an arena slot to write a tensor into. The reply's only tensor is the slot."""

    nbytes: int


class Echo(msgspec.Struct, tag_field="op", tag="echo", frozen=True):
    """Diagnostic: a worker takes the input and answers ``nbytes`` of float32, after ``seconds`` of work."""

    nbytes: int = 0
    seconds: float = 0.0


class VaeEncode(msgspec.Struct, tag_field="op", tag="vae.encode", frozen=True):
    """Pixels ``[B,H,W,C]`` float32 in 0..1 to latents ``[B,C,h,w]`` float32."""

    model: ModelRef
    tiling: Tiling | None = None
    raw: bool = False
    """ComfyUI's ``first_stage_model.encode`` alone: no cropping, scaling or slicing."""
    attributes: dict[str, Any] = {}
    """Attributes of the network's layers for this call: by layer and name, plain data packed by ``wire.packing``."""
    generators: list[str] = []
    """Random generators whose states are the last tensors: ``cpu``, ``cuda``."""


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
    """ComfyUI's ``layer_idx``: -1 last, -2 penultimate; ``None`` is the family's own."""
    unprojected: bool = False
    """Pooled output before the text projection (``return_pooled="unprojected"``)."""
    packed: Any = None
    """ComfyUI's own tokens, embeddings included, as ``wire.packing`` packs them; instead of ``text`` and ``tokens``."""
    part: str = ""
    """Only this encoder: ``cond_stage_model.<part>.encode_token_weights(packed)``, with ``options``."""
    options: dict[str, Any] = {}
    """Further arguments of ``set_clip_options``, of the whole model or of the part."""
    patches: list[PatchUse] = []
    """LoRA and other weight patches in the order of ``add_patches``."""
    hooks: list[PatchUse] = []
    """Hook patches on top, in order, with the strength of the current keyframe."""
    generators: list[str] = []
    """See ``VaeEncode``; with ``packed`` only."""


class PatchPut(msgspec.Struct, tag_field="op", tag="clip.patch", frozen=True):
    """Keep a patch set for ``ClipEncode.patches`` and ``hooks``: ``packed`` maps weight keys to patches."""

    name: str
    """A hash of its content: the same name is the same set."""
    packed: Any
    models: list[ModelRef] = []
    """Text encoders whose weights ``packed`` names by index and key; the worker takes them from its own."""


class ModelsList(msgspec.Struct, tag_field="op", tag="models.list", frozen=True):
    """Names from the configuration and what is loaded."""


class ModelLoad(msgspec.Struct, tag_field="op", tag="models.load", frozen=True):
    """Warm a model; the result holds its properties (latent channels, ratios, encoders)."""

    model: ModelRef
    pin: bool = False
    """Keep it loaded: it is neither idled out nor evicted."""


class ModelUnload(msgspec.Struct, tag_field="op", tag="models.unload", frozen=True):
    """Give a model's memory back; ``None`` unloads all."""

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
    """Figures of the LoRA cache."""


class LoraLoad(msgspec.Struct, tag_field="op", tag="lora.load", frozen=True):
    """A LoRA file's tensors, as it lies or as a copy in shared memory: for the client to map copy-on-write."""

    name: str
    """As ComfyUI lists it, or a full path; or what was put under this name."""
    file: FileId | None = None
    """The client's own file, where it has it: the daemon's must be the same."""
    copy: bool = False
    """The client cannot open the daemon's file: bytes, by shared memory or by the socket."""


class LoraWarm(msgspec.Struct, tag_field="op", tag="lora.warm", frozen=True):
    """Load a LoRA file into the cache."""

    name: str


class LoraPin(msgspec.Struct, tag_field="op", tag="lora.pin", frozen=True):
    """Load a LoRA and keep it until it is evicted by name; or let it go first again."""

    name: str
    pinned: bool = True


class LoraEvict(msgspec.Struct, tag_field="op", tag="lora.evict", frozen=True):
    """Forget a LoRA, pinned or not; ``None`` forgets all that are not pinned."""

    name: str | None = None


class Register(msgspec.Struct, tag_field="op", tag="register", frozen=True):
    """The predecessor's registration calls: they succeed and do nothing."""

    kind: str
    type: str = ""


class Report(msgspec.Struct, tag_field="op", tag="report", frozen=True):
    """A client tells what it had to do without the daemon, so that ``info`` can show it."""

    fallbacks: int = 0
    materialised: int = 0


class Reload(msgspec.Struct, tag_field="op", tag="reload", frozen=True):
    """Read the settings again and apply those that can change while requests run."""


class TokenRenew(msgspec.Struct, tag_field="op", tag="token.renew", frozen=True):
    """A new token: connections that greeted with the old one end with what they are doing."""


class Drain(msgspec.Struct, tag_field="op", tag="drain", frozen=True):
    """Take nothing new; finish what runs."""


class Shutdown(msgspec.Struct, tag_field="op", tag="shutdown", frozen=True):
    """Drain, then end."""


Call = Union[
    Ping, Info, ArenaProof, Alloc, Echo, VaeEncode, VaeDecode, ClipTokenize, ClipEncode, ModelsList, ModelLoad,
    ModelUnload, PatchPut, LoraPut, LoraGet, LoraCheck, LoraStats, LoraLoad, LoraWarm, LoraPin, LoraEvict,
    Register, Report, Reload, TokenRenew, Drain, Shutdown,
]  # fmt: skip


PAGE_OPS = frozenset({"models.load", "models.unload", "drain", "lora.warm", "lora.pin", "lora.evict"})
"""What the status page and ComfyUI's panel may ask for: ``POST /api/call`` takes these alone."""


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
    """A call. ``call`` stays raw until its own decode, so that a bad call still has an id to answer to."""

    id: int
    call: msgspec.Raw
    tensors: list[TensorRef] = []
    deadline_s: float | None = None
    """Seconds from receipt; a request not started by then is answered ``DeadlineExceeded``."""
    priority: int = 1


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Stop the request of that id: at once if queued, at the next tile if it runs."""

    id: int


class Release(msgspec.Struct, tag="release", frozen=True):
    """The reader is done with these slots."""

    slots: list[int]


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """Last message of a client that closes in order: no tensor of it lies in shared memory any more."""


class WorkerReady(msgspec.Struct, tag="ready", frozen=True):
    """A worker has imported its backend and waits for jobs."""

    backend: str
    versions: dict[str, str]
    devices: list[str]
    arena: bool
    """Whether the worker sees the shared memory."""


class WorkerStatus(msgspec.Struct, tag="status", frozen=True):
    """Models that a worker holds: key to bytes."""

    models: dict[str, int]
    rss: int


# --- read by clients and workers ---------------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True):
    """Limits of the daemon, checked before memory is allocated."""

    header_bytes: int
    tensor_bytes: int
    arena_bytes_per_client: int
    queue: int
    clients: int


class ArenaInfo(msgspec.Struct, frozen=True):
    """Folder of the shared memory, and the file whose content proves that the client sees the folder."""

    folder: str
    nonce: str


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """The answer to a good ``hello``."""

    session: int
    version: str
    limits: Limits
    arena: ArenaInfo | None = None
    arena_why: str = ""
    """Why there is no arena."""


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """A call's result."""

    id: int
    result: Any = None
    tensors: list[TensorRef] = []
    notes: list[str] = []
    """Remarks for the caller, such as "computed in tiles"."""


class Failure(msgspec.Struct, tag="failure", frozen=True):
    """A typed error; id 0 concerns the connection, which then closes."""

    id: int
    code: str
    message: str
    hint: str = ""
    retry_after_s: float = 0.0
    trace: str = ""
    """The stack of a bug in a worker, for the daemon's log; empty for clients."""


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """A sign of life: ``queued``, ``starting``, ``loading``, ``running`` or ``tile``, with ``step`` of ``total``."""

    id: int
    stage: str
    step: int = 0
    total: int = 0


class LoadSpec(msgspec.Struct, frozen=True):
    """A resolved model as a worker loads it. ``key`` names it everywhere behind the socket."""

    key: str
    kind: str
    type: str
    files: tuple[str, ...]
    device: str
    precision: str
    checkpoint: bool = False
    comfy: ComfyId | None = None
    """The ComfyUI to load it with, checked; ``None`` where another backend does."""


class Patch(msgspec.Struct, array_like=True, frozen=True):
    """A patch set that a worker has not seen yet; its tensors are ``count`` of the job's, from ``start``."""

    name: str
    packed: Any
    start: int
    count: int
    models: list[LoadSpec] = []
    """Models whose weights the set names."""


class Job(msgspec.Struct, tag="job", frozen=True):
    """Work for a worker: a call with its resolved model; ``unload`` makes room first."""

    id: int
    call: msgspec.Raw
    model: LoadSpec
    tensors: list[TensorRef] = []
    unload: list[str] = []
    patches: list[Patch] = []
    grant: TensorRef | None = None
    """A slot for the result, where the daemon knows its size from the last time: saves the worker a round trip."""


class Unload(msgspec.Struct, tag="unload", frozen=True):
    """Give these models' memory back."""

    keys: list[str]


Message = Union[
    Hello, Request, Cancel, Release, Bye, WorkerReady, WorkerStatus, Welcome, Reply, Failure, Progress, Job, Unload,
]  # fmt: skip
