"""Dispatch of requests to handlers: every request gets exactly one answer, a result or an error.

A handler answers at once, passes the request to the pool, or returns a coroutine that answers later. A handler that
must read files first raises ``NeedsIO``: a thread reads the files, then the handler runs again.
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

_PROGRESS_S = 2.0
"""Seconds between progress messages to a client that waits."""


class Asker(Protocol):
    """A request of a client or a worker that waits for its answer."""

    op: str

    def progress(self, stage: str, step: int, total: int) -> None:
        """Report that the request is still being worked on."""
        ...

    def fail(self, error: LunaError) -> None:
        """Answer with an error."""
        ...


def begin(state: State, request: ClientRequest) -> None:
    """Answer a request, or start the work that will answer. Raises nothing: errors are sent as answers."""
    try:
        later = _handle(state, request)
    except NeedsIO as missing:
        payload = request.payload.retain() if request.payload is not None else None
        later = _handle_after_io(missing.look, state, request, payload)
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


async def _handle_after_io(
    look: Callable[[], object], state: State, request: ClientRequest, payload: Slot | None
) -> None:
    """Read files in a thread, then run the handler again; ``payload`` is retained by the caller until then."""
    try:
        await asyncio.get_running_loop().run_in_executor(None, look)
        if state.is_connected(request.session):
            begin(state, request)
    finally:
        if payload is not None:
            payload.release()


async def answer_later(asker: Asker, later: Later) -> None:
    """Await a handler's coroutine, report progress meanwhile, and answer with the coroutine's error if it fails."""
    task = asyncio.ensure_future(later)
    try:
        while not (await asyncio.wait({task}, timeout=_PROGRESS_S))[0]:
            asker.progress("loading", 0, 0)
        task.result()
    except Exception as error:
        asker.fail(_as_answer(error, asker.op))
    finally:
        task.cancel()


def _as_answer(error: Exception, op: str) -> LunaError:
    """The error to answer with; an unexpected exception is logged with its traceback."""
    if isinstance(error, LunaError):
        return error
    if isinstance(error, OSError):
        return ModelLoadError(f"{error.filename}: {error.strerror or error}")
    logger.error("request %s failed", op, exc_info=error)
    return InternalError.of(error)
