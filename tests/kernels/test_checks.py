"""What the launchers refuse: one clear error, and nothing written."""

import pytest
import torch

from mpcore_kernels import cast_into, unscale_, unscale_into
from mpcore_kernels._checks import check_device, check_no_overlap
from mpcore_kernels.unscale import _unscale_kernel
from mpcore_testing.kernels import assert_same_bits, flags


def coefficient(device):
    return torch.tensor(0.5, device=device)


def found_inf(device):
    return torch.tensor(0, dtype=torch.int32, device=device)


def saturated(device):
    return torch.tensor(0, dtype=torch.int64, device=device)


def ones(*shape, dtype=torch.float32, device=None):
    return torch.ones(*shape, dtype=dtype, device=device)


def bad_tensors():
    """A tensor that no launcher takes, and what its error says after the argument's name."""
    dense = r": expected a dense tensor \(one address per element, no gaps\), got torch.float32 of "
    copy = r"Pass a contiguous copy\."
    yield torch.ones(4, 4)[:, ::2], dense + r"shape \[4, 2\], strides \[4, 2\]\. " + copy
    yield torch.ones(4, 4)[:, :2], dense + r"shape \[4, 2\], strides \[4, 1\]\. " + copy
    yield torch.ones(1).expand(4), dense + r"shape \[4\], strides \[0\]\. " + copy
    yield torch.ones(3, 1).expand(3, 4), dense + r"shape \[3, 4\], strides \[1, 0\]\. " + copy
    yield torch.ones(5).as_strided((3, 3), (1, 1)), dense + r"shape \[3, 3\], strides \[1, 1\]"
    yield torch.eye(3).to_sparse(), dense + r"layout torch.sparse_coo\. " + copy
    yield torch._neg_view(torch.ones(3)), dense + r"shape \[3\], strides \[1\], lazily negated"


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(("bad", "message"), list(bad_tensors()))
def test_unscale_refuses_layouts_that_an_address_cannot_describe(bad, message, position, device):
    if bad.layout == torch.strided and not bad.is_neg():
        # a copy would change the layout
        bad = torch.empty_strided(bad.shape, bad.stride(), device=device).fill_(1)
    else:
        bad = bad.to(device)
    grads = [ones(3, device=device)]
    grads.insert(position, bad)
    with pytest.raises(ValueError, match=rf"^grads\[{position}\]{message}"):
        unscale_(grads, coefficient(device), flags(2, device))
    assert grads[1 - position].tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool])
def test_unscale_refuses_dtypes_it_has_no_arithmetic_for(dtype, device):
    first = ones(3, device=device)
    with pytest.raises(ValueError, match=rf"^grads\[1\]: expected torch.float16 .*got {dtype}\."):
        unscale_(
            [first, ones(3, dtype=dtype, device=device)], coefficient(device), flags(2, device)
        )
    assert first.tolist() == [1.0] * 3


class Wrapper(torch.Tensor):
    """A tensor that keeps its values elsewhere, as DTensor does."""

    @staticmethod
    def __new__(cls, shape, device):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_unscale_refuses_a_tensor_without_memory(device):
    first = ones(3, device=device)
    match = r"^grads\[1\]: expected a tensor that holds memory, got a Wrapper that holds none\."
    with pytest.raises(ValueError, match=match):
        unscale_([first, Wrapper((3,), device)], coefficient(device), flags(2, device))
    assert first.tolist() == [1.0] * 3


def test_unscale_refuses_what_is_no_tensor(device):
    with pytest.raises(TypeError, match=r"^grads\[0\]: expected a torch.Tensor, got NoneType\."):
        unscale_([None], coefficient(device), flags(1, device))
    with pytest.raises(TypeError, match=r"^coefficient: expected a torch.Tensor, got float\."):
        unscale_([], 0.5, flags(0, device))


def test_unscale_refuses_tensors_on_another_device(device):
    match = rf"^grads\[0\]: expected a tensor on {device}.*, got meta\. Call once per device\."
    with pytest.raises(ValueError, match=match):
        unscale_([torch.ones(3, device="meta")], coefficient(device), flags(1, device))
    with pytest.raises(ValueError, match=r"^nonfinite: expected a tensor on .*, got meta\."):
        unscale_([ones(3, device=device)], coefficient(device), flags(1, "meta"))


@pytest.mark.parametrize(
    "bad", [torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64), torch.tensor(1)]
)
def test_unscale_refuses_a_coefficient_that_is_not_a_float32_scalar(bad, device):
    grad = ones(3, device=device)
    match = r"^coefficient: expected a contiguous torch.float32 tensor of shape \[\], got torch\."
    with pytest.raises(ValueError, match=match):
        unscale_([grad], bad.to(device), flags(1, device))
    assert grad.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, dtype=torch.int32),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(6, dtype=torch.int32)[::2],
    ],
)
def test_unscale_refuses_flags_that_are_not_one_int32_per_gradient(bad, device):
    grads = [ones(3, device=device) for _ in range(3)]
    bad = bad.to(device) if bad.is_contiguous() else flags(6, device)[::2]
    match = r"^nonfinite: expected a contiguous torch.int32 tensor of shape \[3\], got torch\."
    with pytest.raises(ValueError, match=match):
        unscale_(grads, coefficient(device), bad)
    assert all(grad.tolist() == [1.0] * 3 for grad in grads)


def test_unscale_refuses_gradients_that_share_memory(device):
    buffer = ones(10, device=device)
    grads = [buffer[:6], ones(0, device=device), buffer[5:]]
    match = r"^grads\[2\]: expected memory of its own, got memory shared with grads\[0\]\."
    with pytest.raises(ValueError, match=match):
        unscale_(grads, coefficient(device), flags(3, device))
    with pytest.raises(ValueError, match=r"^grads\[1\]: expected memory of its own"):
        unscale_([buffer, buffer], coefficient(device), flags(2, device))
    assert buffer.tolist() == [1.0] * 10


def test_unscale_takes_neighbours_in_one_buffer(device):
    buffer = ones(10, device=device)
    unscale_([buffer[5:], buffer[:5], buffer[3:3]], coefficient(device), flags(3, device))
    assert buffer.tolist() == [0.5] * 10


def test_unscale_into_refuses_lists_of_different_lengths(device):
    match = r"^outs: expected 2 tensors, one for each of grads, got 1\. Pass lists of one length\."
    with pytest.raises(ValueError, match=match):
        unscale_into(
            [ones(3, device=device)] * 2,
            [ones(3, device=device)],
            coefficient(device),
            flags(2, device),
        )


@pytest.mark.parametrize(
    ("grad", "out"),
    [
        (torch.ones(4), torch.ones(3)),
        (torch.ones(4), torch.ones(4, 1)),
        (torch.ones(2, 3), torch.ones(3, 2).t()),
        (torch.ones(2, 3).t(), torch.ones(3, 2)),
        (torch.ones(0, 2), torch.ones(2, 0)),
        (torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last), torch.ones(1, 2, 3, 3)),
    ],
)
def test_unscale_into_refuses_pairs_of_different_layout(grad, out, device):
    grad, out = grad.to(device), out.to(device)
    with pytest.raises(ValueError, match=r"^outs\[0\]: expected the layout of grads\[0\], torch\."):
        unscale_into([grad], [out], coefficient(device), flags(1, device))
    assert (out == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_unscale_into_refuses_results_that_are_not_float32(dtype, device):
    out = ones(3, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=rf"^outs\[0\]: expected torch.float32, got {dtype}\."):
        unscale_into([ones(3, device=device)], [out], coefficient(device), flags(1, device))
    assert (out == 1).all()


def test_unscale_into_refuses_results_that_share_memory(device):
    buffer, grads = ones(4, device=device), [ones(2, device=device) for _ in range(2)]
    with pytest.raises(
        ValueError, match=r"^outs\[1\]: expected memory of its own, got .*outs\[0\]"
    ):
        unscale_into(grads, [buffer[:2], buffer[1:3]], coefficient(device), flags(2, device))
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        unscale_into([buffer], [buffer], coefficient(device), flags(1, device))
    assert buffer.tolist() == [1.0] * 4


def test_unscale_into_may_read_one_gradient_twice(device):
    grad, outs = ones(4, device=device), [torch.empty(4, device=device) for _ in range(2)]
    unscale_into([grad, grad], outs, coefficient(device), flags(2, device))
    assert [out.tolist() for out in outs] == [[0.5] * 4] * 2


def test_overlap_is_found_behind_a_long_tensor_that_is_only_read(device):
    buffer = torch.zeros(100, device=device)
    apart = torch.zeros(5, device=device)
    check_no_overlap("w", [apart], "r", [buffer, buffer[:50], buffer[10:20]])
    for written in (buffer[60:61], buffer[99:], buffer[:1]):
        with pytest.raises(ValueError, match=r"shared with"):
            check_no_overlap("w", [apart, written], "r", [buffer, buffer[:50], buffer[10:20]])


@pytest.mark.parametrize(
    ("masters", "weights", "message"),
    [
        ([torch.float16], [torch.float16], r"^masters\[0\]: expected torch.float32, got"),
        ([torch.float32], [torch.float32], r"^weights\[0\]: expected torch.float16 or torch.bfl"),
        ([torch.float32] * 2, [torch.float16], r"^weights: expected 2 tensors, one for each of"),
    ],
)
def test_cast_refuses_other_dtypes_and_numbers(masters, weights, message, device):
    masters = [ones(3, dtype=dtype, device=device) for dtype in masters]
    weights = [torch.full((3,), 2.0, dtype=dtype, device=device) for dtype in weights]
    total = saturated(device)
    with pytest.raises(ValueError, match=message):
        cast_into(masters, weights, found_inf(device), total)
    assert all((weight == 2).all() for weight in weights)


def test_cast_refuses_pairs_of_different_layout_and_shared_memory(device):
    master = ones(2, 3, device=device)
    weight = torch.zeros(3, 2, dtype=torch.float16, device=device).t()
    with pytest.raises(ValueError, match=r"^weights\[0\]: expected the layout of masters\[0\]"):
        cast_into([master], [weight], found_inf(device), saturated(device))
    inside = master.view(torch.float16).flatten()[:6].view(2, 3)
    with pytest.raises(ValueError, match=r"expected memory of its own, got memory shared with"):
        cast_into([master], [inside], found_inf(device), saturated(device))
    assert_same_bits(master, torch.ones(2, 3))
    assert (weight == 0).all()


def test_cast_refuses_scalars_of_other_dtypes(device):
    master = ones(3, device=device)
    weight = torch.zeros(3, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=r"^found_inf: expected a contiguous torch.int32 tensor"):
        cast_into([master], [weight], torch.tensor(False, device=device), saturated(device))
    with pytest.raises(ValueError, match=r"^saturated: expected a contiguous torch.int64 tensor"):
        cast_into([master], [weight], found_inf(device), found_inf(device))
    assert (weight == 0).all()


def test_kernels_refuse_a_device_whose_addresses_they_cannot_follow(device):
    check_device(_unscale_kernel, device)
    other = torch.device("cuda" if device.type == "cpu" else "cpu")
    with pytest.raises(ValueError, match=r"^tensors: expected .* got .* TRITON_INTERPRET"):
        check_device(_unscale_kernel, other)
    with pytest.raises(ValueError, match=r"^tensors: expected .* got meta"):
        unscale_([], torch.tensor(1.0, device="meta"), flags(0, "meta"))
