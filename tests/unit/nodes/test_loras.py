"""LoRA tags: found, checked, removed; names to files; files from the daemon's RAM or from disk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luna_daemon.core import BadRequest, DaemonConnectionError, ModelNotFound


@pytest.fixture(scope="session")
def tags(part):
    return part("lora_tags")


@pytest.fixture(scope="session")
def loras(part):
    return part("loras")


@pytest.mark.parametrize(
    ("prompt", "clean", "found"),
    [
        ("a cat", "a cat", []),
        ("a cat <lora:style:0.8>", "a cat", [("style", 0.8, 0.8)]),
        ("a cat <lora:style:0.8:0.5>, nice", "a cat, nice", [("style", 0.8, 0.5)]),
        ("<lora:style> a cat", "a cat", [("style", 1.0, 1.0)]),
        ("<LoRA:a/b_v1.0.safetensors:-1> <lora:the other: .5 :1e-1>x", "x",
         [("a/b_v1.0.safetensors", -1.0, -1.0), ("the other", 0.5, 0.1)]),
        ("two\n lines <lora:s:1>\n(weight:1.2)  kept", "two\n lines\n(weight:1.2)  kept", [("s", 1.0, 1.0)]),
        (" blanks stay <lyco:x:1> without a tag ", " blanks stay <lyco:x:1> without a tag ", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_tags_are_taken_out(tags, prompt, clean, found):
    """The prompt without them, and what each says."""
    assert tags.parse_lora_tags(prompt) == (clean, found)


@pytest.mark.parametrize(
    "tag", ["<lora:>", "<lora: :1>", "<lora:a:much>", "<lora:a:1:2:3>", "<lora:a:nan>", "<lora:a:inf>"]
)
def test_a_broken_tag_is_named(tags, tag):
    """It would otherwise silently change the picture."""
    with pytest.raises(BadRequest, match="is not a LoRA tag") as caught:
        tags.parse_lora_tags(f"a cat {tag}")
    assert tag in str(caught.value)


NAMES = st.text(st.characters(exclude_characters="<>:", codec="utf-8"), min_size=1).map(str.strip).filter(bool)
WEIGHTS = st.floats(-10, 10, allow_nan=False)


@given(NAMES, WEIGHTS, WEIGHTS, st.text(st.characters(exclude_characters="<>", codec="utf-8")))
def test_any_name_and_weights_come_back(tags, name, model_weight, clip_weight, text):
    """Whatever is written around it."""
    clean, found = tags.parse_lora_tags(f"{text}<lora:{name}:{model_weight!r}:{clip_weight!r}>")
    assert found == [(name, model_weight, clip_weight)] and clean == text.strip()


def test_stack_and_tags_are_one_list(tags):
    """In order; the later of two with one name decides, at the place of the first."""
    found = tags.combined([("A", 1, 1), ["b", 0.5, 0.4], ("None", 1, 1)], [tags.LoraTag("a", 0.2, 0.3)])
    assert found == [("a", 0.2, 0.3), ("b", 0.5, 0.4)]
    assert tags.combined(None, []) == []
    for wrong in ("a", ("a", 1), ("a", "x", 1), 3):
        with pytest.raises(BadRequest, match="lora_stack holds"):
            tags.combined([wrong], [])


FILES = ["anime/Style_v1.0.safetensors", "style.safetensors", "real/portrait.safetensors", "x\\win.safetensors"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("style", FILES[1]), ("STYLE.safetensors", FILES[1]), ("anime/style_v1.0", FILES[0]),
        ("Style_v1.0", FILES[0]), ("portrait", FILES[2]), ("port", FILES[2]), ("x/win", FILES[3]), ("win", FILES[3]),
    ],
)  # fmt: skip
def test_a_name_means_a_file(loras, name, file):
    """With or without folder and ending, in any case, or a part that only one has."""
    assert loras.find_lora(name, FILES) == file


def test_a_name_that_means_none_or_several_is_an_error(loras):
    """Which names those that are close, or all that fit."""
    with pytest.raises(BadRequest, match=r"no LoRA named 'portrat'.*real/portrait"):
        loras.find_lora("portrat", FILES)
    with pytest.raises(BadRequest, match="'s' may mean"):
        loras.find_lora("s", FILES)


class Client:
    """The part of a client that LoRAs use."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def load_lora(self, name):
        self.asked.append(name)
        if self.error:
            raise self.error
        return {"from": "the daemon"}


@pytest.fixture
def reads(loras, monkeypatch):
    """Reads from disk are noted, not done."""
    noted = []
    monkeypatch.setattr(loras, "_from_disk", lambda path: noted.append(path) or {"from": "disk"})
    return noted


def test_the_daemon_is_asked_for_this_very_file(loras, reads, monkeypatch, tmp_path):
    """By its full path: another ComfyUI may have another file of the same name."""
    client = Client()
    monkeypatch.setattr(loras, "get_client", lambda: client)
    monkeypatch.chdir(tmp_path)
    assert loras.read_lora("a.safetensors") == {"from": "the daemon"}
    assert client.asked == [str(tmp_path / "a.safetensors")] and not reads


@pytest.mark.parametrize("error", [DaemonConnectionError("away"), ModelNotFound("elsewhere"), BadRequest("no")])
def test_whatever_the_daemon_says_no_to_is_read_from_disk(loras, reads, monkeypatch, error):
    """No daemon, not its folder, not a file that it knows: nothing fails."""
    monkeypatch.setattr(loras, "get_client", lambda: Client(error))
    assert loras.read_lora("/x/a.safetensors") == {"from": "disk"} and reads == ["/x/a.safetensors"]
