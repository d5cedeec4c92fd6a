"""What is launched is what the audit compiles, no more and no less; conftest.py watches."""

import dataclasses

import pytest
import torch

import mpcore_kernels
from mpcore_audit.variants import variants
from mpcore_kernels import unscale
from mpcore_kernels._launch import argument_type
from mpcore_testing.batches import COMBINATIONS, KINDS, Hyper, Move, make_batch
from mpcore_testing.kernels import FLOATS, HALVES, flags


def zeros(dtypes, device):
    return [torch.zeros(3, dtype=dtype, device=device) for dtype in dtypes]


def scalar(dtype, device):
    return torch.zeros((), dtype=dtype, device=device)


def call_every_update(device):
    """Updates with each rule, number of moments and combination of dtypes."""
    one, found_inf = torch.ones((), device=device), scalar(torch.int32, device)
    for rule, moments, numbers in KINDS:
        hyper = Hyper.of(numbers)
        for grad, weight in COMBINATIONS:
            batch = make_batch(moments, weight, [3]).on(device)
            plan = mpcore_kernels.plan_update(rule, [batch])
            mpcore_kernels.prepare_(plan, hyper)
            mpcore_kernels.inspect([], one, None, plan=plan, hyper=hyper)
            grads = [zeros([grad], device)]
            counter = scalar(torch.int64, device)
            mpcore_kernels.update_(plan, grads, one, found_inf, counter)
            if weight is not None:
                mpcore_kernels.prepare_(plan, hyper)
                edits = torch.zeros(1, 2, dtype=torch.int64, device=device)
                mpcore_kernels.update_(plan, grads, one, found_inf, counter, edits=edits)


def call_every_launcher(device):
    """Calls each public function with every dtype that it takes."""
    one = torch.ones((), device=device)
    found_inf = scalar(torch.int32, device)
    grads, halves = zeros(FLOATS, device), zeros(HALVES, device)
    masters = zeros([torch.float32] * 2, device)
    mpcore_kernels.unscale_(grads, one, flags(3, device))
    outs = zeros([torch.float32] * 3, device)
    mpcore_kernels.unscale_into(grads, outs, one, flags(3, device))
    mpcore_kernels.cast_into(masters, halves, found_inf, scalar(torch.int64, device))
    counts = torch.zeros(len(halves), 2, dtype=torch.int64, device=device)
    mpcore_kernels.adopt_(halves, masters, counts)
    for statistics in (False, True):
        mpcore_kernels.inspect(grads, one, 1.0, statistics=statistics)
    mpcore_kernels.update_scale_(Move.on(device), found_inf)


def test_every_public_function_is_called_here():
    calls = (call_every_launcher, call_every_update)
    called = {name for call in calls for name in call.__code__.co_names}
    functions = {
        name
        for name in mpcore_kernels.__all__
        if not isinstance(getattr(mpcore_kernels, name), type)
    }
    assert functions <= called


def test_launchers_use_exactly_the_variants_that_the_audit_compiles(device, launched):
    call_every_launcher(device)
    call_every_update(device)
    assert set(launched) == set(variants())


def test_every_launch_says_that_nothing_may_be_contracted():
    assert [variant.name for variant in variants() if variant.enable_fp_fusion] == []


def test_no_variant_is_listed_twice():
    assert len({variant.name for variant in variants()}) == len(variants())


@pytest.mark.parametrize(
    "change",
    [
        {"num_warps": 4},
        {"enable_fp_fusion": True},
        {"constants": (("GRAD", None), ("OUT", None), ("CHUNK", 1))},
    ],
)
def test_a_launch_of_another_variant_fails(device, monkeypatch, change):
    known = variants()
    changed = dataclasses.replace(unscale.variant(torch.float32, torch.float32), **change)
    monkeypatch.setattr(unscale, "variant", lambda source, destination: changed)
    monkeypatch.setattr(unscale, "variants", lambda: [v for v in known if "unscale" in v.name])
    grads = zeros([torch.float32], device)
    with pytest.raises(AssertionError, match="the audit does not compile"):
        mpcore_kernels.unscale_(grads, torch.ones((), device=device), flags(1, device))


def test_a_launch_with_arguments_of_other_types_fails(device):
    variant = unscale.variant(torch.float32, torch.float32)
    wrong = [scalar(torch.int64, device)] * 4
    with pytest.raises(AssertionError):
        variant.launch(1, wrong)


def test_argument_types_are_those_of_triton():
    values = [torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int32), 1, 2**31, 1.0]
    assert [*map(argument_type, values)] == ["*fp64", "*i32", "i32", "i64", "fp32"]
    assert argument_type(True) == "i1"
