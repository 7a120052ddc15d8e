"""Random numbers across the border: who computes elsewhere draws what it would have drawn here, and draws it only once.

The states of torch's generators travel with a call, and come back if the call drew numbers. On a CPU a state has 5 KB.
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
    """This process' generators that a computation on ``device`` draws from: names, and their states (``uint8``)."""
    import torch

    names, found = [_CPU], [torch.get_rng_state()]
    if device == _CUDA and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        names.append(_CUDA)
        found.append(torch.cuda.get_rng_state())
    return names, found


def put_states(names: Sequence[str], given: Sequence[torch.Tensor]) -> None:
    """Put this process' generators into these states; those of devices that are not here are left out.

    Raises:
        BadRequest: an unknown generator, or no state of one.
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
        raise BadRequest(f"that is no state of generator {', '.join(names)}: {error}") from error


class Drawn:
    """Which generators a computation has drawn from, and their new states."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.states: list[torch.Tensor] = []


@contextmanager
def drawing(names: Sequence[str], given: Sequence[torch.Tensor]) -> Iterator[Drawn]:
    """Compute with generators in these states; afterwards the result says which of all have drawn."""
    import torch

    put_states(names, given)
    drawn = Drawn()
    before = dict(zip(*states(_CUDA)))
    yield drawn
    for name, state in zip(*states(_CUDA)):
        if name not in before or not torch.equal(state, before[name]):
            drawn.names.append(name)
            drawn.states.append(state)
