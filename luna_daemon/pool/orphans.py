"""End workers with their daemon, whatever ends the daemon.

On every system a worker exits when its connection closes, which the system does for a process that has ended. On
Windows a job object ends the worker too, even one that hangs in a driver. Written for Windows and not run there yet.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

from ..core import logger

_KILL_ON_CLOSE = 0x2000
_EXTENDED_LIMITS = 9

_job: Any = None
"""The job's handle, never closed here: the system closes it when this process ends, and ends the job's processes."""


class _Basic(ctypes.Structure):
    """``JOBOBJECT_BASIC_LIMIT_INFORMATION``."""

    _fields_ = [
        ("PerProcessUserTimeLimit", ctypes.c_int64), ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", ctypes.c_uint32), ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t), ("ActiveProcessLimit", ctypes.c_uint32),
        ("Affinity", ctypes.c_size_t), ("PriorityClass", ctypes.c_uint32), ("SchedulingClass", ctypes.c_uint32),
    ]  # fmt: skip


class _Extended(ctypes.Structure):
    """``JOBOBJECT_EXTENDED_LIMIT_INFORMATION``."""

    _fields_ = [
        ("BasicLimitInformation", _Basic), ("IoInfo", ctypes.c_uint64 * 6), ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t), ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    ]  # fmt: skip


def hold(process: subprocess.Popen[bytes]) -> None:
    """Have Windows end ``process`` with this one; does nothing elsewhere."""
    if sys.platform != "win32":
        return
    try:
        _assign(int(process._handle))
    except OSError as error:
        logger.warning("worker %d would outlive a daemon that is killed: %s", process.pid, error)


def _assign(handle: int) -> None:
    global _job
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    kernel.CreateJobObjectW.restype = ctypes.c_void_p
    if _job is None:
        job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))
        limits = _Extended()
        limits.BasicLimitInformation.LimitFlags = _KILL_ON_CLOSE
        _check(job.value)
        _check(kernel.SetInformationJobObject(job, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)))
        _job = job
    _check(kernel.AssignProcessToJobObject(_job, ctypes.c_void_p(handle)))


def _check(done: Any) -> None:
    if not done:
        raise ctypes.WinError(ctypes.get_last_error())  # type: ignore[attr-defined]
