"""Updates over all hyper-parameters and shapes, against float64 formulas and exact fractions."""

import math
from fractions import Fraction

import mpcore
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.updates import RULES
from mpcore.updates.rule import power

from mpcore_testing.engines import FUSED
from mpcore_testing.formulas import Formula

UNIT = 2.0**-24
KINDS = {name: getattr(torch.optim, name) for name in ("Adam", "AdamW", "SGD", "Adagrad")}
KINDS["Lion"] = mpcore.optim.Lion

rates = st.floats(1e-6, 1.0)
betas = st.floats(0.0, 0.9999)
decays = st.sampled_from([0.0]) | st.floats(1e-6, 0.5)
epsilons = st.sampled_from([1e-10, 1e-8, 1e-4, 0.1, 1.0])
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple) | st.integers(60, 70).map(
    lambda n: (n,)
)
#: by itself each option of each optimizer, large enough to be seen
ALONE = [
    ("Adam", {"lr": 0.25}),
    ("Adam", {"lr": 0.25, "eps": 0.5}),
    ("Adam", {"lr": 0.25, "betas": (0.5, 0.25), "maximize": True}),
    ("Adam", {"lr": 0.25, "weight_decay": 0.5}),
    ("Adam", {"lr": 0.25, "amsgrad": True, "betas": (0.5, 0.25)}),
    ("AdamW", {"lr": 0.25, "weight_decay": 0.5}),
    ("AdamW", {"lr": 0.25, "amsgrad": True, "betas": (0.0, 0.0), "maximize": True}),
    ("SGD", {"lr": 0.25, "maximize": True}),
    ("SGD", {"lr": 0.25, "weight_decay": 0.5}),
    ("SGD", {"lr": 0.25, "momentum": 0.5}),
    ("SGD", {"lr": 0.25, "momentum": 0.5, "dampening": 0.25}),
    ("SGD", {"lr": 0.25, "momentum": 0.5, "nesterov": True}),
    ("Adagrad", {"lr": 0.25}),
    ("Adagrad", {"lr": 0.25, "lr_decay": 0.5, "maximize": True}),
    ("Adagrad", {"lr": 0.25, "eps": 0.5}),
    ("Adagrad", {"lr": 0.25, "weight_decay": 0.5}),
    ("Lion", {"lr": 0.25}),
    ("Lion", {"lr": 0.25, "betas": (0.0, 0.5), "maximize": True}),
    ("Lion", {"lr": 0.25, "weight_decay": 0.5}),
]


@st.composite
def options_of(draw, name):
    """Every option of an optimizer."""
    options = {"lr": draw(rates), "weight_decay": draw(decays), "maximize": draw(st.booleans())}
    if name in ("Adam", "AdamW", "Lion"):
        options["betas"] = (draw(betas), draw(betas))
    if name in ("Adam", "AdamW"):
        options |= {"amsgrad": draw(st.booleans()), "eps": draw(epsilons)}
    elif name == "Adagrad":
        options |= {"lr_decay": draw(st.floats(0, 0.5)), "eps": draw(epsilons)}
    elif name == "SGD":
        options["momentum"] = draw(st.sampled_from([0.0, 0.5, 0.9]) | betas)
        options["nesterov"] = options["momentum"] > 0 and draw(st.booleans())
        options["dampening"] = 0.0 if options["nesterov"] else draw(st.floats(0, 0.9))
    return options


def assert_formula(name, options, start, engine, generator, *, tensor_lr=False):
    """Three steps within sixteen roundings each of the terms that a step adds.

    Gradients have the sign that L2 decay has, so that their sum cancels nothing.
    """
    if tensor_lr:  # float32 is what it holds
        options = {**options, "lr": float(torch.tensor(options["lr"]))}
    formula = Formula(name, options, start.double().numpy())
    param = torch.nn.Parameter(start.clone())
    lr = torch.tensor(options["lr"]) if tensor_lr else options["lr"]
    inner = KINDS[name]([param], **{**options, "lr": lr})
    optimizer = engine.wrap(inner, mpcore.NoLossScale())
    allowed = np.zeros(np.shape(formula.param))
    for _ in range(3):
        master = optimizer.state.get(param, {}).get("master", param).detach().double()
        sign = torch.where(master < 0, -1.0, 1.0) * (-1 if options.get("maximize") else 1)
        values = (torch.rand(param.shape, generator=generator) + 0.125) * sign
        param.grad = values.to(start.dtype)
        formula.step(param.grad.double().numpy())
        optimizer.step()
        allowed = allowed + 16 * UNIT * (np.abs(formula.param) + formula.size)
        after = optimizer.state.get(param, {}).get("master", param).detach().double().numpy()
        fine = np.abs(after - formula.param) <= allowed
        assert fine[np.broadcast_to(formula.certain, fine.shape)].all()


@pytest.mark.parametrize("engine", FUSED, ids=str)
@pytest.mark.parametrize(("name", "options"), ALONE, ids=str)
def test_each_option_by_itself_does_what_the_formula_says(name, options, engine):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(67, generator=generator)
    assert_formula(name, options, start, engine, generator)


@pytest.mark.parametrize("name", sorted(KINDS))
@given(
    data=st.data(),
    shape=shapes,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    engine=st.sampled_from(FUSED),
    tensor_lr=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_three_steps_are_those_of_the_formula_in_float64(
    name, data, shape, dtype, engine, tensor_lr, seed
):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator).to(dtype)
    options = data.draw(options_of(name))
    assert_formula(name, options, start, engine, generator, tensor_lr=tensor_lr)


def exact_power(base, exponent):
    return Fraction(base) ** exponent


@given(base=st.floats(0, 1), exponent=st.integers(0, 3000))
def test_power_is_right_to_one_rounding_for_each_factor(base, exponent):
    """Squaring doubles a relative error and adds one rounding: exponent - 1 of them in all."""
    base = float(np.float32(base))  # few bits keep the fractions small
    found = float(power(torch.tensor(base).double(), torch.tensor(float(exponent)).double()))
    expected = exact_power(base, exponent)
    if expected < Fraction(2) ** -1000:
        assert found <= 2.0**-999
    else:
        assert abs(Fraction(found) - expected) <= expected * Fraction(max(exponent, 1), 2**53)


@pytest.mark.parametrize("exponent", [2**31 - 1, 2**31, 2**32 - 1])
def test_power_of_an_exponent_of_32_bits(exponent):
    base = torch.tensor(1 - 2.0**-30, dtype=torch.float64)
    found = float(power(base, torch.tensor(float(exponent), dtype=torch.float64)))
    expected = math.exp(exponent * math.log1p(-(2.0**-30)))
    assert found == pytest.approx(expected, rel=exponent * 2.0**-53)
    assert float(power(torch.tensor(0.0).double(), torch.tensor(0.0).double())) == 1.0


def scalars(name, group, t):
    """The rule's scalars of a group, by their names."""
    rule = RULES[name]
    numbers = [torch.tensor([x], dtype=torch.float64) for x in rule.numbers(group, group["lr"])]
    values = rule.scalars(numbers, torch.tensor([float(t)], dtype=torch.float64))
    assert len(values) == len(rule.columns)
    return {c: float(v.expand(1)) for c, v in zip(rule.columns, values, strict=True)}


def close(actual, expected):
    """Equal after rounding to float32 from exact numbers, up to one float64 rounding in a tie."""
    return actual == pytest.approx(float(expected), rel=2.0**-45, abs=0)


@given(
    lr=rates,
    beta1=st.floats(0.0, 0.9999),
    beta2=st.floats(0.0, 0.9999),
    decay=decays,
    decoupled=st.booleans(),
    maximize=st.booleans(),
    t=st.integers(1, 400),
)
def test_scalars_of_adam_are_exact_fractions_rounded(
    lr, beta1, beta2, decay, decoupled, maximize, t
):
    beta1, beta2 = float(np.float32(beta1)), float(np.float32(beta2))
    got = scalars(
        "adam",
        {
            "lr": lr,
            "betas": (beta1, beta2),
            "eps": 1e-8,
            "weight_decay": decay,
            "decoupled_weight_decay": decoupled,
            "maximize": maximize,
            "amsgrad": False,
        },
        t,
    )
    assert got["sign"] == (-1.0 if maximize else 1.0)
    assert close(got["decay"], 1 - Fraction(lr) * Fraction(decay) if decoupled else 1)
    assert got["l2"] == (0.0 if decoupled else decay)
    assert (got["beta1"], got["beta2"], got["eps"]) == (beta1, beta2, 1e-8)
    assert close(got["1-beta1"], 1 - Fraction(beta1))
    assert close(got["1-beta2"], 1 - Fraction(beta2))
    # beta^t is off by t roundings, 1 - beta^t by t * beta^t / (1 - beta^t): below 2^14 of them
    one, two = (1 - exact_power(beta, t) for beta in (beta1, beta2))
    assert got["step_size"] == pytest.approx(float(Fraction(lr) / one), rel=2.0**-32)
    assert got["root"] == pytest.approx(math.sqrt(two), rel=2.0**-32)


@given(lr=rates, lr_decay=st.floats(0, 1), decay=decays, t=st.integers(1, 10**6))
def test_scalars_of_adagrad_are_exact_fractions_rounded(lr, lr_decay, decay, t):
    group = {"lr": lr, "lr_decay": lr_decay, "eps": 1e-10, "weight_decay": decay, "maximize": False}
    got = scalars("adagrad", group, t)
    assert close(got["rate"], Fraction(lr) / (1 + (t - 1) * Fraction(lr_decay)))
    assert (got["sign"], got["l2"], got["eps"]) == (1.0, decay, 1e-10)


@given(lr=rates, beta=betas, decay=decays, t=st.integers(1, 3), flag=st.booleans())
def test_scalars_of_sgd_and_lion_are_exact_fractions_rounded(lr, beta, decay, t, flag):
    group = {"lr": lr, "momentum": beta, "dampening": decay, "weight_decay": decay}
    got = scalars("sgd", {**group, "nesterov": flag, "maximize": not flag}, t)
    assert (got["sign"], got["l2"], got["momentum"]) == (1.0 if flag else -1.0, decay, beta)
    assert close(got["1-dampening"], 1 - Fraction(decay))
    assert (got["first"], got["nesterov"], got["lr"]) == (float(t == 1), float(flag), lr)
    group = {"lr": lr, "betas": (beta, 0.5), "weight_decay": decay, "maximize": flag}
    got = scalars("lion", group, t)
    assert close(got["decay"], 1 - Fraction(lr) * Fraction(decay))
    assert (got["beta1"], got["beta2"], got["1-beta2"], got["lr"]) == (beta, 0.5, 0.5, lr)
    assert close(got["1-beta1"], 1 - Fraction(beta))
    assert got["sign"] == (-1.0 if flag else 1.0)
