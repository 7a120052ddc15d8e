"""A LoRA's tensors over the daemon's file: the caller's own, right at any alignment, and copied where files differ."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luna_daemon.core import ProtocolError
from luna_daemon.files.mapping import load

VALUES = torch.arange(10, dtype=torch.float32)


class FakeLink:
    """A daemon that keeps one file; ``inline`` is what it answers to who cannot open the file."""

    use_arena, arena = True, None

    def __init__(self, path: Any, table: list[Any]) -> None:
        self.path, self.table = path, table
        self.copies: list[bool] = []
        self.files: list[Any] = []
        self.given_back = 0
        self.inline: Any = {"kind": "bytes", "keys": ["a"]}
        self.inode = os.stat(path).st_ino

    def call_for_refs(self, call: Any, *callbacks: Any) -> SimpleNamespace:
        self.copies.append(call.copy)
        self.files.append(call.file)
        stat = os.stat(self.path)
        file = {"path": str(self.path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": self.inode}
        return SimpleNamespace(result=self.inline if call.copy else {"kind": "file", "file": file, "table": self.table})

    def tensors(self, answer: Any) -> list[torch.Tensor]:
        return [VALUES]

    def give_back(self, answer: Any) -> None:
        self.given_back += 1


@pytest.fixture
def make(tmp_path):
    """A file with a header of so many bytes, and ten floats."""

    def make(header: int = 8) -> FakeLink:
        path = tmp_path / "lora.safetensors"
        path.write_bytes(bytes(header) + VALUES.numpy().tobytes())
        return FakeLink(path, [["", "float32", header, ["a", "b", "c"], [[2, 2], [3], [0]], [0, 1, 2]]])

    return make


@pytest.mark.parametrize("header", [8, 9, 10])
def test_tensors_of_a_file(make, header):
    """Shapes in the order of the keys, at addresses that kernels take also where a header has no padding."""
    tensors = load(make(header), "lora")
    assert all(tensor.data_ptr() % 4 == 0 for tensor in tensors.values())
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == {"a": [[0, 1], [2, 3]], "b": [4, 5, 6], "c": []}


def test_what_is_written_stays_here(make):
    link = make()
    tensors = load(link, "lora")
    tensors["a"].fill_(99)
    assert load(link, "lora")["a"].tolist() == [[0, 1], [2, 3]]
    assert link.path.read_bytes()[8:] == VALUES.numpy().tobytes()


def test_the_daemon_learns_when_the_last_tensor_died(make):
    link = make()
    tensors = load(link, "lora")
    last = tensors.pop("b")[1:]
    del tensors
    gc.collect()
    assert link.given_back == 0
    del last
    gc.collect()
    assert link.given_back == 1


def test_another_file_of_that_name_is_not_mapped(make):
    """Another container's file: bytes are asked for, and the first answer is given back."""
    link = make()
    link.inode += 1
    assert load(link, "lora") == {"a": VALUES} and link.copies == [False, True] and link.given_back == 1


def test_a_copy_that_cannot_be_mapped_is_an_error(make):
    link = make()
    link.inode += 1
    link.inline = {"kind": "arena", "table": link.table}
    with pytest.raises(ProtocolError, match="shared memory is not visible here"):
        load(link, "lora")
    assert link.given_back == 2


def test_without_shared_memory_bytes_are_asked_for_at_once(make):
    link = make()
    link.use_arena = False
    load(link, "lora")
    assert link.copies == [True]


def test_a_full_path_names_the_very_file(make):
    """Its identity goes along; a name as ComfyUI lists it, or a path that is not here, has none."""
    link = make()
    for name in (str(link.path), "lora", str(link.path) + "x"):
        load(link, name)
    assert [file and (file.path, file.size) for file in link.files] == [(str(link.path), 48), None, None]
