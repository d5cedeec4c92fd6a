"""Norms that save 16 bits: bits, bytes, and what people do with norms."""

import copy
import pickle

import mpcore
import pytest
import torch
from mpcore.bench.training import saved_bytes
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

HALF = [torch.float16, torch.bfloat16]
PAIRS = [(mpcore.LayerNorm, nn.LayerNorm), (mpcore.RMSNorm, nn.RMSNorm)]
OPTIONS = [
    (mpcore.LayerNorm, nn.LayerNorm, {"bias": False}),
    *((ours, theirs, {"elementwise_affine": False}) for ours, theirs in PAIRS),
    *((ours, theirs, {"eps": 1e-3}) for ours, theirs in PAIRS),
    *((ours, theirs, {}) for ours, theirs in PAIRS),
]


def values(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def pair(ours, theirs, dtype, shape=(12,), **options):
    """A cast model with our norm, and one with torch's that has the same weights."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(12, 12), ours(shape, **options))
    for param in one[1].parameters():
        nn.init.normal_(param)
    other = nn.Sequential(copy.deepcopy(one[0]), theirs(shape, **options))
    other[1].load_state_dict(one[1].state_dict())
    return mpcore.cast_model(one, dtype), mpcore.cast_model(other, dtype)


def gradients(model, x, pull):
    x = x.clone().requires_grad_()
    result = model(x)
    result.backward(pull)
    return result, [x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIONS)
def test_results_have_the_bits_of_a_norm_that_is_given_fp32(ours, theirs, options, dtype):
    one, other = pair(ours, theirs, dtype, **options)
    x, pull = values(3, 5, 12, dtype=dtype), values(3, 5, 12, dtype=dtype, seed=1)
    (result, of_ours), (expected, of_theirs) = gradients(one, x, pull), gradients(other, x, pull)
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    if ours is mpcore.LayerNorm:  # RMSNorm adds up in another order: see below
        assert all(map(torch.equal, of_ours, of_theirs))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("shape", [(12,), (5, 12)])
def test_gradients_are_those_of_float64(ours, theirs, shape, dtype):
    norm = ours(shape, eps=1e-5)
    nn.init.normal_(norm.weight)
    wide = theirs(shape, eps=1e-5).double()
    wide.load_state_dict(norm.state_dict())
    x, pull = values(7, 5, 12, dtype=dtype, scale=30.0), values(7, 5, 12, dtype=dtype, seed=1)
    _, (given, *found) = gradients(norm, x, pull)
    _, (expected, *right) = gradients(wide, x.double(), pull.double())
    # one rounding to the input's dtype of a number with float32's errors
    assert given.dtype == dtype
    assert (given.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    for one, other in zip(found, right, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 1e-6 * other.abs().max() * 7  # rows that are added up


@pytest.mark.parametrize("ours", [mpcore.LayerNorm, mpcore.RMSNorm])
def test_a_large_float16_input_does_not_overflow(ours):
    assert ours(4)(torch.full((2, 4), 60000.0).half()).isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_is_saved_is_the_input_as_it_came(ours, theirs, dtype):
    one, other = (model[1] for model in pair(ours, theirs, dtype))
    x = values(64, 12, dtype=dtype).requires_grad_()
    beside = 64 * 2 * 4 if ours is mpcore.LayerNorm else 0  # a mean and a deviation for each row
    assert saved_bytes(lambda: one(x), list(one.parameters())) == 64 * 12 * 2 + beside
    assert saved_bytes(lambda: other(x), list(other.parameters())) >= 64 * 12 * 4


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_gradient_penalty_goes_through(ours, theirs):
    def penalty(norm, x):
        (given,) = torch.autograd.grad(norm(x).float().square().sum(), x, create_graph=True)
        given.float().square().sum().backward()
        return [x.grad.double(), norm.weight.grad.double()]

    norm = ours(12, eps=1e-5)
    nn.init.normal_(norm.weight)
    wide = theirs(12, eps=1e-5).double()
    wide.load_state_dict(norm.state_dict())
    x = values(4, 12, dtype=torch.bfloat16)
    found = penalty(norm, x.clone().requires_grad_())
    right = penalty(wide, x.double().requires_grad_())
    for one, other in zip(found, right, strict=True):  # three roundings to bfloat16 on the way
        assert (one - other).norm() <= 3 * torch.finfo(torch.bfloat16).eps * other.norm()


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>")  # of Dynamo
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_compiled_model_has_no_break_and_the_same_results(ours, theirs):
    model, _ = pair(ours, theirs, torch.bfloat16)
    x, pull = values(4, 12, dtype=torch.bfloat16), values(4, 12, dtype=torch.bfloat16, seed=1)
    expected, right = gradients(copy.deepcopy(model), x, pull)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result, found = gradients(compiled, x, pull)
    assert torch.equal(result, expected)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_checkpointed_layers_have_the_same_gradients(ours, theirs):
    model, _ = pair(ours, theirs, torch.float16)
    x, pull = values(4, 12, dtype=torch.float16), values(4, 12, dtype=torch.float16, seed=1)
    _, right = gradients(copy.deepcopy(model), x, pull)
    rerun = nn.Module()
    rerun.model = model
    rerun.forward = lambda given: checkpoint(model, given, use_reentrant=False)
    _, found = gradients(rerun, x, pull)
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("ours", [mpcore.LayerNorm, mpcore.RMSNorm])
def test_an_input_that_is_written_to_afterwards_is_an_error_as_in_torch(ours):
    x = values(4, 12, dtype=torch.float16).requires_grad_() * 2
    result = ours(12)(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_gradients_of_each_sample_by_vmap(ours, theirs):
    norm = ours(12)
    params = dict(norm.named_parameters())
    x = values(4, 3, 12, dtype=torch.bfloat16)

    def loss(given, one):
        return functional_call(norm, given, (one,)).float().square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for n in range(4):
        norm.zero_grad()
        loss(params, x[n]).backward()
        torch.testing.assert_close(each["weight"][n], norm.weight.grad)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_of_one_dtype_it_is_torchs_own(ours, theirs, dtype):
    x = values(4, 12, dtype=dtype)
    assert torch.equal(ours(12).to(dtype)(x), theirs(12).to(dtype)(x))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("ours", [mpcore.LayerNorm, mpcore.RMSNorm])
def test_a_result_is_of_the_dtype_of_its_input_under_autocast_too(ours, dtype):
    x = values(4, 12, dtype=dtype)
    expected = ours(12)(x)
    assert expected.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(12)(x), expected)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_cast_model_is_cast_again_copied_and_pickled(ours, theirs):
    model, other = pair(ours, theirs, torch.float16)
    assert list(model.state_dict()) == list(other.state_dict())
    x = values(4, 12, dtype=torch.float16)
    expected = model(x)
    for again in (
        mpcore.cast_model(model, torch.float16),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("ours", [mpcore.LayerNorm, mpcore.RMSNorm])
def test_one_that_is_named_is_given_fp32_and_returns_it_at_the_end(ours):
    model = nn.Sequential(nn.Linear(12, 12), ours(12))
    given = []
    model[1].register_forward_hook(lambda _, args, result: given.append(args[0].dtype))
    mpcore.cast_model(model, torch.float16, keep_fp32=["1"])
    assert model(torch.ones(2, 12)).dtype == torch.float32
    assert given == [torch.float32]
