"""Whether two processes mean the same file."""

from __future__ import annotations

import os

import msgspec
import pytest

from luna_daemon.core import ModelMismatchError, ModelNotFound
from luna_daemon.files.identity import check_same, file_id, first_existing, load_bytes, same_file, weight_files
from luna_daemon.wire.messages import FileId, LoadSpec


def test_a_file_is_the_same_as_long_as_nothing_of_it_changes(tmp_path):
    """The identity that one process sends matches the open file of another."""
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"weights")
    mine = file_id(file)
    assert (mine.path, mine.size) == (str(file), 7)
    assert same_file(os.stat(file), mine.size, mine.mtime_ns, mine.inode)
    check_same("vae", mine, file_id(file))
    os.replace(file, tmp_path / "old")
    file.write_bytes(b"others!")
    assert not same_file(os.stat(file), mine.size, mine.mtime_ns, mine.inode)
    with pytest.raises(ModelMismatchError, match=r"vae: the client's (mtime_ns|inode)"):
        check_same("vae", mine, file_id(file))


@pytest.mark.parametrize("field", ["size", "mtime_ns", "inode", "digest"])
def test_the_field_that_differs_is_named_and_an_empty_one_is_equal(field):
    """A client on another host knows neither inode nor time."""
    values = {"size": 1, "mtime_ns": 2, "inode": 3, "digest": "sha256:4"}
    mine = FileId("/a", **values)
    other = msgspec.structs.replace(mine, **{field: "sha256:9" if field == "digest" else 9})
    with pytest.raises(ModelMismatchError, match=f"the client's {field} is"):
        check_same("a", other, mine, values)
    check_same("a", msgspec.structs.replace(mine, **{field: "" if field == "digest" else 0}), mine, values)


def test_a_missing_file_is_reported_with_its_path(tmp_path):
    """And nothing else is raised."""
    with pytest.raises(ModelNotFound, match="absent"):
        file_id(tmp_path / "absent")


def test_the_first_path_that_exists(tmp_path):
    """A path that no file system can have counts as missing."""
    there = tmp_path / "b"
    there.touch()
    assert first_existing([tmp_path / "a", tmp_path / ("x" * 5000), there, tmp_path]) == there
    assert first_existing([tmp_path / "a"]) is None


def test_a_folder_has_the_weights_below_it(tmp_path):
    """In one order, and other files do not count."""
    (tmp_path / "vae").mkdir()
    for name, size in (("vae/b.safetensors", 3), ("a.safetensors", 2), ("vae/config.json", 50)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    spec = LoadSpec("key", "vae", "sdxl", (str(tmp_path), str(tmp_path / "a.safetensors")), "cpu", "auto")
    assert load_bytes(spec) == 7
