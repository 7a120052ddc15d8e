"""Tensors to bytes and back: exact, without a copy, and no contradiction gets past the check."""

from __future__ import annotations

import pytest
import torch

from luna_daemon.core import BadRequest, LimitExceeded
from luna_daemon.wire.codec import ITEM_SIZES, check_ref, describe, tensor_bytes, tensor_from
from luna_daemon.wire.messages import TensorRef

VALUES = torch.tensor([[0.0, 1.0, -2.5], [float("inf"), float("-inf"), float("nan")]])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def round_trip(tensor: torch.Tensor) -> torch.Tensor:
    """Over the wire and back, in memory that is the receiver's own."""
    ref = describe(tensor)
    check_ref(ref, 1 << 30)
    return tensor_from(ref, memoryview(bytearray(tensor_bytes(tensor))))


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Same dtype, shape and bytes: NaN equals NaN, and -0.0 is not 0.0."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype):
    """Values, dtype and shape survive, infinities and NaN included."""
    tensor = VALUES.to(dtype) if dtype.is_floating_point else torch.arange(6).reshape(2, 3).to(dtype)
    back = round_trip(tensor)
    assert_same_bits(back, tensor)
    assert torch.equal(torch.nan_to_num(back), torch.nan_to_num(tensor)) if dtype.is_floating_point else True


@pytest.mark.parametrize("name", sorted(ITEM_SIZES))
def test_the_table_of_dtypes_is_torchs(name):
    """Every dtype that may travel exists in torch and has the size that the table says."""
    assert getattr(torch, name).itemsize == ITEM_SIZES[name]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1), torch.arange(20)[3::4], torch.ones(3).expand(4, 3),
        torch.tensor(7.5), torch.empty(0), torch.empty(2, 0, 5), torch.rand(3, requires_grad=True),
        torch.arange(10)[4:6], torch.rand(2, 4, 3, 5).to(memory_format=torch.channels_last),
    ],
    ids=["permuted", "strided", "expanded", "0-d", "empty", "empty-3d", "grad", "offset", "channels-last"],
)  # fmt: skip
def test_odd_layouts_come_back_equal(tensor):
    """Any layout arrives with the same values and shape."""
    back = round_trip(tensor)
    assert torch.equal(back, tensor.detach()) and back.shape == tensor.shape


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(2, 3, 4), torch.rand(2, 3, 4).permute(2, 0, 1), torch.rand(3, 4).t(),
        torch.rand(2, 4, 3, 5).to(memory_format=torch.channels_last), torch.rand(1, 4, 8, 8).movedim(1, -1),
    ],
    ids=["plain", "permuted", "transposed", "channels-last", "image"],
)  # fmt: skip
def test_the_layout_survives(tensor):
    """A tensor that fills its memory comes back with the same strides: kernels, and so bits, depend on them."""
    assert round_trip(tensor).stride() == tensor.stride()


@pytest.mark.parametrize("order", [(0,), (0, 0), (1, 2), (0, 1, 2), (-1, 0)])
def test_an_order_that_is_none_is_refused(order):
    """The order of dimensions names each once."""
    with pytest.raises(BadRequest, match="not an order of 2 dimensions"):
        check_ref(TensorRef("uint8", (2, 3), 6, 0, order=order), 100)


def test_a_large_tensor_comes_back():
    """Sixteen megabytes survive."""
    tensor = torch.rand(4, 1024, 1024)
    assert torch.equal(round_trip(tensor), tensor)


def test_sending_does_not_copy():
    """The bytes of a contiguous CPU tensor are a view of it."""
    tensor = torch.zeros(4)
    data = tensor_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(data[:4]) == b"\0\0\x80\x3f"


def test_a_received_tensor_is_the_memory_itself():
    """Writing into the tensor writes into the slot and the other way round: no copy, and writable."""
    data = bytearray(16)
    tensor = tensor_from(TensorRef("float32", (2, 2), 16, 0), memoryview(data))
    tensor.fill_(1.0)
    assert data == b"\0\0\x80\x3f" * 4
    data[:] = bytes(16)
    assert tensor.sum() == 0


@pytest.mark.parametrize(
    "ref, error, says",
    [
        (TensorRef("complex64", (1,), 8, 0), BadRequest, "complex64"),
        (TensorRef("os.system", (1,), 8, 0), BadRequest, "os.system"),
        (TensorRef("float32", (-1,), 4, 0), BadRequest, "not a shape"),
        (TensorRef("float32", (-2, -2), 16, 0), BadRequest, "not a shape"),
        (TensorRef("float32", (1,) * 17, 4, 0), BadRequest, "not a shape"),
        (TensorRef("float32", (3,), 16, 0), BadRequest, "has 12 bytes, not 16"),
        (TensorRef("float32", (3,), 8, 0), BadRequest, "has 12 bytes, not 8"),
        (TensorRef("float32", (3,), -12, 0), BadRequest, "not -12"),
        (TensorRef("float32", (0,), 4, 0), BadRequest, "has 0 bytes"),
        (TensorRef("float32", (3,), 12, -1), BadRequest, "float32"),
        (TensorRef("float32", (1 << 20, 1 << 20), 1 << 42, 0), LimitExceeded, "the limit is 1048576"),
        (TensorRef("float32", (2**62, 4), 0, 0), BadRequest, "limit|not a shape"),
        (TensorRef("int64", (2**64 - 1,) * 16, 8, 0), BadRequest, "limit|not a shape"),
    ],
)
def test_contradictions_are_refused(ref, error, says):
    """Unknown dtype, negative or gigantic sizes, and byte counts that are not the shape's never get further."""
    with pytest.raises(error, match=says):
        check_ref(ref, 1 << 20)


def test_the_limit_itself_is_allowed():
    """A tensor of exactly the limit passes, one byte more does not."""
    check_ref(TensorRef("uint8", (100,), 100, 0), 100)
    with pytest.raises(LimitExceeded):
        check_ref(TensorRef("uint8", (101,), 101, 0), 100)


@pytest.mark.parametrize("shape", [(0, 2**63), (0, 2**40, 2**40), (2**64 - 1,) * 15 + (0,)])
def test_an_empty_tensor_of_gigantic_sides_is_refused(shape):
    """What passes the check can always be made into a tensor."""
    ref = TensorRef("float32", shape, 0, 0)
    try:
        check_ref(ref, 1 << 20)
    except BadRequest:
        return
    tensor_from(ref, memoryview(b""))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_what_cannot_travel_is_said_before_sending(dtype):
    """A dtype outside the table is refused by name, with what to convert to."""
    with pytest.raises(BadRequest, match=r"cannot be sent\. Convert to one of float32"):
        describe(torch.zeros(2).to(dtype))
