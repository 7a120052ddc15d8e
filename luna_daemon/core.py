"""The vocabulary that all other modules share: enums, errors, the logger. Standard library only.

The error tree. Each class has a stable wire ``code``; the client raises the class whose code the daemon answered::

    LunaError
    ├── ConfigError             a setting is wrong: the message names setting, value and allowed values
    ├── PortInUse               another process listens on the port
    ├── DaemonConnectionError   no daemon answers, or the connection broke         (local model may step in)
    │   └── ShuttingDown        the daemon is draining                             (local model may step in)
    ├── ProtocolError           bytes that do not follow LDP/1
    │   ├── VersionMismatch     the peer speaks another protocol version           (local model may step in)
    │   └── AuthenticationError no token, or a wrong one                           (local model may step in)
    ├── BadRequest              an argument is wrong: the message names argument and value
    │   └── LimitExceeded       larger than a limit announced in ``welcome``
    ├── ModelError
    │   ├── PatchMissing        the daemon does not have a patch set: send the set again
    │   ├── ModelNotFound       no such name or file                               (local model may step in)
    │   ├── ModelMismatchError  the client's file is not the daemon's              (local model may step in)
    │   └── ModelLoadError      the file exists and cannot be loaded               (local model may step in)
    ├── ComfyRefused            no worker may, or can, run the client's own ComfyUI (local model may step in)
    ├── Busy                    the queue is full; ``retry_after_s`` says when to retry
    ├── DeadlineExceeded        the request's deadline passed before it was started
    ├── RequestCancelled        the caller cancelled the request
    ├── OutOfMemory             the device's memory was too small, tiled or not
    ├── WorkerCrashed           no worker process can be started                   (local model may step in)
    │   └── PoisonRequest       a request crashed two workers: never repeated, and never computed locally
    └── InternalError           a bug in the daemon; its log has the traceback
"""

from __future__ import annotations

import logging
from enum import Enum
from typing import ClassVar

__all__ = [
    "PROTOCOL_VERSION", "AuthenticationError", "BadRequest", "Busy", "ComfyRefused", "ConfigError",
    "DaemonConnectionError", "DeadlineExceeded", "InternalError", "LimitExceeded", "LunaError", "ModelError",
    "ModelKind", "ModelLoadError", "ModelMismatchError", "ModelNotFound", "OutOfMemory", "PatchMissing",
    "PoisonRequest", "PortInUse", "Priority", "ProtocolError", "RequestCancelled", "ServiceType", "ShuttingDown",
    "VersionMismatch", "WorkerCrashed", "WorkerState", "error_from_code", "logger",
]  # fmt: skip

PROTOCOL_VERSION = 1
"""Version of LDP; client and daemon must use the same."""

logger = logging.getLogger("luna_daemon")


class ModelKind(str, Enum):
    """Kind of a model; the workers of each kind scale separately."""

    VAE = "vae"
    CLIP = "clip"
    ECHO = "echo"
    """No model: the echo backend, with which ``luna-daemon bench`` measures the transport."""


class ServiceType(str, Enum):
    """Kinds of models that a daemon serves (the predecessor's split mode)."""

    FULL = "full"
    VAE_ONLY = "vae"
    CLIP_ONLY = "clip"


class WorkerState(str, Enum):
    """State of a worker process, as ``info`` shows it."""

    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"
    BUSY = "busy"
    STOPPING = "stopping"
    DEAD = "dead"


class Priority(int, Enum):
    """Order in the queue: lower values first."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class LunaError(Exception):
    """Base class of the errors that this package raises.

    Args:
        message: what was wrong, with the value.
        hint: what the user can do; may be empty.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    """Exit code of a process that ends because of this error."""
    local_ok: ClassVar[bool] = False
    """Whether a proxy that has a local model may use it instead of failing."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class ConfigError(LunaError):
    """A setting has a value that is not allowed."""

    code = "config"
    exit_code = 2


class PortInUse(LunaError):
    """Another process listens on the daemon's port."""

    code = "port_in_use"
    exit_code = 3


class DaemonConnectionError(LunaError, ConnectionError):
    """No daemon answers, or the connection broke."""

    code = "connection"
    local_ok = True


class ShuttingDown(DaemonConnectionError):
    """The daemon finishes running requests and accepts no new ones."""

    code = "shutting_down"


class ProtocolError(LunaError):
    """Bytes that do not follow the protocol."""

    code = "protocol"


class VersionMismatch(ProtocolError):
    """Client and daemon speak different versions of the protocol."""

    code = "version"
    local_ok = True


class AuthenticationError(ProtocolError):
    """The token is missing or wrong."""

    code = "authentication"
    exit_code = 2
    local_ok = True


class BadRequest(LunaError, ValueError):
    """An argument is wrong."""

    code = "bad_request"


class LimitExceeded(BadRequest):
    """A size is larger than an announced limit."""

    code = "limit"


class ModelError(LunaError):
    """A model cannot be used."""

    code = "model"


class ModelNotFound(ModelError):
    """No model has that name, or no file exists at the paths tried."""

    code = "model_not_found"
    local_ok = True


class ModelMismatchError(ModelError):
    """The client's file differs from the daemon's, whose weights would give other results."""

    code = "model_mismatch"
    local_ok = True


class ModelLoadError(ModelError):
    """The file exists but is empty, truncated, or not a model of this kind."""

    code = "model_load"
    local_ok = True


class PatchMissing(ModelError):
    """A request names a patch set that the daemon does not have: send the set, then retry."""

    code = "patch_missing"


class ComfyRefused(LunaError):
    """No worker may, or can, run the client's own ComfyUI; another ComfyUI could give other results."""

    code = "comfyui_refused"
    local_ok = True


class Busy(LunaError):
    """The queue is full."""

    code = "busy"

    def __init__(self, message: str, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(LunaError, TimeoutError):
    """The deadline passed while the request waited."""

    code = "deadline"


class RequestCancelled(LunaError):
    """The caller cancelled the request."""

    code = "cancelled"


class OutOfMemory(LunaError, MemoryError):
    """The device's memory was too small for the call."""

    code = "out_of_memory"


class WorkerCrashed(LunaError):
    """No worker process can be started."""

    code = "worker_crashed"
    local_ok = True


class PoisonRequest(WorkerCrashed):
    """This request has crashed two workers."""

    code = "poison"
    local_ok = False


class InternalError(LunaError):
    """A bug in the daemon; the daemon's log has the traceback."""

    code = "internal"

    @classmethod
    def of(cls, bug: BaseException) -> InternalError:
        """Make the error for an unexpected exception, which the caller must log."""
        return cls(f"{type(bug).__name__}: {bug}", "The daemon's log has the traceback")


def _tree(root: type[LunaError]) -> dict[str, type[LunaError]]:
    """Map codes to classes; classes without a code of their own are never sent."""
    classes = {root.code: root} if "code" in vars(root) else {}
    for child in root.__subclasses__():
        classes.update(_tree(child))
    return classes


def error_from_code(code: str, message: str, hint: str = "", retry_after_s: float = 0.0) -> LunaError:
    """Make the exception for an error code; a plain ``LunaError`` for an unknown code."""
    kind = _tree(LunaError).get(code, LunaError)
    if issubclass(kind, Busy):
        return kind(message, hint, retry_after_s)
    return kind(message, hint)
