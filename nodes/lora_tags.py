"""``<lora:name:weight>`` tags in prompts: parsed, checked, removed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from luna_daemon.core import BadRequest

_TAG = re.compile(r"[ \t]*<lora:([^<>]*)>", re.IGNORECASE)


class LoraTag(NamedTuple):
    """A LoRA to apply, with the weights for the model and for the text encoders."""

    name: str
    model_weight: float
    clip_weight: float


def parse_lora_tags(prompt: str) -> tuple[str, list[LoraTag]]:
    """Split a prompt into the text without tags, and the tags in their order.

    ``<lora:name>`` has weight 1, ``<lora:name:0.8>`` weight 0.8 for both; ``<lora:name:0.8:0.5>`` has weight 0.8 for
    the model and 0.5 for the text encoders. Blanks before a tag are removed with the tag; all other text stays.

    Raises:
        BadRequest: a tag has no name, or a weight that is not a number.
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
        raise BadRequest(
            f"<lora:{body}> is not a LoRA tag", "Write <lora:name:weight> or <lora:name:weight:clip weight>"
        )
    model_weight = numbers[0] if numbers else 1.0
    return LoraTag(name, model_weight, numbers[-1] if numbers else model_weight)


def combined(stack: Iterable[Any] | None, tags: Iterable[LoraTag]) -> list[LoraTag]:
    """Join a stack's LoRAs and a prompt's, in this order; the later of two entries of one name decides the weights.

    Raises:
        BadRequest: an entry of the stack is not ``(name, model weight, clip weight)``.
    """
    loras: dict[str, LoraTag] = {}
    for entry in [*(stack or ()), *tags]:
        try:
            name, model_weight, clip_weight = entry
            lora = LoraTag(str(name), float(model_weight), float(clip_weight))
        except (TypeError, ValueError) as error:
            raise BadRequest(f"lora_stack holds {entry!r}", "Entries are (name, model weight, clip weight)") from error
        if lora.name != "None":
            loras[lora.name.lower()] = lora
    return list(loras.values())
