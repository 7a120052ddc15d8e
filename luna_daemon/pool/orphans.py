"""End worker processes when their daemon ends, even if the daemon was killed.

A worker exits when its connection closes, and the operating system closes the connections of an ended daemon. On
Windows a job object ends also a worker that hangs in a driver. The code for Windows has not been run there yet.
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
"""The job's handle, never closed here: when this process ends, Windows closes it and ends the job's processes."""


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
    """Make Windows end ``process`` when the daemon's process ends; does nothing on other systems."""
    if sys.platform != "win32":
        return
    try:
        _assign(int(process._handle))
    except OSError as error:
        logger.warning("the worker with pid %d will keep running if the daemon is killed: %s", process.pid, error)


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
