"""Calls over a connection that is opened at the first call, and reopened after a failure."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core import AuthenticationError, LunaError, Priority
from ..system.runtime import dial_host
from . import messages as m
from .link import Answer, IsCancelled, Link, OnProgress

if TYPE_CHECKING:
    import torch

C = TypeVar("C", bound="Caller")


class Caller:
    """Base of ``DaemonClient`` (which describes the arguments): makes calls and keeps the connection."""

    fallbacks = 0
    """Calls that a local model answered, not yet reported to the daemon."""
    _materialised = 0
    """Shells whose weights were loaded in this process, not yet reported to the daemon."""

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        runtime_dir: Path | str | None = None,
        use_arena: bool = True,
        name: str = "",
        tls_ca: Path | str = "",
    ) -> None:
        if host is None or port is None:
            from ..config import load_settings

            settings = load_settings()
            host = host or settings.host
            port = port or settings.port
            runtime_dir = runtime_dir or settings.runtime_dir
        self.host = dial_host(host)
        self.port = port
        self.runtime_dir = Path(runtime_dir) if runtime_dir else None
        self.use_arena = use_arena
        self.name = name or Path(sys.argv[0] or "python").name
        self.tls_ca = str(tls_ca) or os.environ.get("LUNA_TLS_CA", "")
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def link(self) -> Link:
        """The live connection, opened if necessary.

        Raises:
            DaemonConnectionError: no daemon answers, or another program listens on the port.
            AuthenticationError, VersionMismatch: the daemon refuses this client.
        """
        with self._lock:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                if self._link is not None:  # a forked child's copy of its parent's connection
                    self._link.close()
                self._link = None
            if self._link is None or self._link.broken is not None:
                self._link = Link(self.host, self.port, self.runtime_dir, self.name, self.use_arena, self.tls_ca)
            return self._link

    def call(
        self,
        call: m.Call,
        tensors: Sequence[torch.Tensor] = (),
        *,
        deadline_s: float | None = None,
        priority: int = Priority.NORMAL,
        on_progress: OnProgress | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Answer:
        """Make a call and wait for its answer.

        Args:
            call: the operation and its arguments.
            tensors: inputs of the call, on any device.
            deadline_s: seconds within which the daemon must start the call.
            priority: priority in the daemon's queue; lower runs sooner.
            on_progress: called on queueing, loading and tiles, on the calling thread.
            is_cancelled: polled ten times a second; ``True`` cancels the call.

        Raises:
            RequestCancelled: ``is_cancelled`` returned ``True``.
            LunaError: the daemon's error.
        """
        how = (deadline_s, priority, on_progress, is_cancelled)
        link = self.link()
        try:
            return link.call(call, tensors, *how)
        except AuthenticationError:  # the token was renewed and the daemon did not run the call: repeat it
            with self._lock:
                if self._link is link:
                    self._link = None
        return self.link().call(call, tensors, *how)

    def close(self) -> None:
        """Close the connection; the next call opens a new connection."""
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- statistics of work without the daemon ---

    def report(self, fallbacks: int = 0, materialised: int = 0) -> None:
        """Add work that clients did without the daemon to the daemon's statistics.

        Args:
            fallbacks: calls that a local model answered.
            materialised: shells whose weights were loaded in a client.
        """
        self.call(m.Report(fallbacks, materialised))

    def count_materialised(self) -> None:
        """Count a shell whose weights were loaded in this process, and report the count as soon as possible."""
        self._materialised += 1
        self.report_pending()

    def report_pending(self) -> None:
        """Report the counts that the daemon does not have yet; if that fails, a later call reports them."""
        fallbacks, materialised = self.fallbacks, self._materialised
        if fallbacks or materialised:
            self.fallbacks = self._materialised = 0
            try:
                self.report(fallbacks, materialised)
            except LunaError:  # the caller's own call has succeeded: a failed report must not fail it
                self.fallbacks += fallbacks
                self._materialised += materialised

    def _plain(self, call: m.Call) -> dict[str, Any]:
        result: dict[str, Any] = self.call(call).result
        return result
