"""The token that clients authenticate with."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

from ..core import AuthenticationError


class Access:
    """The daemon's token, and the check of tokens that clients send.

    Args:
        token: the token that is valid now.
        file: path of the file where this user's clients find the token, for messages.
        make: makes another token, writes the token to that file and returns the token.
    """

    def __init__(self, token: str, file: str, make: Callable[[], str]) -> None:
        self.token = token
        self.file = file
        self._make = make

    def check(self, token: str) -> None:
        """Compare a client's token with the valid one, in constant time.

        Raises:
            AuthenticationError: the token is wrong; the message names the daemon's user and the token's file.
        """
        if not hmac.compare_digest(token.encode(errors="replace"), self.token.encode()):
            user = f"uid {os.getuid()}" if hasattr(os, "getuid") else "another user"
            raise AuthenticationError(
                f"the token is {'wrong' if token else 'missing'}: this daemon runs as {user} "
                f"and its token is in {self.file}",
                "Run as that user, or set LUNA_TOKEN or LUNA_TOKEN_FILE",
            )

    def renew(self) -> None:
        """Replace the token; the old token is wrong from now on."""
        self.token = self._make()
