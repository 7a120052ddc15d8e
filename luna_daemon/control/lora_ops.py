"""Handlers of the ``lora.*`` ops; handlers that read files are coroutines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ..core import BadRequest, LimitExceeded
from ..files.safetensors import columns
from ..lora_cache import LoRAEntry
from ..pool.work import Outcome, release
from ..wire import messages as m
from .request import ClientRequest
from .state import State

_ENCODER = msgspec.msgpack.Encoder()


async def _load(state: State, request: ClientRequest, call: m.LoraLoad) -> None:
    session = request.session
    entry, use = await state.lora_loader.use(call.name, session.number, call.file, call.copy)
    if not state.is_connected(session):
        use.release()
    elif entry.kind == "file" or (entry.mappable and session.sees_arena):
        request.answer(_description(entry), [session.leases.lend(use)])
    else:
        try:
            _send_bytes(state, request, entry, {"kind": "bytes", "name": entry.name})
        finally:
            use.release()


def _description(entry: LoRAEntry) -> dict[str, Any]:
    """Where the tensors are, for a client that maps them; the table is packed at the first request."""
    if entry.table is None:
        entry.table = msgspec.Raw(_ENCODER.encode(columns(entry.places())))
    file = msgspec.structs.asdict(entry.source) if entry.kind == "file" and entry.source else None
    return {"kind": entry.kind, "name": entry.name, "file": file, "table": entry.table}


def _send_bytes(state: State, request: ClientRequest, entry: LoRAEntry, result: dict[str, Any]) -> None:
    if entry.nbytes > state.limits.tensor_bytes:
        raise LimitExceeded(
            f"LoRA {entry.name!r} has {entry.nbytes} bytes; the limit is {state.limits.tensor_bytes}",
            "Raise max_tensor_mb",
        )
    outcome = Outcome({**result, "keys": [key for key, _ in entry.refs]}, entry.pieces(), [])
    request.finish(outcome, shared=True)
    outcome.release()


def _put(state: State, request: ClientRequest, call: m.LoraPut) -> None:
    if len(call.keys) != len(request.message.tensors):
        raise BadRequest(f"{len(call.keys)} keys for {len(request.message.tensors)} tensors")
    pieces = request.pieces()
    nbytes = sum(piece.slot.nbytes for piece in pieces)
    refs = [(key, piece.ref) for key, piece in zip(call.keys, pieces)]
    if not state.loras.keep(LoRAEntry(call.name, "put", refs, nbytes, [piece.slot for piece in pieces])):
        release(pieces)
        raise LimitExceeded(
            f"LoRA {call.name!r} has {nbytes} bytes and finds no room: the cache is limited to "
            f"{state.loras.max_bytes} bytes in {state.loras.max_entries} entries, of which those in use or pinned stay",
            "Raise lora_cache_gb or lora_cache_entries",
        )
    request.answer({"success": True, "bytes": nbytes})


async def _get(state: State, request: ClientRequest, call: m.LoraGet) -> None:
    entry = state.loras.look(call.name)
    if entry is None:
        state.loras.count(call.name, hit=False)
        request.answer({"keys": None})
        return
    name = entry.source.path if entry.source is not None else call.name
    entry, use = await state.lora_loader.use(name, copy=True)
    try:
        _send_bytes(state, request, entry, {})
    finally:
        use.release()


def _check(state: State, request: ClientRequest, call: m.LoraCheck) -> None:
    request.answer({"exists": call.name in state.loras})


def _stats(state: State, request: ClientRequest, call: m.LoraStats) -> None:
    request.answer(state.loras.stats())


async def _warm(state: State, request: ClientRequest, call: m.LoraWarm) -> None:
    misses = state.loras.misses
    entry, use = await state.lora_loader.use(call.name)
    use.release()
    request.answer({
        "name": entry.name, "kind": entry.kind, "bytes": entry.nbytes, "load_s": entry.load_s,
        "kept": entry.name in state.loras, "was_kept": state.loras.misses == misses,
    })  # fmt: skip


async def _pin(state: State, request: ClientRequest, call: m.LoraPin) -> None:
    cache = state.loras
    if not call.pinned:
        name = call.name if call.name in cache.pinned else cache.named(call.name).name
        cache.pinned.discard(name)
        request.answer({"name": name, "pinned": False})
        return
    entry, use = await state.lora_loader.use(call.name)
    kept = cache.look(entry.name) is entry
    use.release()
    if not kept:
        raise LimitExceeded(
            f"LoRA {entry.name!r} cannot be pinned: the cache has no room for its {entry.nbytes} bytes",
            "Raise lora_cache_gb or lora_cache_entries, or unpin others",
        )
    cache.pinned.add(entry.name)
    request.answer({"name": entry.name, "pinned": True})


def _evict(state: State, request: ClientRequest, call: m.LoraEvict) -> None:
    cache = state.loras
    if call.name is None:
        evicted = cache.evict_all()
    else:
        entry = cache.named(call.name)
        cache.evict(entry.name)
        cache.pinned.discard(entry.name)
        evicted = [entry]
    request.answer({"evicted": [entry.name for entry in evicted], "bytes": sum(entry.nbytes for entry in evicted)})


LORA_HANDLERS: dict[type, Callable[..., Any]] = {
    m.LoraLoad: _load, m.LoraPut: _put, m.LoraGet: _get, m.LoraCheck: _check, m.LoraStats: _stats,
    m.LoraWarm: _warm, m.LoraPin: _pin, m.LoraEvict: _evict,
}  # fmt: skip
"""Handlers by the type of the call."""
