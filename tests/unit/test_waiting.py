"""What tests wait with: conditions and bounds fail when they should, and say what was waited for."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.waiting import wait_until, wait_until_async, within


def test_a_condition_is_waited_for():
    """Until it is true; its value is the answer."""
    answers = iter([0, "", "there"])
    assert wait_until(lambda: next(answers)) == "there"
    answers = iter([0, "", "there"])
    assert asyncio.run(wait_until_async(lambda: next(answers))) == "there"


@pytest.mark.parametrize("what", ["the bird sings", lambda: "the bird sings"], ids=["text", "made when needed"])
def test_what_never_happens_is_named(what):
    """With the time that was given to it."""
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the bird sings"):
        wait_until(lambda: False, 0.01, what)
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the bird sings"):
        asyncio.run(wait_until_async(lambda: False, 0.01, what))


def test_a_bound_on_time():
    """A block that takes much longer than it may fails; one in time, and one that raises, do as they would without."""
    with within(30):
        pass
    with pytest.raises(AssertionError, match=r"a bare wait of 0\.05 s took"), within(0.05):
        time.sleep(0.5)  # the passing of time is what is tested
    with pytest.raises(KeyError), within(30):
        raise KeyError("as without it")
