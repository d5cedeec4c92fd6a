"""One step of which some param groups are fused and others stepped by their own optimizer.

The oracles are the two paths as they are alone: a twin whose groups are all fused, and one whose
groups are all on the general path, with the same gradients. Norm, skips and scale are those of all
groups everywhere, and the optimizers here are element-wise, so that each group has to have the bits
of the twin on its path.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext as nothing
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import bits
from mpcore_testing.mixed_twins import BUILD, FUSED, GENERAL, Twins, backward, loss_of, params


@pytest.fixture(params=["cpu", "compiled"])
def twins(request: pytest.FixtureRequest) -> Twins:
    return Twins("adamw", request.param)


@pytest.mark.parametrize("backend", ["cpu", "compiled"])
@pytest.mark.parametrize("name", BUILD)
def test_each_group_trains_with_the_bits_of_its_path_through_overflows_of_either(
    name: str, backend: str
) -> None:
    twins = Twins(name, backend)
    for step, bad in enumerate([None, GENERAL, None, FUSED, None, None, None]):
        twins.pass_(step, bad)
        twins.each(lambda optimizer: optimizer.step())
        assert all(twins.each(lambda o: o.last_step.skipped == (bad is not None)))  # noqa: B023
        assert twins.mixed.last_step.overflowed() == twins.alone[0].last_step.overflowed()
        twins.each(lambda optimizer: optimizer.zero_grad())
        twins.check()
    assert twins.mixed.skipped_steps == 2


def test_one_norm_of_all_groups_clips_both(twins: Twins) -> None:
    for step, bad in enumerate([None, None, GENERAL, None]):
        twins.pass_(step, bad)
        norms = twins.each(lambda optimizer: optimizer.clip_grad_norm_(0.5))
        assert len({float(norm) for norm in norms}) == 1
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
        twins.check()
    assert twins.mixed.last_step.grad_norm == float(norms[0]) > 0.5


def test_what_unscale_shows_and_somebody_edits_reaches_both(twins: Twins) -> None:
    for step in range(3):
        twins.pass_(step)
        twins.each(lambda optimizer: optimizer.unscale_())
        for optimizer in twins.all:
            for number in (FUSED, GENERAL):
                params(optimizer, number)[1].grad.mul_(3.0)  # type: ignore[union-attr]
        twins.each(lambda optimizer: optimizer.clip_grad_norm_(2.0))
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
        twins.check()


def test_sums_of_several_passes_are_clipped_and_stepped_with(twins: Twins) -> None:
    for step in range(3):
        for part in range(2):
            twins.pass_(10 * step + part, GENERAL if (step, part) == (1, 0) else None)
            twins.each(lambda optimizer: optimizer.accumulate())
        twins.each(lambda optimizer: optimizer.clip_grad_norm_(0.7))
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
        twins.check()
    assert twins.mixed.skipped_steps == 1


def test_a_closure_is_evaluated_once_before_both(twins: Twins) -> None:
    for step in range(3):
        calls = []

        def step_of(optimizer: mpcore.MixedPrecisionOptimizer) -> Tensor:
            def closure() -> Tensor:
                calls.append(optimizer)  # noqa: B023
                optimizer.zero_grad()
                backward(optimizer, step, FUSED if step == 1 else None)  # noqa: B023
                return loss_of(optimizer, step).detach()  # noqa: B023

            return optimizer.step(closure)  # type: ignore[no-any-return]

        losses = twins.each(step_of)
        assert [calls.count(optimizer) for optimizer in twins.all] == [1, 1, 1]
        assert torch.equal(losses[0], losses[2]) or step  # weights are the same before any step
        twins.check()
    assert twins.mixed.skipped_steps == 1


@pytest.mark.parametrize("make", [torch.amp.GradScaler, mpcore.GradScaler])
@pytest.mark.parametrize("unscales", [False, True])
def test_an_outside_scaler_drives_both(make: Any, unscales: bool) -> None:
    twins = Twins("adamw", scale=mpcore.NoLossScale())
    scalers = [make("cpu", init_scale=3.0 if make is torch.amp.GradScaler else 4.0) for _ in "123"]
    for step, bad in enumerate([None, GENERAL, None, FUSED, None]):
        for scaler, optimizer in zip(scalers, twins.all, strict=True):
            scaler.scale(loss_of(optimizer, step)).backward()
            if bad is not None:
                params(optimizer, bad)[0].grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
            if unscales and make is mpcore.GradScaler:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params(optimizer), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        twins.check()
    assert twins.mixed.skipped_steps == 2


@pytest.mark.parametrize("bad", [FUSED, GENERAL])
def test_what_overflows_as_it_is_unscaled_skips_both(twins: Twins, bad: int) -> None:
    twins = Twins("adamw", scale=mpcore.StaticLossScale(2.0**-100))
    for optimizer in twins.all:
        backward(optimizer, 0)
        grad = params(optimizer, bad)[2].grad  # float32
        assert grad is not None
        grad.fill_(1e20)
        optimizer.step()
        assert optimizer.last_step.overflowed() == [f"group {bad}, parameter 2, [4, 3]"]  # type: ignore[union-attr]
    assert twins.mixed.skipped_steps == 1


@pytest.mark.parametrize("rule", ["adopt", "always"])
def test_weights_that_somebody_wrote_to_become_masters_in_both(rule: str) -> None:
    twins = Twins("adamw", on_weight_edit=rule)
    for step in range(4):
        twins.pass_(step)
        if step == 2:
            for optimizer in twins.all:
                with torch.no_grad():
                    for number in (FUSED, GENERAL):
                        params(optimizer, number)[0].mul_(0.5)
                        params(optimizer, number)[4].data[0] = 2.0  # seen by "always" alone
        told = pytest.warns(UserWarning, match="written to by others") if step == 2 else nothing()
        with told:
            twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
    twins.check()


@pytest.mark.parametrize("without", [FUSED, GENERAL])
def test_a_step_in_which_only_one_of_the_paths_has_gradients(twins: Twins, without: int) -> None:
    for step in range(4):
        twins.pass_(step, without=(without,) if step in (0, 2) else ())
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
        if step:
            twins.check()
    twins.each(lambda optimizer: optimizer.step())  # without any


def test_gradients_that_nobody_clears_are_added_to(twins: Twins) -> None:
    for step, bad in enumerate([None, None, FUSED]):
        twins.pass_(step, bad)
        twins.each(lambda optimizer: optimizer.step())
        twins.check()


@pytest.mark.parametrize("name", BUILD)
def test_a_group_may_change_its_path_between_steps_and_after_a_clip(name: str) -> None:
    """The general twin, on either path, is what its values are compared with, within roundings."""
    twins = Twins(name)
    for step in range(6):
        twins.pass_(step)
        twins.each(lambda optimizer: optimizer.clip_grad_norm_(1.0))
        asked = None if step in (2, 3) else True
        twins.mixed.param_groups[GENERAL]["foreach"] = asked
        paths = [path.path for path in twins.mixed.path]
        assert paths == ["fused", "fused" if asked is None else "general"]
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
        for number, twin in enumerate(twins.alone):
            pairs = zip(params(twins.mixed, number), params(twin, number), strict=True)
            for mine, theirs in pairs:
                own, other = twins.mixed.state[mine], twin.state[theirs]
                left, right = own.get("master", mine), other.get("master", theirs)
                if number == FUSED:
                    assert torch.equal(bits(left), bits(right))
                else:  # six steps of about a dozen roundings each
                    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
                    assert asked is None or {*own} == {*other}


def test_all_groups_may_leave_the_fused_path_and_return(twins: Twins) -> None:
    for step in range(6):
        twins.mixed.param_groups[FUSED]["foreach"] = True if step in (2, 3) else None
        twins.pass_(step)
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
        pairs = params(twins.mixed, GENERAL), params(twins.alone[GENERAL], GENERAL)
        general = zip(*pairs, strict=True)
        assert all(torch.equal(bits(mine), bits(theirs)) for mine, theirs in general)
    fused = zip(params(twins.mixed, FUSED), params(twins.alone[FUSED], FUSED), strict=True)
    for mine, theirs in fused:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("way", ["state_dict", "copy"])
def test_a_checkpoint_and_a_copy_go_on_with_the_same_bits(twins: Twins, way: str) -> None:
    for step in range(3):
        twins.pass_(step)
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
    if way == "copy":
        other = copy.deepcopy(twins.mixed)
    else:
        other = Twins("adamw", twins.mixed.backend).mixed
        with torch.no_grad():
            for new, old in zip(params(other), params(twins.mixed), strict=True):
                new.copy_(old)
        other.load_state_dict(twins.mixed.state_dict())
    assert other.path == twins.mixed.path
    twins.mixed = other
    twins.all = (other, *twins.alone)
    for step in range(3, 6):
        twins.pass_(step)
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
        twins.check()


def test_state_that_a_step_over_zeros_makes_is_used_by_both(twins: Twins) -> None:
    for optimizer in twins.all:
        for param in params(optimizer):
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()
    for step in range(2):
        twins.pass_(step)
        twins.each(lambda optimizer: optimizer.step())
        twins.each(lambda optimizer: optimizer.zero_grad())
    twins.check()


def test_general_groups_alone_are_stepped_and_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a general group costs, the others do not pay: neither copies nor casts of theirs."""
    twins = Twins("adamw", "compiled")
    backend = twins.mixed._paths.general._backend
    seen: dict[str, list[Tensor]] = {"cast_into": [], "unscale_into": []}
    for name, found in seen.items():
        whole = getattr(backend, name)

        def spy(first: Any, second: Any, *rest: Any, whole: Any = whole, found: Any = found) -> Any:
            found += second
            return whole(first, second, *rest)

        monkeypatch.setattr(backend, name, spy)
    backward(twins.mixed, 0)
    twins.mixed.step()
    halves = [p for p in params(twins.mixed, GENERAL) if p.dtype != torch.float32]
    assert list(map(id, seen["cast_into"])) == list(map(id, halves))
    assert len(seen["unscale_into"]) == len(halves)
