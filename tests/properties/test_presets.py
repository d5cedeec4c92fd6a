"""Presets beside the rules of the systems they are named after, written from their sources."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore import DynamicLossScale
from mpcore.loss_scale import initial_state, next_state
from mpcore.loss_scale.tensors import LossScaleTensors

#: steps are overflows or not; the scale after each of them
Rule = Callable[[list[bool], int], Iterator[float]]


def torch_rule(history: list[bool], window: int) -> Iterator[float]:
    scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    for bad in history:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), 2.0, 0.5, window)
        yield scale.item()


def keras_2(history: list[bool], window: int) -> Iterator[float]:
    scale, good = 2.0**15, 0
    for bad in history:
        if bad:
            good, scale = 0, max(scale / 2, 1)
        elif good + 1 >= window:
            good, scale = 0, scale * 2
        else:
            good += 1
        yield scale


def keras_3(history: list[bool], window: int) -> Iterator[float]:
    scale, counter = 2.0**15, 0
    for bad in history:
        if bad:
            counter, scale = 0, scale * 0.5
        elif counter == window - 1:
            counter, scale = 0, scale * 2
        else:
            counter += 1
        yield scale


def jmp(history: list[bool], window: int) -> Iterator[float]:
    scale, counter = 2.0**15, 0
    for bad in history:
        if bad:
            scale, counter = max(1.0, scale / 2), 0
        else:
            scale = scale * 2 if counter == window - 1 else scale
            counter = (counter + 1) % window
        yield scale


def flax_as_documented(history: list[bool], window: int) -> Iterator[float]:
    """Its code compares before it counts and grows one step later."""
    scale, steps = 2.0**16, 0
    for bad in history:
        steps = 0 if bad else steps + 1
        if bad:
            scale = max(scale * 0.5, 2.0**-126)
        elif steps == window:
            scale, steps = scale * 2, 0
        yield scale


def apex(history: list[bool], window: int) -> Iterator[float]:
    scale, unskipped = 2.0**16, 0
    for bad in history:
        unskipped = 0 if bad else unskipped + 1
        scale = scale / 2 if bad else scale
        if unskipped == window:
            scale, unskipped = min(2.0**24, scale * 2), 0
        yield scale


def megatron(history: list[bool], window: int) -> Iterator[float]:
    scale, growth, hysteresis = 2.0**32, 0, 2
    for bad in history:
        if bad:
            growth, hysteresis = 0, hysteresis - 1
            if hysteresis <= 0:
                scale = max(scale * 0.5, 1.0)
        else:
            growth += 1
            if growth == window:
                growth, hysteresis, scale = 0, 2, scale * 2
        yield scale


def deepspeed_as_documented(consecutive: bool) -> Rule:
    """Its code grows one step later after the start and after an overflow, and raises at 1."""

    def rule(history: list[bool], window: int) -> Iterator[float]:
        scale, hysteresis, last_overflow = 2.0**16, 2, -1
        for now, bad in enumerate(history):
            if bad:
                if hysteresis == 1:
                    scale = max(scale / 2, 1)
                else:
                    hysteresis -= 1
                last_overflow = now
            else:
                if consecutive:
                    hysteresis = 2
                if (now - last_overflow) % window == 0:
                    hysteresis, scale = 2, scale * 2
            yield scale

    return rule


def fairseq(tolerance: float) -> Rule:
    """Its code forgets overflows only when it backs off, and counts them on after it has grown."""

    def rule(history: list[bool], window: int) -> Iterator[float]:
        scale, last_overflow, last_rescale, overflows = 2.0**7, -1, -1, 0
        for now, bad in enumerate(history):
            if bad:
                last_overflow, overflows = now, overflows + 1
                if overflows / (now - last_rescale) >= tolerance:
                    scale, last_rescale, overflows = max(scale / 2, 2.0**-13), now, 0
            elif (now - last_overflow) % window == 0:
                scale, last_rescale, overflows = scale * 2, now, 0
            yield scale

    return rule


def paddle(every: int) -> Rule:
    def rule(history: list[bool], window: int) -> Iterator[float]:
        scale, good, bad_steps = 2.0**16, 0, 0
        for bad in history:
            if bad:
                good, bad_steps = 0, bad_steps + 1
                if bad_steps == every:
                    scale, bad_steps = scale * 0.5, 0
            else:
                bad_steps, good = 0, good + 1
                if good == window:
                    scale, good = scale * 2, 0
            yield scale

    return rule


CASES: dict[str, tuple[DynamicLossScale, Rule]] = {
    "torch": (DynamicLossScale.torch(), torch_rule),
    "keras2": (DynamicLossScale.keras2(), keras_2),
    "keras3": (DynamicLossScale.keras3(), keras_3),
    "jmp": (DynamicLossScale.jmp(), jmp),
    "flax": (DynamicLossScale.flax(), flax_as_documented),
    "apex": (DynamicLossScale.apex(), apex),
    "megatron": (DynamicLossScale.megatron(), megatron),
    "deepspeed": (DynamicLossScale.deepspeed(), deepspeed_as_documented(False)),
    "consecutive": (DynamicLossScale.deepspeed(consecutive=True), deepspeed_as_documented(True)),
    "fairseq": (DynamicLossScale.fairseq(), fairseq(0.0)),
    "fairseq 0.05": (DynamicLossScale.fairseq(tolerance=0.05), fairseq(0.05)),
    "fairseq 0.3": (DynamicLossScale.fairseq(tolerance=0.3), fairseq(0.3)),
    "paddle": (DynamicLossScale.paddle(), paddle(1)),
    "paddle 3": (DynamicLossScale.paddle(decr_every_n=3), paddle(3)),
}


def specified(scale: DynamicLossScale, history: list[bool]) -> list[float]:
    state, seen = initial_state(scale), []
    for bad in history:
        state = next_state(scale, state, found_inf=bad)
        seen.append(state.scale)
    return seen


def on_tensors(scale: DynamicLossScale, history: list[bool]) -> list[float]:
    tensors = LossScaleTensors.from_state(initial_state(scale), torch.device("cpu"))
    seen = []
    for bad in history:
        scale.advance_(tensors, torch.tensor(int(bad), dtype=torch.int32))
        seen.append(tensors.scale.item())
    return seen


@pytest.mark.parametrize("follow", [specified, on_tensors])
@pytest.mark.parametrize("name", CASES)
@given(history=st.lists(st.booleans(), max_size=60), window=st.integers(1, 6))
def test_a_preset_moves_as_its_system(
    follow: Any, name: str, history: list[bool], window: int
) -> None:
    preset, rule = CASES[name]
    preset = dataclasses.replace(preset, growth_interval=window)
    assert follow(preset, history) == list(rule(history, window))


@pytest.mark.parametrize("name", CASES)
def test_a_preset_has_the_window_of_its_system(name: str) -> None:
    windows = {"megatron": 1000, "deepspeed": 1000, "consecutive": 1000, "fairseq": 2**14}
    preset, rule = CASES[name]
    window = windows.get(name.split()[0], 2000)
    history = [False] * (2 * window + 1)
    assert specified(preset, history) == list(rule(history, window))
    assert specified(preset, history)[window - 2 : window] == [preset.init, 2 * preset.init]


@pytest.mark.parametrize("name", CASES)
def test_no_preset_reaches_zero_or_infinity(name: str) -> None:
    preset = dataclasses.replace(CASES[name][0], growth_interval=1)
    for history in ([True] * 1000, [False] * 300):
        end = on_tensors(preset, history)[-1]
        assert math.frexp(end)[0] == 0.5
        assert preset.min_scale <= end <= preset.max_scale
        assert math.isfinite(torch.tensor(end).reciprocal().item())


# init 16, window 4, hysteresis 2; "x" overflows, "." is clean; the scale after each step
TABLE = [
    ("growth", "x.x.x.x.x", [16, 16, 8, 8, 4, 4, 2, 2, 1]),
    ("growth", "xxxxxxxx", [16, 8, 4, 2, 1, 1, 1, 1]),
    ("clean", "x.x.x.x.x", [16] * 9),
    ("clean", "xxxxxxxx", [16, 8, 4, 2, 1, 1, 1, 1]),
    ("clean_or_backoff", "x.x.x.x.x", [16] * 9),
    ("clean_or_backoff", "xxxxxxxx", [16, 8, 8, 4, 4, 2, 2, 1]),
    ("clean_or_backoff", "xx.x.xx..", [16, 8, 8, 8, 8, 8, 4, 4, 4]),
]


@pytest.mark.parametrize("follow", [specified, on_tensors])
@pytest.mark.parametrize(("refill", "history", "expected"), TABLE)
def test_the_three_kinds_of_hysteresis(
    follow: Any, refill: str, history: str, expected: list[int]
) -> None:
    scale = DynamicLossScale(16.0, growth_interval=4, hysteresis=2, refill=refill)
    assert follow(scale, [step == "x" for step in history]) == expected


def test_an_unknown_refill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"refill: expected one of 'growth', .*got 'never'"):
        DynamicLossScale(refill="never")


def test_the_trajectories_of_the_page_are_those_of_presets_and_originals() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "loss-scaling.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| preset | `."))
    history = [step == "x" for step in lines[start].split("`")[1]]
    shown = {}
    for line in itertools.takewhile(lambda text: text.startswith("|"), lines[start + 2 :]):
        names, course = (cell.strip() for cell in line.strip("|").split("|"))
        shown |= {name: list(map(int, course.split())) for name in names.split(", ")}
    assert set(shown) == {name for name in CASES if not name.startswith("fairseq ")}
    for name, expected in shown.items():
        preset, rule = CASES[name]
        preset = dataclasses.replace(preset, growth_interval=4)
        for scales in (specified(preset, history), list(rule(history, 4))):
            assert [math.log2(scale / preset.init) for scale in scales] == expected
