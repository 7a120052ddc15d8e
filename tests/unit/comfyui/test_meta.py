"""State dicts without weights, and the headers of model files that they are made from."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luna_daemon.comfyui.meta import is_kept, joined, read_tensor, weightless
from luna_daemon.core import LunaError, ModelLoadError, ModelNotFound
from luna_daemon.files.safetensors import open_header

ROOT = Path(__file__).resolve().parents[3]
torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture
def model(tmp_path):
    """A file with tensors of several kinds."""
    path = tmp_path / "model.safetensors"
    tensors = {
        "layer.weight": torch.arange(600, dtype=torch.float16).reshape(20, 30),
        "mix_factor": torch.tensor([0.25]),
        "scalar": torch.tensor(4.5, dtype=torch.bfloat16),
        "spiece_model": torch.arange(200, dtype=torch.uint8),
        "vae.per_channel_statistics.mean-of-means": torch.arange(128, dtype=torch.float32),
        "empty": torch.zeros(0, 4),
        "counts": torch.arange(40),
    }
    save_file(tensors, str(path), metadata={"config": "{}"})
    return path, tensors


def raw(path, table, data=b"", length=None):
    """A file with this table, right or wrong."""
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_a_header_names_everything(model):
    path, tensors = model
    header = open_header(path)
    assert header.metadata == {"config": "{}"} and header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        ref = header.tensors[name]
        assert (ref.dtype, ref.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert torch.equal(read_tensor(path, ref), tensor)


def test_a_header_needs_no_torch(model):
    """The control process and a client without tensors may read one."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from luna_daemon.files.safetensors import open_header\n"
        f"print(len(open_header({str(model[0])!r}).tensors))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "7\n", ran.stderr


def test_a_state_dict_without_weights(model):
    """Only scalars, tokenizers and statistics are read."""
    path, tensors = model
    found, metadata = weightless(path)
    assert metadata == {"config": "{}"} and found.keys() == tensors.keys()
    assert {name for name, value in found.items() if value.is_meta} == {"layer.weight", "counts"}
    for name, value in found.items():
        assert (value.dtype, value.shape) == (tensors[name].dtype, tensors[name].shape)
        assert value.is_meta or torch.equal(value, tensors[name])
    found["mix_factor"].add_(1)


@pytest.mark.parametrize(
    ("name", "count", "kept"),
    [("a", 1, True), ("a", 16, True), ("a", 17, False), ("x.spiece_model", 10**6, True), ("tekken_model", 999, True)],
)
def test_what_is_kept(name, count, kept):
    assert is_kept(name, count) is kept


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
WRONG = {
    "empty": b"",
    "short": b"\x01\x02",
    "no json": struct.pack("<Q", 5) + b"hello",
    "longer than the file": struct.pack("<Q", 1 << 20) + b"{}",
    "huge": struct.pack("<Q", 1 << 62) + b"{}",
    "a list": struct.pack("<Q", 2) + b"[]",
    "not utf-8": struct.pack("<Q", 4) + b"{\xff\xfe}",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_model_file(tmp_path, name):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(WRONG[name])
    with pytest.raises(ModelLoadError, match=r"bad\.safetensors"):
        open_header(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F99"}, {"shape": [2, 3]}, {"shape": [-2, -2]}, {"shape": "ab"}, {"data_offsets": [0, 32]},
        {"data_offsets": [16, 0]}, {"data_offsets": [-16, 0]}, {"data_offsets": [0]}, {"data_offsets": [4, 20]},
        {"dtype": None}, {"shape": None},
    ],
)  # fmt: skip
def test_entries_that_do_not_fit_the_file(tmp_path, change):
    assert open_header(raw(tmp_path / "good.safetensors", {"a": ENTRY}, bytes(16))).tensors["a"].shape == (2, 2)
    with pytest.raises(ModelLoadError, match="'a'"):
        open_header(raw(tmp_path / "bad.safetensors", {"a": ENTRY | change}, bytes(16)))


@pytest.mark.parametrize("entry", [None, 3, [], {}, "x"])
def test_entries_that_are_none(tmp_path, entry):
    with pytest.raises(ModelLoadError):
        open_header(raw(tmp_path / "bad.safetensors", {"a": entry}))


def test_a_truncated_file(model, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(model[0].read_bytes()[:-10])
    with pytest.raises(ModelLoadError, match="truncated"):
        open_header(path)


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [4]), ("F6_E2M3", [8])])
def test_a_dtype_that_torch_does_not_have(tmp_path, dtype, shape):
    """The header can be read; a state dict cannot be made, and the error says of which file and dtype."""
    nbytes = 2 if dtype == "F4" else 6
    path = raw(
        tmp_path / "x.safetensors", {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}, bytes(nbytes)
    )
    assert open_header(path).tensors["a"].nbytes == nbytes
    with pytest.raises(ModelLoadError, match=rf"x\.safetensors has tensors of dtype {dtype}"):
        weightless(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelNotFound, match=r"none\.safetensors"):
        open_header(tmp_path / "none.safetensors")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_file_or_a_typed_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    try:
        open_header(path)
    except LunaError:
        return


def test_the_halves_of_a_taesd(tmp_path):
    """Told apart by their first layer; scale and shift by the name; one file is left alone."""
    decoder, encoder = {"1.weight": torch.zeros(1), "3.weight": torch.ones(1)}, {"0.weight": torch.zeros(1)}
    paths = [Path("taesd3_encoder.safetensors"), Path("taesd3_decoder.safetensors")]
    whole = joined([encoder, decoder], paths)
    assert set(whole) == {
        "taesd_encoder.0.weight", "taesd_decoder.1.weight", "taesd_decoder.3.weight", "vae_scale", "vae_shift",
    }  # fmt: skip
    assert float(whole["vae_scale"]) == pytest.approx(1.5305) and not whole["vae_shift"].is_meta
    assert set(joined([encoder, decoder], [Path("a"), Path("b")])) == set(whole) - {"vae_scale", "vae_shift"}
    assert joined([encoder], paths[:1]) is encoder
