"""What paired metrics allow to say, against published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpcore.comparison.statistics import agreement

# Student, "The Probable Error of a Mean", Biometrika 6, 1908: hours of sleep won by ten patients
# with one drug and with another; t = 4.0621, p = 0.002833 in every textbook
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# quantiles of Student's t for 95 % to one side, by degrees of freedom (printed tables)
T95 = {1: 6.314, 2: 2.920, 4: 2.132, 9: 1.833}


def test_p_value_of_students_own_example():
    found = agreement(SECOND, FIRST, higher_is_better=True, margin=0.01)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.difference == pytest.approx(1.58, abs=1e-12)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_interval_is_that_of_the_printed_quantiles(seeds):
    rng = np.random.default_rng(seeds)
    base, other = rng.normal(10, 1, seeds), rng.normal(10, 1, seeds)
    found = agreement(list(other), list(base), higher_is_better=False, margin=0.01)
    differences = other - base
    half = T95[seeds - 1] * differences.std(ddof=1) / math.sqrt(seeds)
    low, high = found.interval
    # the quantiles are printed with four digits
    assert low == pytest.approx(differences.mean() - half, rel=5e-4, abs=5e-4 * half)
    assert high == pytest.approx(differences.mean() + half, rel=5e-4, abs=5e-4 * half)


@pytest.mark.parametrize(
    ("shift", "higher_is_better", "name"),
    [
        (0.0, False, "matches"),
        (0.5, False, "worse"),
        (-0.5, False, "matches"),
        (0.5, True, "matches"),
        (-0.5, True, "worse"),
        (0.1, False, "undecided"),
        (-0.1, True, "undecided"),
    ],
)
def test_verdict_looks_at_the_worse_end_of_the_interval(shift, higher_is_better, name):
    base = [9.9, 10.0, 10.1, 10.0, 10.0]
    noise = [0.01, -0.01, 0.02, -0.02, 0.0]
    metrics = [b + n + shift for b, n in zip(base, noise, strict=True)]
    found = agreement(metrics, base, higher_is_better=higher_is_better, margin=0.01)
    assert found.name == name
    assert found.margin == pytest.approx(0.1)


def test_few_and_noisy_seeds_are_no_proof_of_equality():
    found = agreement([10.5, 9.4, 10.2], [10.0, 10.0, 10.0], higher_is_better=False, margin=0.01)
    assert found.p > 0.5
    assert found.name == "undecided"


def test_equal_metrics_match_and_equal_differences_have_no_p():
    same = agreement([1.0, 2.0], [1.0, 2.0], higher_is_better=False, margin=0.01)
    assert (same.name, same.p, same.interval) == ("matches", 1.0, (0.0, 0.0))
    shifted = agreement([1.5, 2.5], [1.0, 2.0], higher_is_better=False, margin=0.01)
    assert (shifted.name, shifted.p) == ("undecided", None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails(bad):
    found = agreement([1.0, bad], [1.0, 1.0], higher_is_better=False, margin=0.01)
    assert found.name == "fails"
    assert found.text == "Not finite: 1 of 2 metrics."
    of_fp32 = agreement([1.0, 1.0], [1.0, bad], higher_is_better=False, margin=0.01)
    assert of_fp32.text == "Not finite: the metric of FP32."


def test_a_baseline_of_zero_is_no_division_by_zero():
    found = agreement([0.0, 1e-3, 2e-3], [0.0, 0.0, 0.0], higher_is_better=False, margin=0.01)
    assert found.name == "undecided"
    assert "%" not in found.text.split(":")[1]


def test_one_seed_says_so():
    found = agreement([2.0], [1.0], higher_is_better=False, margin=0.01)
    assert (found.name, found.p, found.interval) == ("one seed", None, None)
    assert found.text.startswith("+100.00% of FP32 with one seed")
