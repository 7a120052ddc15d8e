"""TLS: contexts for daemon and client, and the client's blocking socket.

Two threads must not use an OpenSSL object at once, but in a client a thread sends while another receives. So
``TlsSocket`` encrypts and decrypts in memory, under a lock, and uses the socket outside the lock.
"""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

from ..core import AuthenticationError, ConfigError, DaemonConnectionError, LunaError

_READ = 256 << 10


def server_context(cert: Path, key: Path | None) -> ssl.SSLContext:
    """TLS context of the daemon.

    Args:
        cert: PEM file with the certificate, followed by intermediate certificates, if any.
        key: PEM file with the private key, without a passphrase; ``None`` if ``cert`` contains the key.

    Raises:
        ConfigError: a file does not exist or cannot be read, or the key does not belong to the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        if path is not None and not path.is_file():
            raise ConfigError(f"setting {name!r} is {str(path)!r}: no such file", "Name a PEM file")
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise ConfigError(
            f"setting 'tls_cert' is {str(cert)!r}, 'tls_key' {str(key or cert)!r}: {why}",
            "Name a certificate and the private key that belongs to it, both PEM, the key without a passphrase",
        ) from error
    return context


def _no_passphrase() -> str:
    raise ValueError("the private key has a passphrase")


def client_context(authority: str) -> ssl.SSLContext:
    """TLS context of a client that checks the daemon's certificate and host name.

    Args:
        authority: PEM file of the certificate authority or of the daemon's own certificate; ``system`` for the
            authorities that the system trusts.

    Raises:
        AuthenticationError: the file cannot be read.
    """
    if authority == "system":
        return ssl.create_default_context()
    try:
        context = ssl.create_default_context(cafile=authority)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise AuthenticationError(f"LUNA_TLS_CA {authority!r}: {why}", "Name a PEM file, or 'system'") from error
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def pinned_context(cert: Path) -> ssl.SSLContext:
    """TLS context of a client of the daemon's own user: trusts exactly ``cert``, whatever its host name.

    Args:
        cert: PEM file that the daemon's runtime folder names.

    Raises:
        AuthenticationError: the file cannot be read.
    """
    context = client_context(str(cert))
    context.check_hostname = False
    return context


def no_handshake(error: Exception) -> LunaError:
    """The error for a failed handshake: the certificate is not trusted, or the other side does not speak TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationError(
            f"the daemon's certificate is not trusted: {error.verify_message}",
            "Set LUNA_TLS_CA to the PEM file of its authority, and use the host name of the certificate",
        )
    why = getattr(error, "reason", None) or error
    return DaemonConnectionError(f"the TLS handshake failed: {why}", "If the daemon has no TLS, unset LUNA_TLS_CA")


class TlsSocket:
    """A connected socket with TLS. A thread may send while another receives.

    Raises:
        AuthenticationError: the other side's certificate is not trusted.
        DaemonConnectionError: the other side does not speak TLS.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self._lock = threading.Lock()
        self._early = b""
        """The byte that ``ended`` decrypted, which ``take`` returns first."""
        self._shake_hands()

    def _shake_hands(self) -> None:
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._flush()
                    self.feed()
            self._flush()
        except OSError as error:  # ssl.SSLError is an OSError
            raise no_handshake(error) from error

    def _flush(self) -> None:
        self._sock.sendall(self._out.read())

    # --- the socket methods that Channel uses ---

    def setsockopt(self, *option: int) -> None:
        """As ``socket.setsockopt``."""
        self._sock.setsockopt(*option)

    def settimeout(self, seconds: float | None) -> None:
        """As ``socket.settimeout``."""
        self._sock.settimeout(seconds)

    def fileno(self) -> int:
        """As ``socket.fileno``."""
        return self._sock.fileno()

    def sendall(self, data: bytes | memoryview) -> None:
        """As ``socket.sendall``."""
        with self._lock:
            self._tls.write(data)
            sealed = self._out.read()
        self._sock.sendall(sealed)

    def feed(self) -> None:
        """Read encrypted bytes from the socket; waits until some arrive."""
        data = self._sock.recv(_READ)
        with self._lock:
            self._in.write(data) if data else self._in.write_eof()

    def take(self, view: memoryview) -> int | None:
        """Decrypt into ``view``; returns the number of bytes: 0 at the end, ``None`` if ``feed`` is needed first."""
        if self._early:
            view[:1], self._early = self._early, b""
            return 1
        with self._lock:
            try:
                return int(self._tls.read(len(view), view))  # with a buffer, read() returns a count
            except ssl.SSLWantReadError:
                return None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def ended(self) -> bool:
        """Whether the other side has closed and nothing is left to read; call after ``feed``."""
        first = bytearray(1)
        got = self.take(memoryview(first))
        self._early = bytes(first[:got]) if got else b""
        return got == 0

    def shutdown(self, how: int) -> None:
        """As ``socket.shutdown``."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """As ``socket.close``."""
        self._sock.close()
