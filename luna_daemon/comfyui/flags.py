"""ComfyUI's command-line flags that decide bits, which each instance sends to the daemon.

Every other flag is about memory policy, devices, folders or the server: the daemon sets those in ``comfyui_args``. The
client and the daemon use the same table, so this module imports only the standard library.
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
"""The only flag with values: names of optimizations; without values it means all."""
_FEATURE = re.compile(r"[a-z0-9_]{1,64}")
_MOST = 64


def rendered(args: object) -> tuple[str, ...]:
    """Return the flags that decide bits, sorted, from ComfyUI's parsed ``comfy.cli_args.args``."""
    on = [flag for flag in _SWITCHES if getattr(args, flag[2:].replace("-", "_"), False)]
    features = sorted(str(getattr(feature, "value", feature)) for feature in getattr(args, "fast", None) or ())
    return (*on, *((_FAST, *features) if features else ()))


def checked(flags: Sequence[str]) -> tuple[str, ...]:
    """Return a client's flags sorted, each once.

    Raises:
        BadRequest: there are too many flags, or a flag is not in the table of those that decide bits.
    """
    if len(flags) > _MOST:
        raise BadRequest(f"{len(flags)} ComfyUI flags, the most allowed is {_MOST}")
    bits, others = _parted(flags)
    if others:
        raise BadRequest(
            f"ComfyUI flag {others[0]!r} is not taken from clients", "Clients set only flags that decide bits; set"
            " others in the daemon's comfyui_args",
        )  # fmt: skip
    return bits


def bits_of(flags: Iterable[str]) -> tuple[str, ...]:
    """Return the flags of a command line that decide bits, sorted."""
    return _parted(flags)[0]


def without_bits(flags: Iterable[str]) -> list[str]:
    """Return the flags of a command line that do not decide bits, in their order, with their values."""
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
