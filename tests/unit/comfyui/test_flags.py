"""ComfyUI's flags that decide bits: one order, one list, nothing else from outside."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest

from luna_daemon.comfyui.flags import bits_of, checked, rendered, without_bits
from luna_daemon.core import BadRequest


class Feature(Enum):
    """As ComfyUI's PerformanceFeature."""

    AUTOTUNE = "autotune"
    FP16 = "fp16_accumulation"


def test_what_comfyui_parsed_comes_back_as_flags():
    """Switches that are on and the values of --fast; memory policy, off and unknown ones do not appear."""
    args = SimpleNamespace(
        use_split_cross_attention=True, fp32_vae=True, bf16_vae=False, lowvram=True, reserve_vram=2.0, cpu=True,
        fp8_e4m3fn_text_enc=True, fast={Feature.FP16, Feature.AUTOTUNE},
    )  # fmt: skip
    expected = (
        "--fp32-vae", "--fp8_e4m3fn-text-enc", "--use-split-cross-attention", "--fast", "autotune", "fp16_accumulation"
    )  # fmt: skip
    assert rendered(args) == expected == checked(expected)
    assert rendered(SimpleNamespace(fast=set())) == rendered(SimpleNamespace()) == ()


def test_the_order_does_not_matter():
    """Two instances whose command lines differ in order or repeat themselves run the same."""
    one = checked(["--fp32-vae", "--fast", "b", "a", "--deterministic"])
    assert one == checked(["--deterministic", "--fast", "a", "b", "a", "--fp32-vae", "--fp32-vae"])
    assert one == ("--deterministic", "--fp32-vae", "--fast", "a", "b")
    assert checked(["--fast"]) == ("--fast",) != checked([])


@pytest.mark.parametrize(
    "flags",
    [
        ["--lowvram"], ["--listen", "0.0.0.0"], ["--base-directory", "/tmp"], ["--fp32-vae", "--front-end-root", "/"],
        ["autotune"], ["--fast", "../x"], ["--fast", "A"], ["--fp32-vae=1"], ["-c", "import os"], [""],
        ["--fp32-vae", "x"], ["--fast", "a" * 65],
    ],
)  # fmt: skip
def test_no_other_flag_is_taken(flags):
    """Neither another flag, nor a value where none belongs, nor a value that is not a name."""
    with pytest.raises(BadRequest, match="is not taken from clients"):
        checked(flags)


def test_not_more_than_there_are():
    with pytest.raises(BadRequest, match="65 ComfyUI flags"):
        checked(["--fp32-vae"] * 65)


def test_the_daemons_own_command_line_is_parted():
    """Bits on one side; the rest keeps its order and values on the other."""
    line = ["--reserve-vram", "2", "--fast", "autotune", "--lowvram", "--fp16-vae"]
    assert bits_of(line) == ("--fp16-vae", "--fast", "autotune")
    assert without_bits(line) == ["--reserve-vram", "2", "--lowvram"]
