"""Handlers of the ops that need no model: the control process answers them without a worker."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from ..core import BadRequest, LimitExceeded, ModelKind
from ..pool.work import release
from ..wire import messages as m
from ..wire.arena import process_space
from .lora_ops import LORA_HANDLERS
from .request import ClientRequest
from .state import KeptPatches, State

Later = Coroutine[Any, Any, None]


def _ping(state: State, request: ClientRequest, call: m.Ping) -> None:
    request.answer(None)


def _info(state: State, request: ClientRequest, call: m.Info) -> None:
    request.answer(state.collect_info(state))


def _prove(state: State, request: ClientRequest, call: m.ArenaProof) -> None:
    if state.memory.arena is None or not hmac.compare_digest(call.nonce.encode(), state.memory.arena.nonce.encode()):
        raise BadRequest("the nonce is not that of this daemon's shared memory", "Use TCP")
    if call.space != process_space():
        raise BadRequest("the client runs in another container, so the daemon cannot see its process", "Use TCP")
    request.session.sees_arena = True
    request.answer(None)


def _alloc(state: State, request: ClientRequest, call: m.Alloc) -> Later:
    if not request.session.sees_arena:
        raise BadRequest("the client has not proved that it maps the shared memory", "Send tensors inline")
    if not 0 < call.nbytes <= state.limits.tensor_bytes:
        raise LimitExceeded(f"a slot of {call.nbytes} bytes; the limit is {state.limits.tensor_bytes}")
    held = request.session.leases.nbytes + request.session.reserving
    if held + call.nbytes > state.limits.arena_bytes_per_client:
        raise LimitExceeded(
            f"this client holds {held} bytes of shared memory; the limit is {state.limits.arena_bytes_per_client}",
            "Release tensors, or raise arena_client_mb",
        )
    request.session.reserving += call.nbytes
    return _grant(state, request, call.nbytes)


async def _grant(state: State, request: ClientRequest, nbytes: int) -> None:
    try:
        slot = await state.memory.allocate(nbytes)
    finally:
        request.session.reserving -= nbytes
    if slot is None:
        raise LimitExceeded("shared memory is full", "Send tensors inline")
    if state.is_connected(request.session):
        request.answer(None, [request.session.leases.lend(slot)])
    else:
        slot.release()


def _models(state: State, request: ClientRequest, call: m.ModelsList) -> None:
    request.answer(
        {
            "named": {
                name: {"type": model.type, "vae": model.vae, "clip": model.clip}
                for name, model in state.resolver.named.items()
            },
            "loaded": {key: nbytes for worker in state.pool.workers for key, nbytes in worker.models.items()},
            "pinned": sorted(state.pool.pinned),
        }
    )


def _unload(state: State, request: ClientRequest, call: m.ModelUnload) -> None:
    key = request.resolve(call.model).key if call.model is not None else None
    request.answer({"unloaded": state.pool.unload(key)})


def _patch_put(state: State, request: ClientRequest, call: m.PatchPut) -> None:
    for model in call.models:
        if model.kind != ModelKind.CLIP:
            raise BadRequest(f"a patch set names a model of kind {model.kind!r}", "Name text encoders only")
        request.resolve(model)  # so that a wrong model is refused now, not at the first prompt
    pieces = request.pieces()
    nbytes = sum(piece.slot.nbytes for piece in pieces)
    if not state.patches.put(call.name, KeptPatches(call.packed, pieces, call.models), nbytes):
        release(pieces)
        raise LimitExceeded(f"patch set {call.name!r} has {nbytes} bytes; the limit is {state.patches.max_bytes}")
    request.answer(None)


def _register(state: State, request: ClientRequest, call: m.Register) -> None:
    request.answer({"success": True, "kind": call.kind, "type": call.type, "note": "models load by configuration"})


def _report(state: State, request: ClientRequest, call: m.Report) -> None:
    state.fallbacks += max(0, call.fallbacks)
    state.materialised += max(0, call.materialised)
    request.answer(None)


def _reload(state: State, request: ClientRequest, call: m.Reload) -> None:
    request.answer(state.on_reload())


def _renew(state: State, request: ClientRequest, call: m.TokenRenew) -> None:
    request.answer({"connections": state.renew_token()})


def _drain(state: State, request: ClientRequest, call: m.Drain) -> None:
    state.pool.accepting = False
    request.answer({"in_flight": state.pool.in_flight})


def _shutdown(state: State, request: ClientRequest, call: m.Shutdown) -> None:
    request.answer({"in_flight": state.pool.in_flight})
    state.on_shutdown()


HANDLERS: dict[type, Callable[..., Later | None]] = {
    m.Ping: _ping, m.Info: _info, m.ArenaProof: _prove, m.Alloc: _alloc,
    m.ModelsList: _models, m.ModelUnload: _unload, m.PatchPut: _patch_put,
    **LORA_HANDLERS,
    m.Register: _register, m.Report: _report,
    m.Reload: _reload, m.TokenRenew: _renew, m.Drain: _drain, m.Shutdown: _shutdown,
}  # fmt: skip
"""Handlers by the type of the call; calls of other types are computed by a worker."""
