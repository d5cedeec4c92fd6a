"""A parameter that several optimizers step has one master, as a float32 parameter is one tensor."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.lengths import short_and_long
from mpcore_testing.snapshots import snapshot

SCALE = mpcore.StaticLossScale(2.0**6)


class Pair:
    """An encoder that two optimizers train in turn, each with a head of its own."""

    def __init__(self, engines: tuple[Engine, Engine], cast: bool = False) -> None:
        torch.manual_seed(0)
        self.shared = nn.Parameter(torch.randn(4, 3).half())
        self.heads = [nn.Parameter(torch.randn(3).half()) for _ in range(2)]
        self.optimizers = [
            engine.wrap(torch.optim.Adam([self.shared, head], lr=1e-4), SCALE)
            for engine, head in zip(engines, self.heads, strict=True)
        ]

    def step(self, which: int, seed: int) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer, head = self.optimizers[which], self.heads[which]
        optimizer.zero_grad()
        out = (x.unsqueeze(-1) * self.shared.float()).sum(1) * head.float()
        optimizer.backward(out.square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def turns(self, *seeds: int) -> None:
        for seed in seeds:
            self.step(seed % 2, seed)

    def masters(self) -> list[Tensor]:
        return [optimizer.state[self.shared]["master"] for optimizer in self.optimizers]

    def expect_one(self) -> None:
        first, second = self.masters()
        assert first is second


@pytest.fixture
def pair(engine: Engine) -> Pair:
    return Pair((engine, engine))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", short_and_long(300, 1000))
def test_updates_in_turn_are_those_of_one_float32_tensor(
    engine: Engine, dtype: torch.dtype, steps: int
) -> None:
    """Each below half a last place of the weight."""
    start = torch.tensor([1.0, -0.75, 1.5])
    param, plain = nn.Parameter(start.to(dtype)), nn.Parameter(start.clone())
    rates = (2.0**-13 + 2.0**-20, 2.0**-14)
    ours = [engine.wrap(torch.optim.SGD([param], lr=lr), SCALE) for lr in rates]
    theirs = [torch.optim.SGD([plain], lr=lr) for lr in rates]
    slope = torch.tensor([1.0, 0.5, -1.0])
    for step in range(steps):
        optimizer, other = ours[step % 2], theirs[step % 2]
        optimizer.backward((param.float() * slope).sum())
        optimizer.step()
        optimizer.zero_grad()
        plain.grad = slope.clone()
        other.step()
    for optimizer in ours:
        assert torch.equal(optimizer.state[param]["master"], plain.detach())
        assert torch.equal(optimizer.state_dict()["state"][0]["master"], plain.detach())
        assert optimizer.check_masters() == []
    assert torch.equal(param.detach(), plain.detach().to(dtype))


@pytest.mark.parametrize("other", ENGINES, ids=str)
def test_optimizers_of_any_two_engines_share(engine: Engine, other: Engine) -> None:
    mixed, plain = Pair((engine, other)), Pair((engine, other))
    mixed.turns(0, 1, 2, 3)
    mixed.expect_one()
    plain.turns(0, 1, 2, 3)
    assert same_bits(mixed.masters()[0].detach(), plain.masters()[0].detach())
    rounded = mixed.masters()[0].detach().half()
    assert torch.equal(mixed.shared.detach(), rounded)


def test_steps_of_the_other_one_are_neither_compared_nor_warned_of(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.turns(0, 1, 2, 3)
    asked: list[int] = []
    for optimizer in pair.optimizers:
        adopt = optimizer._edits._adopt_on
        monkeypatch.setattr(
            optimizer._edits, "_adopt_on", lambda *a, f=adopt: (asked.append(1), f(*a))
        )
    pair.turns(4, 5, 6, 7)
    assert asked == []
    with torch.no_grad():
        pair.shared[0] = 3.0
    with pytest.warns(UserWarning, match="^3 elements of group 0, parameter 0"):
        pair.step(1, 8)
    pair.step(0, 9)
    assert asked == [1]
    pair.expect_one()


def test_an_optimizer_that_comes_later_goes_on_from_the_master(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3).half())
    first = engine.wrap(torch.optim.SGD([param], lr=2.0**-14), SCALE)
    for _ in range(3):
        first.backward(param.float().sum())
        first.step()
        first.zero_grad()
    assert param.tolist() == [1.0] * 3
    second = engine.wrap(torch.optim.SGD([param], lr=2.0**-14), SCALE)
    second.backward(param.float().sum())
    second.step()
    assert second.state[param]["master"].tolist() == [1.0 - 4 * 2.0**-14] * 3


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_later_one_sees_what_was_written_through_data_meanwhile(
    engine: Engine, earlier: int
) -> None:
    param = nn.Parameter(torch.ones(3).half())
    before = [engine.wrap(torch.optim.SGD([param], lr=0.5), SCALE) for _ in range(earlier)]
    for optimizer in before:
        optimizer.backward(param.float().sum())
        optimizer.step()
        optimizer.zero_grad()
    param.data[1] = 7.0
    later = engine.wrap(torch.optim.SGD([param], lr=0.5), SCALE)
    later.backward(param.float().sum())
    with pytest.warns(UserWarning, match="^1 elements of"):
        later.step()
    end = 0.5 - 0.5 * earlier
    assert later.state[param]["master"].tolist() == [end, 6.5, end]


def test_a_weight_of_another_shape_has_another_master(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3).half())
    first = engine.wrap(torch.optim.SGD([param], lr=0.5), SCALE)
    first.backward(param.float().sum())
    first.step()
    first.zero_grad()
    param.data = torch.full((5,), 2.0).half()
    second = engine.wrap(torch.optim.SGD([param], lr=0.5), SCALE)
    second.backward(param.float().sum())
    second.step()
    assert second.state[param]["master"].tolist() == [1.5] * 5


def test_numbers_that_are_not_finite_are_refused_by_both(pair: Pair) -> None:
    pair.turns(0, 1)
    with torch.no_grad():
        pair.shared[0, 0] = torch.nan
    for which in (0, 1, 0):
        with pytest.raises(mpcore.StageError, match="expected finite numbers"):
            pair.step(which, 2)
        pair.optimizers[which].zero_grad()
    with torch.no_grad():
        pair.shared[0, 0] = 1.0
    with pytest.warns(UserWarning, match="^1 elements of"):
        pair.turns(2)
    pair.turns(3)
    pair.expect_one()


def test_a_master_lives_as_long_as_an_optimizer_that_holds_it(engine: Engine) -> None:
    pair = Pair((engine, engine))
    pair.turns(0, 1)
    master = weakref.ref(pair.masters()[0])
    exact = pair.masters()[0].detach().clone()
    del pair.optimizers[0]
    gc.collect()
    assert torch.equal(pair.optimizers[0].state[pair.shared]["master"], exact)
    pair.optimizers.clear()
    gc.collect()
    assert master() is None
    fresh = engine.wrap(torch.optim.SGD([pair.shared], lr=0.0), SCALE)
    fresh.backward(pair.shared.float().sum())
    fresh.step()
    assert torch.equal(fresh.state[pair.shared]["master"], pair.shared.float())


# ------------------------------------------------------------------ saved, loaded, copied


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_states_are_loaded_in_any_order_and_go_on_with_the_same_bits(
    engine: Engine, order: tuple[int, int]
) -> None:
    source, target = Pair((engine, engine)), Pair((engine, engine))
    source.turns(0, 1, 2, 3)
    target.turns(5, 6)
    for again in range(2):  # over what was loaded before, too
        saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in source.optimizers]
        with torch.no_grad():
            for one, other in (
                (target.shared, source.shared),
                *zip(target.heads, source.heads, strict=True),
            ):
                one.copy_(other)
        for which in order:
            target.optimizers[which].load_state_dict(saved[which])
        target.expect_one()
        if again == 0:
            source.turns(4)
    for one in (source, target):
        one.turns(7, 8, 9)
    for ours, theirs in zip(target.optimizers, source.optimizers, strict=True):
        assert same_bits(snapshot(ours), snapshot(theirs))
    target.expect_one()


@pytest.mark.parametrize("trained", [False, True])
def test_two_states_with_masters_that_differ_are_refused(engine: Engine, trained: bool) -> None:
    source, target = Pair((engine, engine)), Pair((engine, engine))
    source.turns(0, 1)
    early = copy.deepcopy(source.optimizers[0].state_dict())
    source.turns(2, 3)
    late = source.optimizers[1].state_dict()
    if trained:
        target.turns(0, 1)
    target.optimizers[0].load_state_dict(early)
    before = snapshot(target.optimizers[1])
    with pytest.raises(mpcore.ArgumentError, match=r"^group 0, parameter 0, .*: expected the mast"):
        target.optimizers[1].load_state_dict(late)
    assert same_bits(snapshot(target.optimizers[1]), before)
    held = target.optimizers[0].state[target.shared]["master"].detach()
    assert same_bits(held, early["state"][0]["master"])


def test_a_state_loaded_without_its_weight_is_noticed_by_both(pair: Pair, engine: Engine) -> None:
    source = Pair((engine, engine))
    source.turns(0, 1, 3, 5)
    pair.turns(0, 1)
    pair.optimizers[0].load_state_dict(source.optimizers[0].state_dict())
    for which in (0, 1):
        with pytest.raises(mpcore.StageError, match="was loaded without the model's"):
            pair.step(which, 3)
        pair.optimizers[which].zero_grad()
    with torch.no_grad():
        pair.shared.copy_(source.shared)
        pair.heads[0].copy_(source.heads[0])
    pair.turns(2, 3)
    pair.expect_one()


def test_originals_that_differ_are_refused(engine: Engine) -> None:
    pair = Pair((engine, engine))
    original = pair.shared.detach().float() + 2.0**-20
    pair.optimizers[0].adopt_masters([(pair.shared, original)])
    with pytest.raises(mpcore.ArgumentError, match="got a different one"):
        pair.optimizers[1].adopt_masters([(pair.shared, original + 2.0**-18)])
    pair.optimizers[1].adopt_masters([(pair.shared, original.clone())])
    pair.expect_one()
    pair.turns(0, 1)
    pair.expect_one()


def test_a_master_put_into_one_state_is_that_of_both(pair: Pair) -> None:
    pair.turns(0, 1)
    new = pair.masters()[0].detach() + 2.0**-16
    moments = pair.optimizers[0].inner.state[pair.masters()[0]]["exp_avg"]
    pair.optimizers[0].state[pair.shared]["master"] = new.clone()
    pair.optimizers[0].state_dict()
    pair.expect_one()
    assert torch.equal(pair.masters()[1], new)
    assert pair.optimizers[0].inner.state[pair.masters()[0]]["exp_avg"] is moments
    pair.turns(2, 3)
    pair.expect_one()


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_copies_share_among_themselves(pair: Pair, duplicate: Any) -> None:
    pair.turns(0, 1)
    other = duplicate(pair)
    for one in (pair, other):
        one.turns(2, 3, 4, 5)
        one.expect_one()
    assert pair.masters()[0] is not other.masters()[0]
    for ours, theirs in zip(other.optimizers, pair.optimizers, strict=True):
        assert same_bits(snapshot(ours), snapshot(theirs))
    del other.optimizers[0], pair.optimizers[0]
    gc.collect()
    for one in (pair, other):  # the second one holds the master, too: a third one shares it
        (rest,), param = one.optimizers, one.shared
        third = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5), SCALE)
        third.backward(param.float().sum())
        third.step()
        assert third.state[param]["master"] is rest.state[param]["master"]


def test_a_parameter_with_a_master_is_saved_as_any_other(pair: Pair) -> None:
    pair.turns(0, 1)
    file = io.BytesIO()
    torch.save([pair.shared], file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=True)
    assert torch.equal(loaded, pair.shared)
    optimizer = pair.optimizers[0]
    again = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([loaded], lr=0.0), SCALE)
    again.backward(loaded.float().sum())
    again.step()
    assert torch.equal(again.state[loaded]["master"], loaded.float())
    assert optimizer.check_masters() == []
