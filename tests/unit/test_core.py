"""The vocabulary: error codes are stable and unique, and the docstring's tree is the truth."""

from __future__ import annotations

import re

import pytest

from luna_daemon import core
from luna_daemon.core import Busy, LunaError, error_from_code


def all_errors(root: type[LunaError] = LunaError) -> list[type[LunaError]]:
    """The whole tree, root first, as far as it belongs to the package."""
    children = [child for child in root.__subclasses__() if child.__module__ == core.__name__]
    return [root, *(error for child in children for error in all_errors(child))]


ERRORS = all_errors()


def drawn_tree() -> dict[str, tuple[str | None, bool]]:
    """Per class drawn in the docstring its parent and whether the local model may step in."""
    drawn: dict[str, tuple[str | None, bool]] = {}
    above: dict[int, str] = {}
    for line in (core.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line)
        if match:
            depth = len(match[1]) // 4
            above[depth] = match[2]
            drawn[match[2]] = (above[depth - 1] if depth else None, "local model may step in" in line)
    return drawn


def test_the_drawn_tree_is_the_real_one():
    """The docstring names every class, each below its base."""
    drawn = {name: parent for name, (parent, _) in drawn_tree().items()}
    real = {
        error.__name__: next((base.__name__ for base in error.__mro__[1:] if base in ERRORS), None) for error in ERRORS
    }
    assert drawn == real


def test_the_local_model_steps_in_where_the_tree_says():
    """``local_ok`` holds for exactly the classes that the docstring marks: never for a crash or a bad argument."""
    marked = {name for name, (_, ok) in drawn_tree().items() if ok}
    assert {error.__name__ for error in ERRORS if error.local_ok} == marked
    assert not core.PoisonRequest.local_ok and not core.BadRequest.local_ok and not core.Busy.local_ok


def test_codes_are_unique():
    """No two classes share a code, and every class has its own."""
    assert len({error.code for error in ERRORS}) == len(ERRORS)
    assert all("code" in vars(error) for error in ERRORS)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_a_code_gives_its_class_back(error):
    """What the daemon raises is what the client raises, with message and hint."""
    back = error_from_code(error.code, "the message", "the cure", 2.5)
    assert type(back) is error
    assert (back.message, back.hint) == ("the message", "the cure")


def test_an_unknown_code_is_a_plain_error():
    """A newer daemon's error is still an error of ours, with its text."""
    back = error_from_code("from_the_future", "the message")
    assert type(back) is LunaError and str(back) == "the message"


def test_busy_says_when_to_ask_again():
    """``retry_after_s`` survives the wire and has a default."""
    back = error_from_code("busy", "full", "", 2.5)
    assert isinstance(back, Busy) and back.retry_after_s == 2.5
    assert Busy("full").retry_after_s == 1.0


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_the_text_holds_the_hint(error):
    """``str()`` is the message and, if there is one, the cure."""
    assert str(error("It broke", "Mend it")) == "It broke. Mend it"
    assert str(error("It broke")) == "It broke"


@pytest.mark.parametrize(
    "ours, python",
    [
        (core.DaemonConnectionError, ConnectionError), (core.BadRequest, ValueError),
        (core.DeadlineExceeded, TimeoutError), (core.OutOfMemory, MemoryError),
    ],
)  # fmt: skip
def test_callers_may_catch_pythons_own(ours, python):
    """Code that knows nothing of us can catch what it means."""
    assert issubclass(ours, python)


def test_enums_travel_as_plain_values():
    """Their members are strings and numbers on the wire."""
    assert core.ModelKind.VAE == "vae" and core.ServiceType("clip") is core.ServiceType.CLIP_ONLY
    assert core.Priority.INTERACTIVE < core.Priority.NORMAL < core.Priority.BATCH
    assert {kind.value for kind in core.ModelKind} == {"vae", "clip", "echo"}
