"""ComfyUI's command-line flags that decide bits: an instance tells the daemon which of them it runs with.

Every other flag is memory policy, devices, folders or the server, and the daemon's own affair (``comfyui_args``).
Standard library only: the client renders its flags with the same table that the daemon checks them by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..core import BadRequest

_SWITCHES = (
    "--bf16-text-enc", "--bf16-vae", "--cpu-vae", "--deterministic", "--disable-xformers", "--dont-upcast-attention",
    "--force-channels-last", "--force-fp16", "--force-fp32", "--force-upcast-attention", "--fp16-text-enc",
    "--fp16-vae", "--fp32-text-enc", "--fp32-vae", "--fp8_e4m3fn-text-enc", "--fp8_e5m2-text-enc",
    "--supports-fp8-compute", "--use-flash-attention", "--use-pytorch-cross-attention", "--use-quad-cross-attention",
    "--use-sage-attention", "--use-split-cross-attention",
)  # fmt: skip
_FAST = "--fast"
"""The one with values: names of optimizations; none means all."""
_FEATURE = re.compile(r"[a-z0-9_]{1,64}")
_MOST = 64


def rendered(args: object) -> tuple[str, ...]:
    """The flags that decide bits, from ComfyUI's parsed ``comfy.cli_args.args``, in the one order."""
    on = [flag for flag in _SWITCHES if getattr(args, flag[2:].replace("-", "_"), False)]
    features = sorted(str(getattr(feature, "value", feature)) for feature in getattr(args, "fast", None) or ())
    return (*on, *((_FAST, *features) if features else ()))


def checked(flags: Sequence[str]) -> tuple[str, ...]:
    """The same flags in the one order, each once.

    Raises:
        BadRequest: one of them is not of the table: from outside come no others.
    """
    if len(flags) > _MOST:
        raise BadRequest(f"{len(flags)} ComfyUI flags, the most allowed is {_MOST}")
    ours, others = _parted(flags)
    if others:
        raise BadRequest(
            f"ComfyUI flag {others[0]!r} is not taken from clients", "Only flags that decide bits are: the rest is"
            " the daemon's comfyui_args",
        )  # fmt: skip
    return ours


def bits_of(flags: Iterable[str]) -> tuple[str, ...]:
    """Those of a command line that decide bits, in the one order."""
    return _parted(flags)[0]


def without_bits(flags: Iterable[str]) -> list[str]:
    """The others, in their order, with their values."""
    return _parted(flags)[1]


def _parted(flags: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    on: set[str] = set()
    features: set[str] | None = None
    others: list[str] = []
    after_fast = False
    for flag in flags:
        if after_fast and _FEATURE.fullmatch(flag):
            assert features is not None
            features.add(flag)
            continue
        after_fast = flag == _FAST
        if after_fast:
            features = features or set()
        elif flag in _SWITCHES:
            on.add(flag)
        else:
            others.append(flag)
    fast = () if features is None else (_FAST, *sorted(features))
    return (*sorted(on), *fast), others
