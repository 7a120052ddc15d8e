"""Random generator states of calls, so that a worker draws the numbers that the client would have drawn.

The states of torch's generators travel with a call, and return if the call drew numbers. A CPU state has 5 KB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..core import BadRequest

if TYPE_CHECKING:
    import torch

_CPU, _CUDA = "cpu", "cuda"


def states(device: str) -> tuple[list[str], list[torch.Tensor]]:
    """Names and states (``uint8``) of this process' generators that a computation on ``device`` draws from."""
    import torch

    names, current = [_CPU], [torch.get_rng_state()]
    if device == _CUDA and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        names.append(_CUDA)
        current.append(torch.cuda.get_rng_state())
    return names, current


def put_states(names: Sequence[str], given: Sequence[torch.Tensor]) -> None:
    """Set the states of this process' generators; generators of devices that are not in use are skipped.

    Raises:
        BadRequest: an unknown generator, or a tensor that is not a generator state.
    """
    import torch

    try:
        for name, state in zip(names, given, strict=True):
            if name == _CPU:
                torch.set_rng_state(state.clone())
            elif name != _CUDA:
                raise BadRequest(f"generator {name!r} is unknown", "Use 'cpu' or 'cuda'")
            elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.set_rng_state(state.clone())
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"not a state of generator {', '.join(names)}: {error}") from error


class Drawn:
    """Names of the generators that a computation has drawn from, and their new states."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.states: list[torch.Tensor] = []


@contextmanager
def drawing(names: Sequence[str], given: Sequence[torch.Tensor]) -> Iterator[Drawn]:
    """Set generator states for a computation; after the block, the result lists the generators that have drawn.

    Raises:
        BadRequest: as ``put_states``.
    """
    import torch

    put_states(names, given)
    drawn = Drawn()
    before = dict(zip(*states(_CUDA)))
    yield drawn
    for name, state in zip(*states(_CUDA)):
        if name not in before or not torch.equal(state, before[name]):
            drawn.names.append(name)
            drawn.states.append(state)
