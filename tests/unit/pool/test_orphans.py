"""The job object's structures, which only Windows can use: their sizes are what its headers say on 64 bits."""

from __future__ import annotations

import ctypes
import subprocess
import sys

from luna_daemon.pool import orphans


def test_the_structures_are_windows_own():
    """winnt.h on 64 bits: 64 bytes of basic limits, 144 with the counters and memory limits; flags at 16."""
    assert ctypes.sizeof(orphans._Basic) == 64 and orphans._Basic.LimitFlags.offset == 16
    assert ctypes.sizeof(orphans._Extended) == 144 and orphans._Extended.ProcessMemoryLimit.offset == 112


def test_elsewhere_it_does_nothing():
    """A process that is held runs on, and ends as always."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    orphans.hold(process)
    assert process.poll() is None
    process.communicate(b"\n", timeout=20)
    assert process.returncode == 0
