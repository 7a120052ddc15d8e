"""From a request to its handler, and from whatever the handler does to one answer.

A handler answers at once, hands the request to the pool, or returns a coroutine that answers later. A handler that
needs to read a disk first raises ``NeedsIO``: the files are read beside the event loop, then the handler runs again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from ..core import AuthenticationError, BadRequest, InternalError, LunaError, ModelLoadError, ProtocolError, logger
from ..files.resolver import NeedsIO
from ..wire import messages as m
from ..wire.arena import Slot
from ..wire.frame import decode_call
from .computing import compute
from .ops import HANDLERS, Later
from .request import ClientRequest
from .state import State

_SIGN_S = 2.0
"""Seconds between signs of life to a client that waits."""


class Asker(Protocol):
    """A caller that waits for an answer: a client's request, or a worker's."""

    op: str

    def progress(self, stage: str, step: int, total: int) -> None:
        """Show a sign of life."""
        ...

    def fail(self, error: LunaError) -> None:
        """Answer with an error."""
        ...


def begin(state: State, request: ClientRequest) -> None:
    """Answer a request, or start what will answer it. Nothing is raised: errors are answers."""
    try:
        later = _handle(state, request)
    except NeedsIO as missing:
        payload = request.payload.retain() if request.payload is not None else None
        later = _handle_after(missing.look, state, request, payload)
    except Exception as error:
        if request.work is not None:
            state.pool.cancel(request.work, request)
        request.fail(_as_answer(error, request.op))
        return
    if later is not None:
        request.wait()
        state.spawn(answer_later(request, later))


def _handle(state: State, request: ClientRequest) -> Later | None:
    if request.session.outdated:
        raise AuthenticationError("the token was renewed", "Connect again with the new one")
    call = _decode(request.message.call)
    request.op = str(type(call).__struct_config__.tag)
    handler: Callable[..., Later | None] = HANDLERS.get(type(call), compute)
    return handler(state, request, call)


def _decode(raw: msgspec.Raw) -> m.Call:
    try:
        return decode_call(raw)
    except ProtocolError as error:
        raise BadRequest(error.message, "See docs/protocol.md for the ops and their fields") from error


async def _handle_after(look: Callable[[], object], state: State, request: ClientRequest, payload: Slot | None) -> None:
    """Read files off the event loop, then take the request up again; its inline bytes are kept until then."""
    try:
        await asyncio.get_running_loop().run_in_executor(None, look)
        if state.is_connected(request.session):
            begin(state, request)
    finally:
        if payload is not None:
            payload.release()


async def answer_later(asker: Asker, later: Later) -> None:
    """Run what answers, show signs of life meanwhile, and answer with the error if there is one."""
    task = asyncio.ensure_future(later)
    try:
        while not (await asyncio.wait({task}, timeout=_SIGN_S))[0]:
            asker.progress("loading", 0, 0)
        task.result()
    except Exception as error:
        asker.fail(_as_answer(error, asker.op))
    finally:
        task.cancel()


def _as_answer(error: Exception, op: str) -> LunaError:
    """The error that a caller is told; a bug is logged with its traceback."""
    if isinstance(error, LunaError):
        return error
    if isinstance(error, OSError):
        return ModelLoadError(f"{error.filename}: {error.strerror or error}")
    logger.error("request %s failed", op, exc_info=error)
    return InternalError.of(error)
