"""Parameters of every shape, layout and origin; inner optimizers that already have state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.engines import ENGINES, Engine

SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=3)
HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]
DTYPE_CASES = [
    pytest.param(dtype, engine, id=f"{dtype}-{engine}")
    for engine in ENGINES
    for dtype in engine.dtypes(DTYPES)
]


def sgd(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options})


def wide(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(
        tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    )


def noise(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = actual.detach().contiguous().view(size) == expected.detach().contiguous().view(size)
    assert bool(same.all())


def train(
    engine: Engine,
    optimizer: mpcore.MixedPrecisionOptimizer,
    reference: torch.optim.Optimizer,
    steps: int = 4,
    set_grads: Callable[[list[Tensor], int], None] | None = None,
    before: int = 0,
) -> None:
    """Steps both on the same gradients and compares every weight and master."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    copies = [p for group in reference.param_groups for p in group["params"]]
    for step in range(steps):
        scale = optimizer.scale(torch.ones(())).item()
        if set_grads is None:
            for index, param in enumerate(params):
                param.grad = (noise(param.shape, 100 * step + index) * scale).to(param.dtype)
        else:
            set_grads(params, step)
        for param, twin in zip(params, copies, strict=True):
            twin.grad = None if param.grad is None else param.grad.to(twin.dtype) / scale
        optimizer.step()
        reference.step()
        for param, twin in zip(params, copies, strict=True):
            master = optimizer.state[param].get("master", param)
            assert engine.agree(master, twin, steps=before + step + 1)
            assert_equal_bits(param, master.to(param.dtype))
    assert (optimizer.steps, optimizer.skipped_steps) == (before + steps, 0)


def wrapped_with_copies(
    engine: Engine, params: list[nn.Parameter], build: Any = sgd
) -> tuple[mpcore.MixedPrecisionOptimizer, torch.optim.Optimizer]:
    copies = [wide(param) for param in params]
    return engine.wrap(build(params), SCALE), build(copies)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 0, 2), (2, 3)])
@pytest.mark.parametrize("build", [sgd, torch.optim.AdamW])
def test_zero_dimensional_and_empty_weights_train(engine: Engine, shape: Any, build: Any) -> None:
    params = [nn.Parameter(noise(shape, 1).to(dtype)) for dtype in engine.dtypes(DTYPES)]
    optimizer, reference = wrapped_with_copies(engine, params, build)
    train(engine, optimizer, reference)
    optimizer.scale(torch.ones(()))
    for param in params:
        param.grad = torch.ones_like(param)
    assert torch.isfinite(optimizer.clip_grad_norm_(1.0))


@pytest.mark.parametrize(("dtype", "engine"), DTYPE_CASES)
def test_transposed_and_channels_last_weights_train_and_keep_their_strides(
    engine: Engine,
    dtype: torch.dtype,
) -> None:
    transposed = nn.Parameter(noise((3, 5), 1).to(dtype).t())
    image = nn.Parameter(noise((2, 3, 4, 5), 2).to(dtype).to(memory_format=torch.channels_last))
    params = [transposed, image]
    strides = [param.stride() for param in params]
    # copies with plain strides: layout must not change a bit
    copies = [nn.Parameter(wide(param).contiguous().detach()) for param in params]
    train(engine, engine.wrap(sgd(params), SCALE), sgd(copies))
    assert [param.stride() for param in params] == strides
    assert not any(param.is_contiguous() for param in params)


@pytest.mark.parametrize(("dtype", "engine"), DTYPE_CASES)
def test_weights_that_are_views_of_one_buffer_stay_views_of_it(
    engine: Engine, dtype: torch.dtype
) -> None:
    flat = noise(20, 3).to(dtype)
    # the fused path takes no parameter with gaps
    apart = flat[8:14] if engine.fused else flat[8:20:2]
    params = [nn.Parameter(flat[1:7].view(2, 3)), nn.Parameter(apart)]
    before = flat.clone()
    optimizer, reference = wrapped_with_copies(engine, params)
    train(engine, optimizer, reference)
    assert_equal_bits(flat[1:7], params[0].view(-1))
    assert_equal_bits(apart.contiguous(), params[1].contiguous())
    untouched = [0, 7, *(range(14, 20) if engine.fused else range(9, 20, 2))]
    assert_equal_bits(flat[untouched], before[untouched])


@pytest.mark.parametrize(("dtype", "engine"), DTYPE_CASES)
def test_gradients_that_are_expanded_or_strided_train_as_dense_ones(
    engine: Engine, dtype: torch.dtype
) -> None:
    params = [nn.Parameter(noise((3, 4), seed).to(dtype)) for seed in range(3)]
    optimizer, reference = wrapped_with_copies(engine, params)

    def set_grads(given: list[Tensor], step: int) -> None:
        given[0].grad = torch.full((1, 1), step + 1.0, dtype=dtype).expand(3, 4)
        given[1].grad = noise((4, 3), step).to(dtype).t()
        given[2].grad = noise((6, 4), step).to(dtype)[::2]

    train(engine, optimizer, reference, set_grads=set_grads)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_that_are_views_of_a_bucket_are_left_scaled_in_it(
    engine: Engine, dtype: torch.dtype
) -> None:
    params = [nn.Parameter(noise((2, 3), seed).to(dtype)) for seed in range(2)]
    bucket = torch.zeros(12, dtype=dtype)
    for param, part in zip(params, bucket.split(6), strict=True):
        param.grad = part.view(2, 3)
    optimizer, reference = wrapped_with_copies(engine, params)

    def set_grads(_: list[Tensor], step: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        assert not bucket.any()
        bucket.copy_(noise(12, step) * optimizer.loss_scale)

    train(engine, optimizer, reference, set_grads=set_grads)
    assert params[1].grad.data_ptr() == bucket[6:].data_ptr()
    assert_equal_bits(bucket, (noise(12, 3) * 2.0**9).to(dtype))


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "engine"), DTYPE_CASES)
def test_state_that_a_constructor_made_is_kept_and_upcast(
    engine: Engine, dtype: torch.dtype, initial: float
) -> None:
    params = [nn.Parameter(noise((3, 4), 1).to(dtype))]

    def build(given: Any) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(given, lr=0.1, initial_accumulator_value=initial)

    optimizer, reference = wrapped_with_copies(engine, params, build)
    assert optimizer.state[params[0]]["sum"].flatten()[0] == initial
    train(engine, optimizer, reference)
    state = optimizer.state[params[0]]
    assert engine.agree(state["sum"], next(iter(reference.state.values()))["sum"], steps=4)


@pytest.mark.parametrize(("dtype", "engine"), DTYPE_CASES)
def test_state_that_nobody_has_made_starts_where_the_option_says(
    engine: Engine, dtype: torch.dtype
) -> None:
    params = [nn.Parameter(noise((3, 4), seed).to(dtype)) for seed in range(2)]

    def build(given: Any) -> torch.optim.Optimizer:
        inner = torch.optim.Adagrad(given[:1], lr=0.1, initial_accumulator_value=0.5)
        inner.add_param_group({"params": given[1:], "lr": 0.05})
        return inner

    copies = [wide(param) for param in params]
    reference = build(copies)
    inner = torch.optim.Adagrad(params[:1], lr=0.1, initial_accumulator_value=0.5)
    optimizer = engine.wrap(inner, SCALE)
    optimizer.add_param_group({"params": params[1:], "lr": 0.05})
    train(engine, optimizer, reference)
    for param, twin in zip(params, copies, strict=True):
        state = optimizer.state[param]
        assert engine.agree(state["sum"], reference.state[twin]["sum"], steps=4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("dtype", "engine"), DTYPE_CASES)
def test_an_optimizer_wrapped_after_ten_steps_continues_with_its_moments(
    engine: Engine, dtype: torch.dtype, fused: bool
) -> None:
    params = [nn.Parameter(noise((3, 4), seed).to(dtype)) for seed in range(2)]
    inner = torch.optim.AdamW(params, lr=0.01, fused=fused)
    for step in range(10):
        for index, param in enumerate(params):
            param.grad = noise(param.shape, 1000 + 10 * step + index).to(dtype)
        inner.step()
    copies = [wide(param) for param in params]
    reference = torch.optim.AdamW(copies, lr=0.01, fused=fused)
    # casts the moments up, which is exact; shares the others with what it is given
    reference.load_state_dict(copy.deepcopy(inner.state_dict()))
    optimizer = engine.wrap(inner, SCALE)
    assert set(optimizer.state) == set(params)
    train(engine, optimizer, reference)
    for param, twin in zip(params, copies, strict=True):
        for key, value in reference.state[twin].items():
            assert engine.agree(optimizer.state[param][key], value, steps=4)
        assert optimizer.state[param]["step"] == 14


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam])
def test_maximize_and_a_tensor_learning_rate_reach_the_inner_optimizer(
    engine: Engine, build: Any, tensor_lr: bool
) -> None:
    params = [nn.Parameter(noise((3, 4), 1).to(dtype)) for dtype in DTYPES[:3]]

    def make(given: Any) -> torch.optim.Optimizer:
        return build(given, lr=torch.tensor(0.05) if tensor_lr else 0.05, maximize=True)

    train(engine, *wrapped_with_copies(engine, params, make))


def test_several_groups_keep_their_own_options(engine: Engine) -> None:
    dtypes = [*engine.dtypes(DTYPES), torch.float32]
    params = [nn.Parameter(noise((3, 4), seed).to(dtypes[seed])) for seed in range(4)]

    def build(given: list[nn.Parameter]) -> torch.optim.Optimizer:
        return sgd(
            [
                {"params": given[:2], "lr": 0.5},
                {"params": given[2:3], "weight_decay": 0.0},
                {"params": given[3:], "momentum": 0.0},
            ]
        )

    train(engine, *wrapped_with_copies(engine, params, build))


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_cast_to_16_bits_after_wrapping_gets_masters_from_its_weights(
    engine: Engine,
    trained: bool,
) -> None:
    params = [nn.Parameter(noise((3, 4), seed)) for seed in range(2)]
    optimizer, reference = wrapped_with_copies(engine, params)
    if trained:
        train(engine, optimizer, reference, steps=2)
    copies = [p for group in reference.param_groups for p in group["params"]]
    for param, twin in zip(params, copies, strict=True):
        param.data = param.data.half()  # as model.half() does it
        twin.data = param.data.float()
    train(engine, optimizer, reference, steps=2, before=2 * trained)
    assert all("master" in optimizer.state[param] for param in params)


def test_a_float32_gradient_on_a_16_bit_weight_is_accepted(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3).bfloat16())
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch ties a gradient's dtype to its parameter's")
    param.grad_dtype = torch.float32
    optimizer, reference = wrapped_with_copies(engine, [param])

    def set_grads(given: list[Tensor], step: int) -> None:
        given[0].grad = noise(3, step) * 256

    train(engine, optimizer, reference, set_grads=set_grads)


def test_optimizers_over_disjoint_parameters_have_scales_of_their_own(engine: Engine) -> None:
    params = [nn.Parameter(noise((3, 4), seed).half()) for seed in range(2)]
    first, second = (engine.wrap(sgd([param]), SCALE) for param in params)
    copies = [wide(param) for param in params]
    references = [sgd([twin]) for twin in copies]
    for step in range(4):
        for optimizer, reference, param, twin in zip(
            (first, second), references, params, copies, strict=True
        ):
            overflow = optimizer is first and step == 1
            optimizer.zero_grad()
            optimizer.backward(
                (param.float() * noise((3, 4), step)).sum() * (1e9 if overflow else 1)
            )
            twin.grad = param.grad.float() / optimizer.loss_scale
            optimizer.step()
            assert optimizer.last_step.skipped == overflow
            if not overflow:
                reference.step()
            assert_equal_bits(param, twin.half())
    assert (first.loss_scale, second.loss_scale) == (128.0, 512.0)
    assert (first.skipped_steps, second.skipped_steps) == (1, 0)
