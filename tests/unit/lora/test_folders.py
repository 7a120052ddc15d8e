"""From a LoRA's name to its file: which folders count, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from luna_daemon.config import load_settings
from luna_daemon.core import BadRequest, ModelMismatchError, ModelNotFound
from luna_daemon.lora.folders import LoRAFolders, extra_folders
from luna_daemon.wire.messages import FileId


def make(path: Path, text: str = "weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def comfy(tmp_path) -> Path:
    return tmp_path / "comfy"


@pytest.fixture
def folders(tmp_path, comfy) -> LoRAFolders:
    """ComfyUI's own folder, and one of model_dirs."""
    return LoRAFolders(load_settings({"comfyui_path": comfy, "model_dirs": [tmp_path / "more"]}, {}))


def test_the_order_of_the_folders(tmp_path, comfy):
    """Default ones of extra_model_paths.yaml, ComfyUI's, the other extra ones, then model_dirs: each once."""
    extra = make(
        comfy / "extra_model_paths.yaml",
        "mine:\n  base_path: base\n  loras: |\n    a\n    b\n  is_default: true\nother:\n  loras: c\n  vae: d\nnone:\n",
    )
    named = make(tmp_path / "named.yaml", f"x:\n  base_path: {tmp_path}\n  loras: e\n  is_default: true\n")
    arguments = ["--fast", "--extra-model-paths-config", str(named), str(extra), "--cpu", str(extra)]
    settings = load_settings({"comfyui_path": comfy, "comfyui_args": arguments, "model_dirs": [tmp_path / "m"]}, {})
    base = comfy / "base"
    assert LoRAFolders(settings).folders == [
        base / "b", base / "a", tmp_path / "e", comfy / "models/loras", comfy / "c",
        tmp_path / "m" / "loras", tmp_path / "m",
    ]  # fmt: skip
    assert extra_folders(comfy, [f"--extra-model-paths-config={named}"])[0][0] == tmp_path / "e"


@pytest.mark.parametrize("text", ["[1, 2]", "a: [unclosed", "a: text"])
def test_extra_paths_that_cannot_be_read(comfy, caplog, text):
    """A warning that names the file; the rest is served."""
    make(comfy / "extra_model_paths.yaml", text)
    assert extra_folders(comfy, []) == ([], []) and "extra_model_paths.yaml cannot be read" in caplog.text


def test_names(tmp_path, comfy, folders):
    """By the name that ComfyUI lists, by a full path, in any folder; model_dirs' own files are found but not listed."""
    file = make(comfy / "models/loras/style/ink.safetensors")
    other = make(tmp_path / "more/wash.pt")
    for name in ("style/ink.safetensors", str(file)):
        found = folders.find(name)
        assert (found.name, found.path, found.is_safetensors) == ("style/ink.safetensors", file, True)
        assert found.source.size == len("weights")
    assert folders.find("wash.pt").path == other and not folders.find("wash.pt").is_safetensors
    assert folders.names() == ["style/ink.safetensors"]


def test_a_name_that_another_folder_takes_first(tmp_path, comfy, folders):
    """The later file is known by its full path, or the two would share an entry."""
    first, second = make(comfy / "models/loras/ink.safetensors"), make(tmp_path / "more/loras/ink.safetensors", "other")
    assert folders.find("ink.safetensors").path == first
    found = folders.find(str(second))
    assert (found.name, found.path) == (str(second), second)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("", BadRequest, "empty, too long"),
        ("a\0b", BadRequest, "empty, too long"),
        ("x" * 5000, BadRequest, "empty, too long"),
        ("../../secret.safetensors", ModelNotFound, "outside the LoRA folders"),
        ("link.safetensors", ModelNotFound, "outside the LoRA folders"),
        ("{secret}", ModelNotFound, "outside the LoRA folders"),
        ("folder.safetensors", ModelNotFound, "is not a file"),
        ("notes.txt", BadRequest, r"must end in \.safetensors"),
        ("Ink.safetensor", ModelNotFound, r"Similar names: ink\.safetensors"),
    ],
)
def test_what_is_refused(tmp_path, comfy, folders, name, error, text):
    """Names that are none, files that lie elsewhere, links followed, and files of another kind."""
    secret = make(comfy / "secret.safetensors")
    own = comfy / "models/loras"
    make(own / "ink.safetensors")
    make(own / "notes.txt")
    (own / "folder.safetensors").mkdir()
    (own / "link.safetensors").symlink_to(secret)
    with pytest.raises(error) as refused:
        folders.find(name.format(secret=secret))
    assert refused.match(text)


def test_without_folders():
    """Says which settings give some."""
    with pytest.raises(ModelNotFound, match=r"no LoRA folder is known.*comfyui_path or model_dirs"):
        LoRAFolders(load_settings({}, {})).find("a.safetensors")


def test_the_clients_file_must_be_this_one(comfy, folders):
    """Compared by size, time and inode, as far as the client says."""
    make(comfy / "models/loras/ink.safetensors")
    mine = folders.find("ink.safetensors").source
    assert folders.find("ink.safetensors", mine).source == mine
    with pytest.raises(ModelMismatchError, match="size"):
        folders.find("ink.safetensors", FileId(mine.path, mine.size + 1, mine.mtime_ns, mine.inode))
