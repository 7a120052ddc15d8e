"""Calls from inside the control process, which are taken and answered like a client's: the status page's buttons."""

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
    """A client without a socket, which neither sends nor takes tensors.

    Stands in for the connection of a session, which exists while a call runs.
    """

    crowded = True
    """Signs of progress are not sent."""
    is_loopback = False
    """The caller may sit elsewhere: no ComfyUI of this host is run because the caller names it."""

    def __init__(self, state: State, name: str) -> None:
        self._state = state
        self._name = name
        self._answer: asyncio.Future[m.Message] = asyncio.get_running_loop().create_future()

    def send(self, message: m.Message, slots: list[Slot] | None = None) -> None:
        """Take the answer."""
        for slot in slots or []:
            slot.release()
        if not self._answer.done():
            self._answer.set_result(message)

    def close(self) -> None:
        """Do nothing when the token was renewed: a call that shows the old one is refused before."""

    async def call(self, call: m.Call) -> m.Reply:
        """Make one call.

        Raises:
            LunaError: the daemon's answer.
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
