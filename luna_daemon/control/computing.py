"""Handler of calls that workers compute: answers from the cache, joins identical work, or queues new work."""

from __future__ import annotations

import hashlib
import math
import time

import msgspec

from ..core import BadRequest, LimitExceeded, LunaError, ModelKind, PatchMissing, Priority, ServiceType
from ..files.identity import load_bytes
from ..files.resolver import NeedsIO
from ..pool.events import model_name
from ..pool.work import Outcome, PatchSet, Piece, Work, release
from ..wire import messages as m
from ..wire.frame import encode_call
from .request import ClientRequest
from .state import State

_COMPARE = 1 << 20
"""Bytes compared at a time; most bytes of embeddings that are hashed for the cache."""
_CALL_BYTES = 512
"""Bytes of a call that are part of the key by which result sizes are predicted."""
_MAX_TEXT = 1_000_000
"""Most characters of a prompt: the tokens must fit in a message."""


def compute(state: State, request: ClientRequest, call: m.Call) -> None:
    """Answer from the cache, join work that computes the same, or queue new work.

    Raises:
        LunaError: the request is wrong, or its model cannot be used.
        NeedsIO: files must be read first.
        OSError: a file of the model cannot be read.
    """
    message = request.message
    spec = request.resolve(_model_of(call))
    request.model = model_name(spec.key)
    _check_served(state, spec.kind)
    _check_call(state, call)
    deadline = None if message.deadline_s is None else time.monotonic() + message.deadline_s
    priority = max(Priority.INTERACTIVE.value, message.priority)
    pieces = request.pieces()
    key = cache_key(state, spec, call, pieces)
    if key is not None and (kept := state.conditionings.get(key)) is not None:
        release(pieces)
        request.finish(kept, shared=True)
        return
    same = state.pool.find_same(lambda work: is_same(work, spec, message.call, pieces))
    if same is not None:
        release(pieces)
        state.coalesced += 1
        same.widen(priority, deadline)
        request.wait(same)
        return
    try:
        room = load_bytes(spec)
        patches = _patch_sets(state, request, call)
    except (LunaError, OSError, NeedsIO):
        release(pieces)
        raise
    size_key = (spec.key, bytes(message.call)[:_CALL_BYTES], tuple(ref.shape for ref in message.tensors))
    work = Work(
        request.op, message.call, spec, pieces, priority, deadline, [], patches=patches, load_bytes=room,
        pin=isinstance(call, m.ModelLoad) and call.pin,
        keep=None if key is None else lambda outcome: _keep(state, key, outcome),
        reserve=lambda: state.memory.predict(size_key),
        measured=lambda nbytes: state.memory.learn(size_key, nbytes),
    )  # fmt: skip
    request.wait(work)
    try:
        state.pool.submit(work)
    except LunaError as error:
        work.fail(error)


def _patch_sets(state: State, request: ClientRequest, call: m.Call) -> list[PatchSet]:
    """The patch sets that a call names; the caller must release their pieces.

    Raises:
        PatchMissing: a set was never sent or has been dropped.
        ModelError: a set names a model whose file is missing or has changed.
    """
    if not isinstance(call, m.ClipEncode):
        return []
    names = list(dict.fromkeys(use.name for use in [*call.patches, *call.hooks]))
    entries = {name: state.patches.get(name) for name in names}
    missing = [name for name, entry in entries.items() if entry is None]
    if missing:
        raise PatchMissing(f"patch sets {', '.join(missing)} are not kept", "Send them again with clip.patch")
    kept = {name: entry for name, entry in entries.items() if entry is not None}
    # All models are resolved before any memory is retained: resolve raises if a file has changed.
    models = {name: [request.resolve(model) for model in entry.models] for name, entry in kept.items()}
    return [
        PatchSet(name, entry.packed, [Piece(piece.ref, piece.slot.retain()) for piece in entry.pieces], models[name])
        for name, entry in kept.items()
    ]


def _keep(state: State, key: bytes, outcome: Outcome) -> None:
    """Put an outcome into the cache; the cache retains the outcome's slots."""
    if outcome.pieces:
        nbytes = sum(piece.slot.nbytes for piece in outcome.pieces)
    else:  # tokens are plain data
        nbytes = len(msgspec.msgpack.encode(outcome.result))
    if key not in state.conditionings and state.conditionings.put(key, outcome, nbytes):
        for piece in outcome.pieces:
            piece.slot.retain()


def _check_served(state: State, kind: str) -> None:
    only = state.settings.service_type
    if (only is ServiceType.VAE_ONLY and kind == ModelKind.CLIP) or (
        only is ServiceType.CLIP_ONLY and kind == ModelKind.VAE
    ):
        raise BadRequest(f"this daemon serves {only.value} only", "Use a daemon that serves the other kind")


def _check_call(state: State, call: m.Call) -> None:
    if isinstance(call, m.Echo):
        if call.nbytes > state.limits.tensor_bytes:
            raise LimitExceeded(f"an echo of {call.nbytes} bytes; the limit is {state.limits.tensor_bytes}")
        if call.nbytes < 0 or call.nbytes % 4 or not 0 <= call.seconds < math.inf:
            raise BadRequest(
                f"echo of {call.nbytes} bytes in {call.seconds} s", "Use a multiple of 4 bytes and a finite time"
            )
    text = getattr(call, "text", None) or ""
    if len(text) > _MAX_TEXT:
        raise LimitExceeded(f"a prompt of {len(text)} characters; the limit is {_MAX_TEXT}")


def cache_key(state: State, spec: m.LoadSpec, call: m.Call, pieces: list[Piece]) -> bytes | None:
    """Digest of everything that determines a conditioning; ``None`` if the result is not cached.

    Hashed are the model with its files' identity, family, device and precision (``LoadSpec.key``), the whole call (text
    or tokens with weights, layer, projection), and embeddings among the tokens. The backend's flags cannot change while
    the daemon, and so the cache, exists.
    """
    if not isinstance(call, (m.ClipEncode, m.ClipTokenize)) or not state.conditionings.max_bytes:
        return None
    if sum(piece.ref.nbytes for piece in pieces) > _COMPARE:
        return None  # hashing more would hold up other requests
    bare = msgspec.structs.replace(call, model=m.ModelRef(spec.kind))
    key = hashlib.blake2b(spec.key.encode() + b"\0" + bytes(encode_call(bare)), digest_size=16)
    if spec.comfy is not None:  # an update of ComfyUI leaves its folder, and so ``spec.key``, as they were
        key.update(f"\0{spec.comfy.version}|{spec.comfy.torch}".encode())
    for piece in pieces:
        key.update(f"\0{piece.ref.dtype}{list(piece.ref.shape)}{list(piece.ref.order)}".encode())
        key.update(piece.slot.view)
    return key.digest()


def _model_of(call: m.Call) -> m.ModelRef:
    model = getattr(call, "model", None)
    return model if isinstance(model, m.ModelRef) else m.ModelRef(ModelKind.ECHO)


def is_same(work: Work, spec: m.LoadSpec, call: msgspec.Raw, pieces: list[Piece]) -> bool:
    """Whether queued or running work computes exactly this request."""
    if spec.kind == ModelKind.ECHO or work.spec.key != spec.key or bytes(work.call) != bytes(call):
        return False
    if len(work.pieces) != len(pieces) or work.pin:
        return False
    return all(
        (a.ref.shape, a.ref.dtype, a.ref.order) == (b.ref.shape, b.ref.dtype, b.ref.order)
        and _equal(a.slot.view, b.slot.view)
        for a, b in zip(work.pieces, pieces)
    )


def _equal(a: memoryview, b: memoryview) -> bool:
    """Compare bytes in chunks of ``bytes``: memoryviews are compared element by element, which is slow."""
    return a.nbytes == b.nbytes and all(
        bytes(a[at : at + _COMPARE]) == bytes(b[at : at + _COMPARE]) for at in range(0, a.nbytes, _COMPARE)
    )
