"""From a checked request to work for the pool: the cache, identical requests in flight, patch sets."""

from __future__ import annotations

import hashlib
import math
import time
from typing import TYPE_CHECKING

import msgspec

from ..core import BadRequest, LimitExceeded, LunaError, ModelKind, PatchMissing, Priority, ServiceType
from ..files.identity import load_bytes
from ..files.resolver import LookFirst
from ..pool.events import model_name
from ..pool.work import PatchSet, Piece, Work, release
from ..wire import messages as m
from ..wire.frame import encode_call
from .session import ClientRequest

if TYPE_CHECKING:
    from .service import Service

_COMPARE = 1 << 20
_CALL_BYTES = 512
_MOST_TEXT = 1_000_000
"""Characters of a prompt; its tokens must fit a message."""


def compute(service: Service, request: ClientRequest, call: m.Call) -> None:
    """Answer from the cache, join work that computes the same, or queue it."""
    message = request.message
    spec = service.resolve(request, _model_of(call))
    request.model = model_name(spec.key)
    _check_served(service, spec.kind)
    _check_call(service, call)
    deadline = None if message.deadline_s is None else time.monotonic() + message.deadline_s
    priority = max(Priority.INTERACTIVE.value, message.priority)
    pieces = service.pieces(request)
    key = cache_key(service, spec, call, pieces)
    if key is not None and (kept := service.cache.get(key)) is not None:
        release(pieces)
        request.finish(kept, shared=True)
        return
    same = service.pool.find_same(lambda work: is_same(work, spec, message.call, pieces))
    if same is not None:
        release(pieces)
        service.coalesced += 1
        same.widen(priority, deadline)
        request.join(same)
        return
    try:
        room = load_bytes(spec)
        patches = _patch_sets(service, request, call)
    except (LunaError, OSError, LookFirst):
        release(pieces)
        raise
    size_key = (spec.key, bytes(message.call)[:_CALL_BYTES], tuple(ref.shape for ref in message.tensors))
    work = Work(
        request.op, message.call, spec, pieces, priority, deadline, [], patches=patches, load_bytes=room,
        pin=isinstance(call, m.ModelLoad) and call.pin,
        keep=None if key is None else lambda outcome: service.cache.put(key, outcome),
        reserve=lambda: service.memory.foretell(size_key),
        measured=lambda nbytes: service.memory.learn(size_key, nbytes),
    )  # fmt: skip
    request.join(work)
    try:
        service.pool.submit(work)
    except LunaError as error:
        work.fail(error)


def _patch_sets(service: Service, request: ClientRequest, call: m.Call) -> list[PatchSet]:
    """The patch sets that a call names, with a use of their memory each.

    Raises:
        PatchMissing: one is not kept (any more).
        ModelError: one names a model that is not there, or is another file by now.
    """
    if not isinstance(call, m.ClipEncode):
        return []
    names = list(dict.fromkeys(use.name for use in [*call.patches, *call.hooks]))
    entries = {name: service.patches.get(name) for name in names}
    missing = [name for name, entry in entries.items() if entry is None]
    if missing:
        raise PatchMissing(f"patch sets {', '.join(missing)} are not kept", "Put them again")
    found = {name: entry for name, entry in entries.items() if entry is not None}
    # All are resolved before any memory is retained: a file may have changed since the set was put.
    models = {name: [service.resolve(request, model) for model in entry.models] for name, entry in found.items()}
    return [
        PatchSet(name, entry.packed, [Piece(piece.ref, piece.slot.retain()) for piece in entry.pieces], models[name])
        for name, entry in found.items()
    ]


def _check_served(service: Service, kind: str) -> None:
    only = service.settings.service_type
    if (only is ServiceType.VAE_ONLY and kind == ModelKind.CLIP) or (
        only is ServiceType.CLIP_ONLY and kind == ModelKind.VAE
    ):
        raise BadRequest(f"this daemon serves {only.value} only", "Ask the daemon that serves the other kind")


def _check_call(service: Service, call: m.Call) -> None:
    if isinstance(call, m.Echo):
        if call.nbytes > service.limits.tensor_bytes:
            raise LimitExceeded(f"an echo of {call.nbytes} bytes; the limit is {service.limits.tensor_bytes}")
        if call.nbytes < 0 or call.nbytes % 4 or not 0 <= call.seconds < math.inf:
            raise BadRequest(f"echo of {call.nbytes} bytes in {call.seconds} s: must be whole float32, and a time")
    text = getattr(call, "text", None) or ""
    if len(text) > _MOST_TEXT:
        raise LimitExceeded(f"a prompt of {len(text)} characters; the limit is {_MOST_TEXT}")


def cache_key(service: Service, spec: m.LoadSpec, call: m.Call, pieces: list[Piece]) -> bytes | None:
    """Everything that determines a conditioning, embeddings among its tokens too; ``None`` if it is not kept."""
    if not isinstance(call, (m.ClipEncode, m.ClipTokenize)) or not service.cache.max_bytes:
        return None
    if sum(piece.ref.nbytes for piece in pieces) > _COMPARE:
        return None  # too much to hash while others wait
    bare = msgspec.structs.replace(call, model=m.ModelRef(spec.kind))
    key = hashlib.blake2b(spec.key.encode() + b"\0" + bytes(encode_call(bare)), digest_size=16)
    if spec.comfy is not None:  # an installation that was updated keeps its place, and so the model its key
        key.update(f"\0{spec.comfy.version}|{spec.comfy.torch}".encode())
    for piece in pieces:
        key.update(f"\0{piece.ref.dtype}{list(piece.ref.shape)}{list(piece.ref.order)}".encode())
        key.update(piece.slot.view)
    return key.digest()


def _model_of(call: m.Call) -> m.ModelRef:
    model = getattr(call, "model", None)
    return model if isinstance(model, m.ModelRef) else m.ModelRef(ModelKind.ECHO)


def is_same(work: Work, spec: m.LoadSpec, call: msgspec.Raw, pieces: list[Piece]) -> bool:
    """Whether other work computes exactly this."""
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
    """Bytes compared in pieces: a memoryview's own comparison goes element by element."""
    return a.nbytes == b.nbytes and all(
        bytes(a[at : at + _COMPARE]) == bytes(b[at : at + _COMPARE]) for at in range(0, a.nbytes, _COMPARE)
    )
