"""The vocabulary every other module shares: enums, errors, the logger. Standard library only.

The error tree. Each class has a stable wire ``code``; the client raises the class whose code the daemon answered::

    LunaError
    ├── ConfigError             a setting is wrong: names it, its value and what is allowed
    ├── PortInUse               somebody else listens on our port
    ├── DaemonConnectionError   no daemon answers, or it went away                  (local model may step in)
    │   └── ShuttingDown        the daemon is draining                              (local model may step in)
    ├── ProtocolError           bytes that are not LDP/1
    │   ├── VersionMismatch     the other side speaks another protocol version   (local model may step in)
    │   └── AuthenticationError no token, or a wrong one                            (local model may step in)
    ├── BadRequest              an argument is wrong: names it and its value
    │   └── LimitExceeded       larger than a limit that ``welcome`` announced
    ├── ModelError
    │   ├── PatchMissing        a patch set is not kept (any more): put it again
    │   ├── ModelNotFound       no such name or file                                (local model may step in)
    │   ├── ModelMismatchError  the client's file is not the daemon's               (local model may step in)
    │   └── ModelLoadError      the file is there and cannot be loaded              (local model may step in)
    ├── ComfyRefused            no worker may, or can, run the client's own ComfyUI    (local model may step in)
    ├── Busy                    the queue is full; ``retry_after_s`` says when to ask again
    ├── DeadlineExceeded        the request's deadline passed before it was started
    ├── RequestCancelled        the caller cancelled it
    ├── OutOfMemory             the device had no room, tiled or not
    ├── WorkerCrashed           no worker process can be started                    (local model may step in)
    │   └── PoisonRequest       two died on the same request: never tried again, and never locally
    └── InternalError           a bug in the daemon; its log has the traceback
"""

from __future__ import annotations

import logging
from enum import Enum
from typing import ClassVar

__all__ = [
    "PROTOCOL_VERSION",
    "AuthenticationError",
    "BadRequest",
    "Busy",
    "ComfyRefused",
    "ConfigError",
    "DaemonConnectionError",
    "DeadlineExceeded",
    "InternalError",
    "LimitExceeded",
    "LunaError",
    "ModelError",
    "ModelKind",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelNotFound",
    "OutOfMemory",
    "PatchMissing",
    "PoisonRequest",
    "PortInUse",
    "Priority",
    "ProtocolError",
    "RequestCancelled",
    "ServiceType",
    "ShuttingDown",
    "VersionMismatch",
    "WorkerCrashed",
    "WorkerState",
    "error_from_code",
    "logger",
]

PROTOCOL_VERSION = 1
"""The ``1`` of LDP/1. Both sides must speak the same."""

logger = logging.getLogger("luna_daemon")


class ModelKind(str, Enum):
    """What a model does; also the two kinds of work that scale on their own."""

    VAE = "vae"
    CLIP = "clip"
    ECHO = "echo"
    """No model at all: the diagnostic backend that ``luna-daemon bench`` times the wire with."""


class ServiceType(str, Enum):
    """Which kinds of work a daemon accepts (the predecessor's split mode)."""

    FULL = "full"
    VAE_ONLY = "vae"
    CLIP_ONLY = "clip"


class WorkerState(str, Enum):
    """The life of a worker process, as ``info`` shows it."""

    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"
    BUSY = "busy"
    STOPPING = "stopping"
    DEAD = "dead"


class Priority(int, Enum):
    """Who goes first when a queue forms; lower is sooner."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class LunaError(Exception):
    """Root of everything this package raises on purpose.

    Args:
        message: what was wrong, with the value.
        hint: what to do about it; may be empty.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    """What a process ends with when this error ended it."""
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
    """The daemon's port is taken."""

    code = "port_in_use"
    exit_code = 3


class DaemonConnectionError(LunaError, ConnectionError):
    """No daemon answers, or the connection broke."""

    code = "connection"
    local_ok = True


class ShuttingDown(DaemonConnectionError):
    """The daemon finishes what runs and takes nothing new."""

    code = "shutting_down"


class ProtocolError(LunaError):
    """The bytes are not the protocol's."""

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
    """Larger than an announced limit."""

    code = "limit"


class ModelError(LunaError):
    """Something about a model."""

    code = "model"


class ModelNotFound(ModelError):
    """No model of that name, or no file at any place tried."""

    code = "model_not_found"
    local_ok = True


class ModelMismatchError(ModelError):
    """The client's file differs from the daemon's: never answered with other weights."""

    code = "model_mismatch"
    local_ok = True


class ModelLoadError(ModelError):
    """The file exists but is empty, truncated, or not a model of this kind."""

    code = "model_load"
    local_ok = True


class PatchMissing(ModelError):
    """A request names a patch set that is not kept (any more): put it, then ask again."""

    code = "patch_missing"


class ComfyRefused(LunaError):
    """No worker may run the client's own ComfyUI, or none that runs could be it: other bits are no answer."""

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
    """The caller cancelled."""

    code = "cancelled"


class OutOfMemory(LunaError, MemoryError):
    """The device had no room for the call."""

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
    """A bug; the daemon's log has the traceback."""

    code = "internal"

    @classmethod
    def of(cls, bug: BaseException) -> InternalError:
        """What callers are told of an exception that nobody expected; whoever caught it logs it."""
        return cls(f"{type(bug).__name__}: {bug}", "The daemon's log has the traceback")


def _tree(root: type[LunaError]) -> dict[str, type[LunaError]]:
    """Classes by their own code; a subclass without one is the client's own affair."""
    found = {root.code: root} if "code" in vars(root) else {}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_from_code(code: str, message: str, hint: str = "", retry_after_s: float = 0.0) -> LunaError:
    """Build the exception that belongs to a wire code; an unknown code becomes a plain ``LunaError``."""
    kind = _tree(LunaError).get(code, LunaError)
    if issubclass(kind, Busy):
        return kind(message, hint, retry_after_s)
    return kind(message, hint)
