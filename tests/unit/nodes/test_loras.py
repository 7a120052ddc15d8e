"""LoRA tags: found, checked, removed; names to files; files from the daemon's RAM or from disk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luna_daemon.core import BadRequest, DaemonConnectionError


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
    with pytest.raises(BadRequest, match="is no LoRA tag") as caught:
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
        self.kept, self.error = {}, error

    def lora_cache_get(self, key):
        if self.error:
            raise self.error
        return self.kept.get(key)

    def lora_cache_put(self, key, weights):
        self.kept[key] = weights


class Tensor:
    def untyped_storage(self):
        pass


@pytest.fixture
def reads(loras, monkeypatch):
    """Counts reads from disk."""
    counted = []

    def load(path):
        counted.append(path)
        return {"w": Tensor()}

    monkeypatch.setattr(loras, "_from_disk", load)
    return counted


def test_a_file_is_read_once_and_anew_when_it_changes(loras, reads, monkeypatch, tmp_path):
    """The key is the file, its size and its time: whoever has the same file gets it from RAM."""
    client, path = Client(), tmp_path / "a.safetensors"
    monkeypatch.setattr(loras, "get_client", lambda: client)
    path.write_bytes(b"1")
    first = loras.read_lora(str(path))
    assert loras.read_lora(str(path)) is first and len(reads) == 1
    path.write_bytes(b"22")
    assert loras.read_lora(str(path)) is not first and len(reads) == 2 and len(client.kept) == 2


def test_without_a_daemon_it_is_read_from_disk(loras, reads, monkeypatch, tmp_path):
    """Each time, and nothing fails."""
    client, path = Client(DaemonConnectionError("away")), tmp_path / "a.safetensors"
    monkeypatch.setattr(loras, "get_client", lambda: client)
    path.touch()
    assert loras.read_lora(str(path)).keys() == {"w"} and len(reads) == 1 and not client.kept
