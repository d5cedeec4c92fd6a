"""Optimizers that keep moments compactly, or no masters: over weights of rows that fill blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mpcore.stores import WEIGHT_SITE, key_of, offsets_in_memory, random_bits
from mpcore.stores.blocks import encode_blocks
from mpcore.stores.rounding import round_randomly
from torch import Tensor, nn

from mpcore_testing.engines import Engine
from mpcore_testing.stored import BUILDS, SCALE, Stored

#: The engines that step compact moments.
COMPACT = [Engine("reference", "fused"), Engine("compiled", "fused")]
ENGINES = pytest.mark.parametrize("engine", COMPACT, ids=str)

ADAMW = BUILDS["AdamW"]


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """Returns weights in rows of several blocks, short ones, a transposed and two float32 ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 300), (7,), (300, 4), (3, 256), (65,)]
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    params[2] = nn.Parameter(params[2].detach().t())
    for index in (3, 4):
        params[index] = nn.Parameter(params[index].detach().float())
    return params


def compact(engine: Engine, build: Any = ADAMW, **options: Any) -> Stored:
    """Returns an optimizer over `weights`; options are those of `Engine.wrap`, and `dtype`."""
    params = weights(options.pop("dtype", torch.bfloat16))
    return Stored(engine.wrap(build(params), options.pop("loss_scale", SCALE), **options), params)


def load(one: Stored, saved: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Loads a state and weights."""
    one.optimizer.load_state_dict(copy.deepcopy(saved))
    with torch.no_grad():
        for mine, theirs in zip(one.params, params, strict=True):
            mine.copy_(theirs)


def expected_of(value: Tensor, held: Tensor, key: int, t: Tensor, site: int) -> list[Tensor]:
    """Returns how a float32 number is kept after a step, as a tensor and its scales.

    Args:
        value: What the step has made of it in float32.
        held: As it lies, for its dtype and strides.
        key: Of its parameter.
        t: The step count.
        site: Which rounding.
    """
    like = torch.empty_like(held, dtype=torch.float32).copy_(value)
    bits = random_bits(key, t, offsets_in_memory(like), site)
    if held.dtype == torch.bfloat16:
        return [round_randomly(like, bits)]
    return list(encode_blocks(like, held.dtype, bits))


def assert_rounded_from(ours: Stored, plain: Stored, moments: tuple[str, ...], seed: int) -> None:
    """Fails unless moments, and weights without masters, are those of float32, rounded at random.

    Args:
        ours: Has taken a step.
        plain: The same step, from the same state in float32.
        moments: Names of these, in order.
        seed: Of ours.
    """
    for number, (mine, theirs) in enumerate(zip(ours.params, plain.params, strict=True)):
        state, wanted = ours.optimizer.state[mine], plain.optimizer.float32_state(theirs)
        key = key_of(seed, number)
        for site, name in enumerate(moments):
            lying = [state[name], *([state[f"{name}_scales"]] if f"{name}_scales" in state else [])]
            rounded = expected_of(wanted[name], state[name], key, state["step"], site)
            assert len(lying) == len(rounded)
            assert all(map(torch.equal, lying, rounded)), (number, name)
        if ours.optimizer.masters == "none" and mine.dtype == torch.bfloat16:
            (rounded,) = expected_of(wanted["master"], mine, key, state["step"], WEIGHT_SITE)
            assert torch.equal(mine.detach(), rounded), number
        else:
            value = ours.optimizer.float32_state(mine).get("master", mine)
            assert torch.equal(value, wanted.get("master", theirs)), number
