"""The token that lets clients in."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

from ..core import AuthenticationError


class Access:
    """Holds the token and compares what callers present.

    Args:
        token: what lets a client in.
        place: the file where this user's clients find the token, for messages.
        make: makes another token and puts it into that file.
    """

    def __init__(self, token: str, place: str, make: Callable[[], str]) -> None:
        self.token = token
        self.place = place
        self._make = make

    def check(self, token: str) -> None:
        """Compare in constant time.

        Raises:
            AuthenticationError: names the user whose daemon this is, and where the token lies.
        """
        if not hmac.compare_digest(token.encode(errors="replace"), self.token.encode()):
            who = f"uid {os.getuid()}" if hasattr(os, "getuid") else "another user"
            raise AuthenticationError(
                f"the token is {'wrong' if token else 'missing'}: this daemon runs as {who} "
                f"and its token lies in {self.place}",
                "Run as that user, or set LUNA_TOKEN or LUNA_TOKEN_FILE",
            )

    def renew(self) -> None:
        """Make another token; the old one lets nobody in from now on."""
        self.token = self._make()
