"""Ops that the control process answers itself: everything that needs no model."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core import BadRequest, LimitExceeded, LunaError, ModelKind
from ..pool.work import release
from ..wire import messages as m
from ..wire.arena import process_space
from .lora_ops import LORA_HANDLERS
from .patch_sets import PatchEntry
from .session import ClientRequest

if TYPE_CHECKING:
    from .service import Service


def _ping(service: Service, request: ClientRequest, call: m.Ping) -> None:
    request.answer(None)


def _info(service: Service, request: ClientRequest, call: m.Info) -> None:
    request.answer(service.collect_info(service))


def _prove(service: Service, request: ClientRequest, call: m.ArenaProof) -> None:
    if service.memory.arena is None or not hmac.compare_digest(
        call.nonce.encode(), service.memory.arena.nonce.encode()
    ):
        raise BadRequest("that is not the nonce of this daemon's shared memory", "Use TCP")
    if call.space != process_space():
        raise BadRequest("the client's processes cannot be seen from here: another container", "Use TCP")
    request.session.sees_arena = True
    request.answer(None)


def _alloc(service: Service, request: ClientRequest, call: m.Alloc) -> None:
    if not request.session.sees_arena:
        raise BadRequest("shared memory was not proved to be visible to this client", "Send tensors inline")
    if not 0 < call.nbytes <= service.limits.tensor_bytes:
        raise LimitExceeded(f"a slot of {call.nbytes} bytes; the limit is {service.limits.tensor_bytes}")
    held = request.session.leases.nbytes + request.session.reserving
    if held + call.nbytes > service.limits.arena_bytes_per_client:
        raise LimitExceeded(
            f"this client holds {held} bytes of shared memory; the limit is {service.limits.arena_bytes_per_client}",
            "Release tensors, or raise arena_client_mb",
        )
    request.session.reserving += call.nbytes
    service.spawn(_alloc_later(service, request, call.nbytes))


async def _alloc_later(service: Service, request: ClientRequest, nbytes: int) -> None:
    try:
        slot = await service.memory.allocate(nbytes)
    finally:
        request.session.reserving -= nbytes
    if slot is None:
        request.fail(LimitExceeded("shared memory is full", "Send tensors inline"))
    elif not service.is_connected(request.session):
        slot.release()
    else:
        request.answer(None, [request.session.leases.lend(slot)])


def _models(service: Service, request: ClientRequest, call: m.ModelsList) -> None:
    request.answer(
        {
            "named": {
                name: {"type": model.type, "vae": model.vae, "clip": model.clip}
                for name, model in service.resolver.named.items()
            },
            "loaded": {key: nbytes for worker in service.pool.workers for key, nbytes in worker.models.items()},
            "pinned": sorted(service.pool.pinned),
        }
    )


def _unload(service: Service, request: ClientRequest, call: m.ModelUnload) -> None:
    key = service.resolve(request, call.model).key if call.model is not None else None
    request.answer({"unloaded": service.pool.unload(key)})


def _patch_put(service: Service, request: ClientRequest, call: m.PatchPut) -> None:
    for model in call.models:
        if model.kind != ModelKind.CLIP:
            raise BadRequest(f"a patch set names a model of kind {model.kind!r}", "Name text encoders only")
        service.resolve(request, model)  # refused now, not when a prompt waits for it
    pieces = service.pieces(request)
    try:
        service.patches.put(call.name, PatchEntry(call.packed, pieces, call.models))
    except LunaError:
        release(pieces)
        raise
    request.answer(None)


def _register(service: Service, request: ClientRequest, call: m.Register) -> None:
    request.answer({"success": True, "kind": call.kind, "type": call.type, "note": "models load by configuration"})


def _report(service: Service, request: ClientRequest, call: m.Report) -> None:
    service.fallbacks += max(0, call.fallbacks)
    service.materialised += max(0, call.materialised)
    request.answer(None)


def _reload(service: Service, request: ClientRequest, call: m.Reload) -> None:
    request.answer(service.on_reload())


def _renew(service: Service, request: ClientRequest, call: m.TokenRenew) -> None:
    ended = service.renew_token()
    request.answer({"connections": ended})


def _drain(service: Service, request: ClientRequest, call: m.Drain) -> None:
    service.pool.accepting = False
    request.answer({"in_flight": service.pool.in_flight})


def _shutdown(service: Service, request: ClientRequest, call: m.Shutdown) -> None:
    request.answer({"in_flight": service.pool.in_flight})
    service.on_shutdown()


HANDLERS: dict[type, Callable[..., None]] = {
    m.Ping: _ping, m.Info: _info, m.ArenaProof: _prove, m.Alloc: _alloc,
    m.ModelsList: _models, m.ModelUnload: _unload, m.PatchPut: _patch_put,
    **LORA_HANDLERS,
    m.Register: _register, m.Report: _report,
    m.Reload: _reload, m.TokenRenew: _renew, m.Drain: _drain, m.Shutdown: _shutdown,
}  # fmt: skip
"""By the type of the call; every other op is computed by a worker."""
