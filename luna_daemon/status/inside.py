"""Calls from inside the control process, handled like a client's requests: the status page's buttons."""

from __future__ import annotations

import asyncio
import os
from typing import cast

from .. import __version__
from ..control.peers import ClientPeer
from ..control.state import State
from ..core import PROTOCOL_VERSION, error_from_code
from ..wire import messages as m
from ..wire.arena import Slot
from ..wire.connection import Connection
from ..wire.frame import encode_call


class InsideCaller:
    """A client without a socket and without tensors: stands in for the ``Connection`` of a session of one call."""

    crowded = True
    """Progress messages are not sent."""
    is_loopback = False
    """The browser may be on another host, so its calls may not choose a ComfyUI of this host."""

    def __init__(self, state: State, name: str) -> None:
        self._state = state
        self._name = name
        self._answer: asyncio.Future[m.Message] = asyncio.get_running_loop().create_future()

    def send(self, message: m.Message, slots: list[Slot] | None = None) -> None:
        """Receive the answer."""
        for slot in slots or []:
            slot.release()
        if not self._answer.done():
            self._answer.set_result(message)

    def close(self) -> None:
        """Do nothing when the token is renewed: the token was checked before the call."""

    async def call(self, call: m.Call) -> m.Reply:
        """Make the call, in a session of its own.

        Raises:
            LunaError: the daemon answered with an error.
        """
        connection = cast(Connection, self)
        hello = m.Hello(PROTOCOL_VERSION, "", "client", self._name, os.getpid(), __version__)
        peer = ClientPeer(self._state, self._state.open_session(connection, hello))
        try:
            peer.received(connection, m.Request(1, encode_call(call)), None)
            answer = await self._answer
        finally:
            peer.lost(connection, "")
        if isinstance(answer, m.Failure):
            raise error_from_code(answer.code, answer.message, answer.hint, answer.retry_after_s)
        assert isinstance(answer, m.Reply)
        return answer
