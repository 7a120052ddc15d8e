"""The safetensors header: read as safetensors reads it, and never believed."""

from __future__ import annotations

import io
import json
import struct
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as reference_load
from safetensors.torch import save

from luna_daemon.core import BadRequest, ModelLoadError
from luna_daemon.files.identity import same_file
from luna_daemon.files.safetensors import columns, is_on_network, parse_header, read_header, read_through
from luna_daemon.wire.messages import TensorRef

GOOD = {"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]}}  # fmt: skip


def read(data: bytes):
    return read_header(io.BytesIO(data), len(data), "'x'").tensors


def file_of(header: object, payload: int = 16) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(payload)


def test_what_safetensors_saves_is_read():
    """Every tensor with its dtype, shape and place, whatever the dtype; metadata is no tensor."""
    dtypes = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32,
        torch.uint64, torch.complex64,
    ]  # fmt: skip
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes} | {"none": torch.empty(0, 4)}
    data = save(state, {"ss_note": "é"})
    found = read(data)
    assert found.keys() == state.keys()
    for key, ref in found.items():
        raw = data[ref.offset : ref.offset + ref.nbytes]
        assert f"torch.{ref.dtype}" == str(state[key].dtype) and ref.shape == tuple(state[key].shape)
        assert raw == bytes(state[key].reshape(-1).view(torch.uint8).numpy())


def entry(**changed: object) -> dict[str, object]:
    """The good header with one field of its first tensor changed."""
    return {**GOOD, "a": {**GOOD["a"], **changed}}


BROKEN = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header longer than allowed": struct.pack("<Q", 100_000_001) + b"{}",
    "no JSON": file_of(b"{" + b" " * 20),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "no object": file_of([1, 2]),
    "deep": file_of(b'{"a":' + b"[" * 100_000),
    "a key twice": file_of(b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
                           b'"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}'),
    "a key twice, alike": file_of(b'{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},'
                                  b'"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}'),
    "metadata of numbers": file_of({**GOOD, "__metadata__": {"a": 1}}),
    "metadata a list": file_of({**GOOD, "__metadata__": []}),
    "no entry": file_of({**GOOD, "a": 3}),
    "a field more": file_of(entry(more=1)),
    "unknown dtype": file_of(entry(dtype="F17")),
    "dtype a list": file_of(entry(dtype=["F16"])),
    "negative shape": file_of(entry(shape=[-2, -3])),
    "shape of floats": file_of(entry(shape=[2.0, 3])),
    "shape of booleans": file_of(entry(shape=[True, 6])),
    "shape no list": file_of(entry(shape=6)),
    "17 dimensions": file_of(entry(shape=[1] * 16 + [6])),
    "empty and endless": file_of(entry(shape=[0, 1 << 62], data_offsets=[0, 0])),
    "fewer bytes than its shape": file_of(entry(data_offsets=[0, 10])),
    "backwards": file_of(entry(data_offsets=[12, 0])),
    "negative offset": file_of(entry(data_offsets=[-12, 0])),
    "three offsets": file_of(entry(data_offsets=[0, 12, 24])),
    "overlap": file_of({**GOOD, "b": {"dtype": "F32", "shape": [], "data_offsets": [8, 12]}}),
    "gap": file_of({**GOOD, "b": {"dtype": "F32", "shape": [], "data_offsets": [14, 18]}}, 18),
    "past the end": file_of(GOOD, 15),
    "bytes left over": file_of(GOOD, 17),
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_contradicts_itself_is_refused(data):
    """One typed error that names the file and says what is wrong."""
    with pytest.raises(ModelLoadError, match="'x' is not a valid safetensors file"):
        read(data)


@given(st.data())
def test_a_damaged_header_is_read_right_or_refused(data):
    """A byte changed anywhere: a typed error, or exactly what safetensors makes of it, and never outside the file."""
    whole = bytearray(file_of(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 17))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(whole))
    except ModelLoadError:
        return
    assert all(ref.offset >= 0 and ref.offset + ref.nbytes <= len(whole) for ref in found.values())
    try:
        theirs = reference_load(bytes(whole))
    except (SafetensorError, KeyError):
        raise AssertionError("safetensors refuses what we took") from None
    assert {key: (f"torch.{ref.dtype}", ref.shape) for key, ref in found.items()} == {
        key: (str(value.dtype), tuple(value.shape)) for key, value in theirs.items()
    }


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_as_a_header(header, size):
    """No other exception than the typed one, whatever is in it."""
    try:
        parse_header(header, size, "x")
    except ModelLoadError:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]) | st.text(max_size=3), inner, max_size=4
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_any_document_as_a_header(document):
    """The same for JSON of any form."""
    try:
        parse_header(json.dumps(document).encode(), 1000, "x")
    except ModelLoadError:
        pass


def test_runs_join_neighbours_of_one_dtype():
    """A new run begins with another dtype, another segment, or a gap; a shape is told once per run."""
    shapes = [(2,), (1, 2), (2,), (2,)]
    half = [TensorRef("float16", shape, 4, offset) for shape, offset in zip(shapes, (8, 12, 16, 24))]
    single = TensorRef("float32", (1,), 4, 28)
    places = [*zip("abcd", [""] * 4, half), ("e", "", single), ("f", "s", single)]
    assert columns(places) == [
        ["", "float16", 8, ["a", "b", "c"], [(2,), (1, 2)], [0, 1, 0]], ["", "float16", 24, ["d"], [(2,)], [0]],
        ["", "float32", 28, ["e"], [(1,)], [0]], ["s", "float32", 28, ["f"], [(1,)], [0]],
    ]  # fmt: skip


def test_reading_through_takes_all_and_sees_the_end(tmp_path):
    """Into memory or into nothing; a file that has become shorter is an error and no half tensor."""
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 40_000)
    into = memoryview(bytearray(10_000_000))
    with path.open("rb") as file:
        read_through(file, into, 10_000_000, 100)
        assert into == path.read_bytes()[100:10_000_100]
        read_through(file, None, 10_240_000)
        with pytest.raises(BadRequest, match="ended after 10240000 of 10240001"):
            read_through(file, None, 10_240_001)


def test_network_disks_are_told_from_local_ones(monkeypatch, tmp_path):
    """By the mount that holds the path, the innermost one."""
    Mount = namedtuple("Mount", "mountpoint fstype opts")
    mounts = [
        Mount("/", "ext4", "rw"), Mount("/net", "nfs4", "rw"), Mount("/net/local", "xfs", "rw"),
        Mount("/host", "fuse.sshfs", "rw"), Mount("/z", "NTFS", "rw,remote"),
    ]  # fmt: skip
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    expected = {
        "/a": False, "/net/a": True, "/net/local/a": False, "/network": False, "/host/a": True, "/z/a": True
    }  # fmt: skip
    assert {path: is_on_network(Path(path)) for path in expected} == expected


def test_the_same_file_is_told_from_its_successor(tmp_path):
    """Size, time and inode all count."""
    path = tmp_path / "f"
    path.write_bytes(b"12")
    facts = path.stat()
    assert same_file(facts, 2, facts.st_mtime_ns, facts.st_ino)
    assert not same_file(facts, 3, facts.st_mtime_ns, facts.st_ino)
    assert not same_file(facts, 2, facts.st_mtime_ns + 1, facts.st_ino)
    assert not same_file(facts, 2, facts.st_mtime_ns, facts.st_ino + 1)
