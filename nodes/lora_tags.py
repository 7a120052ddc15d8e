"""``<lora:name:weight>`` tags in prompts: found, checked, removed. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from luna_daemon.core import BadRequest

__all__ = ["LoraTag", "combined", "parse_lora_tags"]

_TAG = re.compile(r"[ \t]*<lora:([^<>]*)>", re.IGNORECASE)


class LoraTag(NamedTuple):
    """One LoRA to apply, and how strongly to the model and to the text encoders."""

    name: str
    model_weight: float
    clip_weight: float


def parse_lora_tags(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without its tags, and the tags in their order.

    ``<lora:name>`` has weight 1; ``<lora:name:0.8>`` has it for both; ``<lora:name:0.8:0.5>`` is 0.8 for the model and
    0.5 for the text encoders. A tag takes the blanks before it along; all else stays as it was written.

    Raises:
        BadRequest: a tag without a name, or with a weight that is no number.
    """
    tags = [_tag(body) for body in _TAG.findall(prompt)]
    return (_TAG.sub("", prompt).strip() if tags else prompt), tags


def _tag(body: str) -> LoraTag:
    name, *weights = (part.strip() for part in body.split(":"))
    try:
        numbers = [float(weight) for weight in weights]
    except ValueError:
        numbers = [math.nan]
    if not name or len(numbers) > 2 or not all(math.isfinite(number) for number in numbers):
        raise BadRequest(f"<lora:{body}> is no LoRA tag", "Write <lora:name:weight> or <lora:name:weight:clip weight>")
    model_weight = numbers[0] if numbers else 1.0
    return LoraTag(name, model_weight, numbers[-1] if numbers else model_weight)


def combined(stack: Iterable[Any] | None, tags: Iterable[LoraTag]) -> list[LoraTag]:
    """A stack's LoRAs and a prompt's, in this order; the later of two with one name decides the weights.

    Raises:
        BadRequest: an entry of the stack is not ``(name, model weight, clip weight)``.
    """
    found: dict[str, LoraTag] = {}
    for entry in [*(stack or ()), *tags]:
        try:
            name, model_weight, clip_weight = entry
            one = LoraTag(str(name), float(model_weight), float(clip_weight))
        except (TypeError, ValueError) as error:
            raise BadRequest(f"lora_stack holds {entry!r}", "Entries are (name, model weight, clip weight)") from error
        if one.name != "None":
            found[one.name.lower()] = one
    return list(found.values())
