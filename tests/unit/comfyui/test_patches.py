"""Weight patches as sets: grouped, named by content, and sent as plain data. ComfyUI is not needed for plain ones."""

from __future__ import annotations

import pytest
import torch

from luna_daemon.comfyui.patches import Beside, PatchSet, Unsendable, append, decode_set, encode_set, group, matches
from luna_daemon.core import BadRequest
from luna_daemon.wire.packing import unpack

A, B, C = (("diff", (torch.full((2,), float(number)),)) for number in range(3))


def entry(value, strength=1.0, model=1.0, offset=None):
    """One patch of one key, as a patcher keeps it."""
    return strength, value, model, offset, None


def test_groups_give_what_the_patcher_holds():
    """The n-th patches of all keys by strength; keys with an offset keep it."""
    patches = {"x": [entry(A), entry(B, 0.5)], "y": [entry(C)], "z": [entry(A, 0.5, offset=(0, 1, 2))]}
    sets = group(patches)
    assert [(each.patches, each.strength_patch) for each in sets] == [
        ({"x": A, "y": C}, 1.0), ({("z", (0, 1, 2)): A}, 0.5), ({"x": B}, 0.5),
    ]  # fmt: skip
    assert matches(sets, patches)


@pytest.mark.parametrize(
    "edited",
    [
        {}, {"x": [entry(A)], "y": [entry(B)]}, {"x": [entry(A, 0.9)]}, {"x": [entry(B)]}, {"x": [entry(A), entry(A)]},
        {"x": [entry(A, offset=(0, 0, 1))]}, {"x": [entry(("diff", (A[1][0].clone(),)))]},
    ],
)  # fmt: skip
def test_an_edited_list_is_noticed(edited):
    """A key more or less, another strength, value, length, offset, or an equal tensor that is another object."""
    sets = [PatchSet({"x": A})]
    assert matches(sets, {"x": [entry(A)]}) and not matches(sets, edited)


def test_keys_of_a_merge_become_one_set():
    """As long as no key's patches change their order; and a clone's list, which shares the sets, stays as it was."""
    sets = [PatchSet({"x": A}, single=True)]
    clone = list(sets)
    append(sets, PatchSet({"y": B}, single=True))
    assert [each.patches for each in sets] == [{"x": A, "y": B}] and [each.patches for each in clone] == [{"x": A}]
    append(sets, PatchSet({"x": C}, single=True))  # the second patch of x
    append(sets, PatchSet({"z": A}, 0.5, single=True))
    append(sets, PatchSet({"y": C}, single=True))  # joins the set of x's second
    append(sets, PatchSet({"v": A, "w": A}))
    append(sets, PatchSet({"u": A}, single=True))  # not across a set that was added as a whole
    assert [list(each.patches) for each in sets] == [["x", "y"], ["x", "y"], ["z"], ["v", "w"], ["u"]]


def test_plain_patches_travel():
    beside = Beside()
    packed = encode_set({"x": A, ("y", (0, 0, 1)): ("set", (B[1][0],)), "z": (None,)}, beside)
    back = decode_set(unpack(packed, beside.tensors))
    assert list(back) == ["x", ("y", (0, 0, 1)), "z"] and back["z"] == (None,)
    assert back["x"][0] == "diff" and back["x"][1][0] is A[1][0] and back["y", (0, 0, 1)][1][0] is B[1][0]


@pytest.mark.parametrize("name", [("x", None, torch.neg), ("x", None, lambda weight: weight)])
def test_a_function_cannot_be_sent(name):
    with pytest.raises(Unsendable, match="the function"):
        encode_set({name: A}, Beside())


@pytest.mark.parametrize(
    "value", [5, [5], [["x", None, "system", {"plain": ["diff"]}]], [["x", None, None, {}]], [["x", None, None, 5]]]
)
def test_nonsense_is_refused(value):
    with pytest.raises(BadRequest):
        decode_set(value)


def test_a_name_is_a_hash_of_the_content():
    """Equal content has one name, whatever objects it is; each byte, shape, dtype and key counts. Strengths do not."""
    zeros = torch.zeros(4)
    name = PatchSet({"x": ("diff", (zeros,))}).use().name
    assert PatchSet({"x": ("diff", (zeros.clone(),))}, 0.3).use().name == name
    others = [
        {"y": ("diff", (zeros,))}, {"x": ("set", (zeros,))}, {"x": ("diff", (zeros + 1,))},
        {"x": ("diff", (zeros.reshape(2, 2),))}, {"x": ("diff", (zeros.int(),))}, {"x": ("diff", (zeros, 1.0))},
    ]  # fmt: skip
    assert len({PatchSet(other).use().name for other in others} | {name}) == len(others) + 1


def test_a_hooks_strength_multiplies():
    use = PatchSet({"x": A}, 0.5, 0.25).use(0.5)
    assert (use.strength_patch, use.strength_model) == (0.25, 0.25)
