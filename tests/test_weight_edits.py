"""Weights that somebody else writes to between steps: `step` adopts what changed, no more."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import mpcore
import mpcore.migration
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine, engine_cases
from mpcore_testing.snapshots import snapshot

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
ADOPTED = "elements of .* were written to by others"
INNERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


class Training:
    """A float16 layer, a bfloat16 one, and a float32 norm; masters have digits of their own."""

    def __init__(self, engine: Engine, rule: str = "adopt", inner: str = "AdamW") -> None:
        torch.manual_seed(0)
        self.low, self.brain, self.norm = nn.Linear(4, 3), nn.Linear(3, 2), nn.LayerNorm(3)
        self.model = nn.ModuleDict({"low": self.low, "brain": self.brain, "norm": self.norm})
        optimizer = INNERS[inner](self.model.named_parameters())
        self.optimizer = engine.wrap(optimizer, mpcore.DynamicLossScale(2.0**6), rule)
        mpcore.cast_model(self.low, HALF, None)
        originals = [(p, p.detach().float() * (1 + 2.0**-14)) for p in self.low.parameters()]
        mpcore.cast_model(self.brain, BRAIN, None)
        originals += [(p, p.detach().float() * (1 + 2.0**-11)) for p in self.brain.parameters()]
        self.optimizer.adopt_masters(originals)

    def loss(self, seed: int, factor: float = 1.0) -> Tensor:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        hidden = (x.half().unsqueeze(-2) * self.low.weight).sum(-1) + self.low.bias
        hidden = self.norm(hidden.float()).bfloat16()
        out = (hidden.unsqueeze(-2) * self.brain.weight).sum(-1) + self.brain.bias
        return out.float().square().mean() * factor

    def backward(self, seed: int, factor: float = 1.0) -> None:
        self.optimizer.backward(self.loss(seed, factor))

    def step(self, *seeds: int) -> None:
        for seed in seeds:
            self.backward(seed)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def halves(self) -> list[Tensor]:
        return [*self.low.parameters(), *self.brain.parameters()]

    def masters(self) -> list[Tensor]:
        return [self.optimizer.state[param]["master"] for param in self.halves()]


def expected_masters(training: Training) -> list[Tensor]:
    """What masters have to be once the weights of now are adopted; no code of mpcore."""
    found = []
    for param, master in zip(training.halves(), training.masters(), strict=True):
        weight = param.detach()
        same = master.to(weight.dtype).view(torch.int16) == weight.view(torch.int16)
        found.append(torch.where(same, master, weight.float()).detach().clone())
    return found


def equal_after_adoption(training: Training, *, factor: float = 0.0) -> None:
    """A step whose gradients overflow changes nothing, so that what was adopted can be seen."""
    expected = expected_masters(training)
    weights = [param.detach().clone() for param in training.halves()]
    training.optimizer.backward(training.loss(9, torch.inf))
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    assert training.optimizer.last_step is not None
    assert training.optimizer.last_step.skipped
    assert same_bits([m.detach() for m in training.masters()], expected)
    assert same_bits([param.detach() for param in training.halves()], weights)
    training.optimizer.zero_grad()


@torch.no_grad()
def one_row(training: Training) -> None:
    training.low.weight[1].copy_(torch.randn(4))


@torch.no_grad()
def whole_model(training: Training) -> None:
    other = {name: torch.randn_like(value) for name, value in training.model.state_dict().items()}
    training.model.load_state_dict(other)


@torch.no_grad()
def some_clipped(training: Training) -> None:
    for param in training.halves():
        param.clamp_(-0.2, 0.2)


@torch.no_grad()
def pruned(training: Training) -> None:
    for param in training.halves():
        param.mul_(torch.rand(param.shape) < 0.5)


EDITS: dict[str, Callable[[Training], None]] = {
    f.__name__: f for f in (one_row, whole_model, some_clipped, pruned)
}


# ------------------------------------------------------------------ what is adopted


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_was_written_becomes_the_master_and_all_else_keeps_its_digits(
    engine: Engine, edit: str, steps: int
) -> None:
    training = Training(engine)
    training.step(*range(steps))
    EDITS[edit](training)
    equal_after_adoption(training)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("inner", "engine"), engine_cases(INNERS))
def test_steps_go_on_from_it_as_those_of_an_optimizer_with_such_masters(
    engine: Engine, inner: str, edit: str
) -> None:
    """The other one gets masters that nobody of us has compared, by its state."""
    training, twin = Training(engine, inner=inner), Training(engine, inner=inner)
    for one in (training, twin):
        one.step(1, 2)
        torch.manual_seed(1)
        EDITS[edit](one)
    state = copy.deepcopy(twin.optimizer.state_dict())
    for number, master in enumerate(expected_masters(twin)):
        state["state"][number]["master"] = master
    twin.optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.step(3, 4)
    twin.step(3, 4)
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))
    assert training.optimizer.check_masters() == []


@pytest.mark.parametrize("place", ["before", "scaled", "backward", "clip", "unscale", "accumulate"])
def test_it_does_not_matter_where_between_two_steps_it_is_written(
    engine: Engine, place: str
) -> None:
    """Gradients are given, so that they do not depend on when it happens."""

    def run(chosen: str | None) -> Training:
        training = Training(engine)
        training.step(1)
        for name in ("before", "scaled", "backward", "clip", "unscale", "accumulate"):
            if name == chosen or (chosen is None and name == "before"):
                torch.manual_seed(2)
                one_row(training)
            if name == "scaled":
                training.optimizer.scale(torch.ones(()))
            if name == "backward":
                for param in training.optimizer._params():
                    param.grad = torch.full_like(param, 0.5)
            if place == name == "clip":
                training.optimizer.clip_grad_norm_(1.0)
            if place == name == "unscale":
                training.optimizer.unscale_()
            if place == name == "accumulate":
                training.optimizer.accumulate()
        with pytest.warns(UserWarning, match=ADOPTED):
            training.optimizer.step()
        training.optimizer.zero_grad()
        return training

    order = ["before", "scaled", "backward", "clip", "unscale", "accumulate"]
    later = order[min(order.index(place) + 1, 5)]  # after the call of the same name
    runs = [run(None), run(place), run(later)]
    assert same_bits(snapshot(runs[1].optimizer), snapshot(runs[0].optimizer))
    assert same_bits(snapshot(runs[2].optimizer), snapshot(runs[0].optimizer))


def test_only_step_adopts(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    monitor = mpcore.Monitor(training.optimizer, every=1)
    kept = [master.detach().clone() for master in training.masters()]
    one_row(training)
    optimizer = training.optimizer
    exact = optimizer.state_dict()["state"][0]["master"]
    assert optimizer.check_masters() == ["low.weight"]
    mpcore.migration.float32_state_dict(training.model, optimizer)
    optimizer.backward(training.loss(2))
    optimizer.clip_grad_norm_(1.0)
    optimizer.unscale_()
    optimizer.grads()
    assert monitor.report() is None
    assert same_bits([master.detach() for master in training.masters()], kept)
    assert same_bits(exact, kept[0])


def test_a_step_without_gradients_adopts_too(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    one_row(training)
    expected = expected_masters(training)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    assert same_bits([m.detach() for m in training.masters()], expected)


def test_a_weight_without_a_gradient_in_this_step_is_adopted_too(engine: Engine) -> None:
    training = Training(engine, inner="SGD")
    training.step(1)
    one_row(training)
    expected = expected_masters(training)
    training.optimizer.scale(torch.ones(()))
    training.brain.bias.grad = torch.ones_like(training.brain.bias)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    masters = training.masters()
    assert same_bits([m.detach() for m in masters[:3]], expected[:3])
    assert training.optimizer.check_masters() == []


def test_clamped_masters_are_no_edit(engine: Engine) -> None:
    param = nn.Parameter(torch.full((2,), 65504.0).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.NoLossScale())
    for _ in range(2):
        optimizer.backward(-100 * param.float().sum())
        with torch.no_grad():
            param.copy_(param.clone())
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[param]["master"].tolist() == [65704.0, 65704.0]


# ------------------------------------------------------------------ averages, masks, bounds


@pytest.mark.parametrize("way", ["copies", "AveragedModel"])
def test_averages_swapped_in_and_out_leave_exact_masters_and_no_warning(
    engine: Engine, way: str
) -> None:
    training, twin = Training(engine), Training(engine)
    average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for seed in range(5):
        for one in (training, twin):
            one.step(seed)
        average.update_parameters(training.model)
        kept = [param.detach().clone() for param in training.model.parameters()]
        if way == "copies":
            values = [value * 0.5 for value in kept]
        else:
            values = list(average.module.parameters())
        with torch.no_grad():
            for param, value in zip(training.model.parameters(), values, strict=True):
                param.copy_(value)
        training.loss(7).item()  # an evaluation
        saved = training.optimizer.state_dict()["state"]
        assert same_bits(saved[0]["master"], twin.optimizer.state_dict()["state"][0]["master"])
        with torch.no_grad():
            for param, value in zip(training.model.parameters(), kept, strict=True):
                param.copy_(value)
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_clipped_weights_stay_at_their_bound_as_in_float32(
    engine: Engine, dtype: torch.dtype
) -> None:
    """A critic's weights: what lies inside moves by less than half a last place a step."""
    bound, lr, steps = 0.5, 2.0**-14, 200
    start = torch.tensor([0.5, 0.4375, -0.5, 0.25])
    slope = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    param, plain = nn.Parameter(start.to(dtype)), start.clone()
    optimizer = engine.wrap(torch.optim.SGD([param], lr=lr), mpcore.NoLossScale())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.backward((param.float() * slope).sum())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                param.clamp_(-bound, bound)
            plain = (plain - lr * slope).clamp(-bound, bound)
    master = optimizer.state[param]["master"]
    assert torch.equal(master[[1, 3]], plain[[1, 3]])  # never at the bound: bit for bit
    assert (param.detach().float().abs() <= bound).all()
    # a master may be beyond the bound by half a last place of its weight, and by the last step,
    # whose clipping the next one adopts
    assert (master - plain).abs().max() <= bound * torch.finfo(dtype).eps / 2 + lr
    assert len(told) <= 1


def test_masks_that_are_put_back_after_each_step_hold(engine: Engine) -> None:
    training = Training(engine)
    mask = torch.tensor([[1, 0, 1, 0]] * 3).half()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(6):
            with torch.no_grad():
                training.low.weight.mul_(mask)
            training.step(seed)
    with torch.no_grad():
        training.low.weight.mul_(mask)
    expected = expected_masters(training)
    assert (expected[0][:, 1::2] == 0).all()
    assert (expected[0][:, ::2] != training.low.weight[:, ::2].float()).any()
    assert len(told) == 1  # once, not at every step


def test_torch_prune_trains_what_is_left(engine: Engine) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 2, bias=False)
    prune.random_unstructured(layer, "weight", 0.5)
    optimizer = engine.wrap(torch.optim.SGD(layer.parameters(), lr=0.5), mpcore.NoLossScale())
    mpcore.cast_model(layer, HALF, optimizer)
    before = layer.weight_orig.detach().clone()
    for _ in range(2):
        optimizer.backward(layer(torch.ones(1, 4).half()).float().sum())
        optimizer.step()
        optimizer.zero_grad()
    kept = layer.weight_mask != 0
    assert torch.equal(before[~kept], layer.weight_orig[~kept])
    assert (before[kept] != layer.weight_orig[kept]).all()


def test_tied_weights_are_adopted_once(engine: Engine) -> None:
    table = nn.Embedding(5, 3).half()
    head = nn.Linear(3, 5, bias=False).half()
    head.weight = table.weight
    optimizer = engine.wrap(torch.optim.SGD([table.weight], lr=0.5), mpcore.NoLossScale())
    for row in range(2):
        optimizer.backward(head(table(torch.tensor([row]))).float().sum())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        head.weight[4] = 7.0
    optimizer.backward(table(torch.tensor([0])).float().sum())
    with pytest.warns(UserWarning, match="^3 elements of group 0, parameter 0"):
        optimizer.step()
    assert optimizer.state[table.weight]["master"][4].tolist() == [7.0] * 3


def test_a_step_in_the_middle_of_sums_adopts(engine: Engine) -> None:
    training, twin = Training(engine), Training(engine)
    for one in (training, twin):
        one.step(1)
        one.backward(2)
        one.optimizer.accumulate()
    one_row(training)
    with torch.no_grad():
        twin.low.weight.copy_(training.low.weight)
    twin.optimizer.sync_masters_from_model()
    for one in (training, twin):
        one.backward(3)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    twin.optimizer.step()
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))


# ------------------------------------------------------------------ closures


def test_what_a_closure_writes_is_adopted_at_each_evaluation(engine: Engine) -> None:
    """As in float32, where LBFGS goes on from what the closure left."""
    if engine.fused:
        pytest.skip("LBFGS has no fused update")
    starts = torch.tensor([2.0, -3.0, 0.25])
    param, plain = nn.Parameter(starts.half()), nn.Parameter(starts.clone())
    ours = engine.wrap(torch.optim.LBFGS([param], lr=0.25, max_iter=4), mpcore.NoLossScale())
    theirs = torch.optim.LBFGS([plain], lr=0.25, max_iter=4)

    def closure_over(tensor: Tensor, optimizer: Any, backward: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            with torch.no_grad():
                tensor[1].clamp_(min=-1.0)
            optimizer.zero_grad()
            loss = (tensor.float() - 0.25).square().sum()
            backward(loss)
            return loss

        return closure

    with pytest.warns(UserWarning, match="^1 elements of"):
        ours.step(closure_over(param, ours, ours.backward))
    ours.step(closure_over(param, ours, ours.backward))
    for _ in range(2):
        theirs.step(closure_over(plain, theirs, Tensor.backward))
    assert (ours.state[param]["master"] - plain).abs().max() < 2e-3
    assert ours.check_masters() == []


def test_an_edit_before_a_step_with_a_closure_that_overflows_is_adopted(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    one_row(training)
    expected = expected_masters(training)

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(2, torch.inf)
        training.optimizer.backward(loss)
        return loss

    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step(closure)
    assert training.optimizer.last_step is not None
    assert training.optimizer.last_step.skipped
    assert same_bits([m.detach() for m in training.masters()], expected)
    assert training.optimizer.check_masters() == []


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", ["adopt", "always"])
def test_numbers_that_are_not_finite_are_refused_until_they_are_mended(
    engine: Engine, rule: str, bad: float
) -> None:
    training = Training(engine, rule)
    training.step(1)
    kept = training.masters()[2].detach().clone()
    with torch.no_grad():
        training.brain.weight[1, 2] = bad
    training.optimizer.scale(torch.ones(()))
    for param in training.optimizer._params():
        param.grad = torch.ones_like(param)
    before = snapshot(training.optimizer)
    for _ in range(2):
        with pytest.raises(mpcore.StageError, match=r"finite .* got 1 that are not in brain\.wei"):
            training.optimizer.step()
        assert same_bits(snapshot(training.optimizer), before)
    with torch.no_grad():
        training.brain.weight[1, 2] = 3.0
    with pytest.warns(UserWarning, match=r"^1 elements of brain\.weight"):
        training.optimizer.step()
    kept[1, 2] = 3.0
    assert (training.masters()[2] - kept).abs().max() < 0.05  # a step further on
    assert training.optimizer.check_masters() == []


def test_numbers_that_are_not_finite_are_taken_by_whom_asks_for_it(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    with torch.no_grad():
        training.brain.weight[1, 2] = torch.inf
    training.optimizer.sync_masters_from_model()
    assert training.masters()[2][1, 2] == torch.inf
    assert training.optimizer.check_masters() == []


# ------------------------------------------------------------------ the other rules


def test_always_sees_what_no_counter_tells(engine: Engine) -> None:
    """Weight clipping as WGAN's code has it."""
    adopts, always = Training(engine), Training(engine, "always")
    for one in (adopts, always):
        one.step(1)
        for param in one.halves():
            param.data.clamp_(-0.2, 0.2)
    expected = expected_masters(always)
    always.optimizer.backward(always.loss(2, torch.inf))
    with pytest.warns(UserWarning, match=ADOPTED):
        always.optimizer.step()
    always.optimizer.zero_grad()
    assert same_bits([m.detach() for m in always.masters()], expected)
    adopts.optimizer.backward(adopts.loss(2, torch.inf))
    adopts.optimizer.step()
    assert adopts.optimizer.check_masters() != []


def test_always_sees_what_numpy_writes(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.NoLossScale(), "always")
    optimizer.backward(param.float().sum())
    optimizer.step()
    optimizer.zero_grad()
    param.detach().numpy()[1] = 8.0
    optimizer.backward(param.float().sum())
    with pytest.warns(UserWarning, match="^1 elements of"):
        optimizer.step()
    assert optimizer.state[param]["master"].tolist() == [0.0, 7.5, 0.0]


@pytest.mark.parametrize("rule", ["adopt", "always", "raise"])
def test_the_rule_goes_with_copies(engine: Engine, rule: str) -> None:
    training = Training(engine, rule)
    training.step(1)
    other = copy.deepcopy(training)
    assert other.optimizer.on_weight_edit == rule
    with torch.no_grad():
        other.low.weight[0, 0] = 9.0
    before = [m.detach().clone() for m in training.masters()]
    if rule == "raise":
        with pytest.raises(mpcore.StageError, match="they were written to"):
            other.step(2)
    else:
        with pytest.warns(UserWarning, match=ADOPTED):
            other.step(2)
    assert same_bits([m.detach() for m in training.masters()], before)


def test_an_unknown_rule_is_refused(engine: Engine) -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2).half())], lr=0.1)
    with pytest.raises(mpcore.ArgumentError, match="on_weight_edit: expected one of adopt, always"):
        engine.wrap(inner, mpcore.NoLossScale(), "overwrite")
    engine.wrap(inner, mpcore.NoLossScale())


def test_float32_weights_have_nothing_to_adopt(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.NoLossScale(), "always")
    for _ in range(2):
        optimizer.backward(param.sum())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            param.add_(1.0)
    assert param.tolist() == [2.0] * 3


# ------------------------------------------------------------------ asked for


@pytest.mark.parametrize("exact", [False, True])
def test_masters_taken_from_the_model_keep_their_digits_unless_told_otherwise(
    engine: Engine, exact: bool
) -> None:
    training = Training(engine)
    training.step(1)
    training.low.weight.data[0, 0] = 5.0
    expected = [p.detach().float() for p in training.halves()]
    kept = expected_masters(training)
    assert not same_bits(kept, expected)
    training.optimizer.sync_masters_from_model(exact=exact)
    found = [master.detach() for master in training.masters()]
    assert same_bits(found, expected if exact else kept)
    assert training.optimizer.check_masters() == []
    training.step(2)


# ------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize("adopted", [False, True])
def test_a_run_resumed_around_an_edit_goes_on_with_the_same_bits(
    engine: Engine, adopted: bool
) -> None:
    training, other = Training(engine), Training(engine)
    training.step(1)
    if adopted:
        one_row(training)
        with pytest.warns(UserWarning, match=ADOPTED):
            training.step(2)
    saved = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    for one in (training, other):
        one.step(3)
        torch.manual_seed(5)
        one_row(one)
    for one in (training, other):
        # what `training` has said once it does not say again
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*" + ADOPTED)
            one.step(4)
    assert same_bits(snapshot(other.optimizer), snapshot(training.optimizer))
