"""Several losses into one model, each with a scale of its own."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot
from mpcore_testing.syncs import fake_cuda

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
NAMES = ("", "gan", "penalty")


class Training:
    """Three losses over three parameters: the optimizer's own one, and two that were added."""

    def __init__(self, engine: Engine, **scales: Any) -> None:
        values = [torch.linspace(-1, 1, 5 + i) for i in range(3)]
        dtypes = (HALF, BRAIN, FULL)
        self.params = [nn.Parameter(v.to(d)) for v, d in zip(values, dtypes, strict=True)]
        inner = torch.optim.AdamW(self.params, lr=0.1, weight_decay=0.1)
        rules = {name: mpcore.DynamicLossScale(2.0 ** (4 + i)) for i, name in enumerate(NAMES)}
        rules |= scales
        self.optimizer = engine.wrap(inner, rules[""])
        self.losses = {name: self.optimizer.add_loss(name, rules[name]) for name in NAMES[1:]}

    def backward(self, name: str, seed: int, bad: tuple[int, float] | None = None) -> None:
        """One backward pass of a loss; `bad` multiplies the part of one parameter."""
        generator = torch.Generator().manual_seed(seed)
        terms = []
        for index, param in enumerate(self.params):
            noise = torch.randn(param.shape, generator=generator)
            if bad is not None and bad[0] == index:
                noise[-1] = bad[1]
            terms.append((param.float() * noise).sum())
        owner = self.losses.get(name, self.optimizer)
        owner.backward(torch.stack(terms).sum())

    def step(self, *passes: Any) -> None:
        for arguments in passes:
            self.backward(*arguments)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def scales(self) -> list[float]:
        return [self.optimizer.loss_scale, *(loss.loss_scale for loss in self.losses.values())]


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids=str)
def test_gradients_of_all_losses_are_unscaled_by_their_own_scales(
    engine: Engine, order: tuple[str, ...]
) -> None:
    training = Training(engine)
    for name in order:
        training.backward(name, NAMES.index(name))
        # what another loss has left is added before a pass, so order does not matter
        assert all((param.grad is None) == (name != "") for param in training.params)
    training.optimizer.unscale_()
    expected = []
    for index, param in enumerate(training.params):
        total = torch.zeros(param.shape, dtype=torch.float64)
        for seed, exponent in zip(range(3), (4, 5, 6), strict=True):
            generator = torch.Generator().manual_seed(seed)
            noise = [torch.randn(p.shape, generator=generator) for p in training.params][index]
            total += (noise * 2.0**exponent).to(param.dtype).double() / 2.0**exponent
        expected.append(total)
    for grad, total in zip(training.optimizer.grads(), expected, strict=True):
        assert torch.allclose(grad.double(), total, rtol=0, atol=2.0**-21)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("tensor", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_only_the_scale_of_the_loss_that_overflowed_backs_off(
    engine: Engine, name: str, tensor: int, bad: float
) -> None:
    training = Training(engine)
    training.step(*((n, i) for i, n in enumerate(NAMES)))
    before = snapshot(training.optimizer)
    training.step(*((n, i, (tensor, bad) if n == name else None) for i, n in enumerate(NAMES)))
    last = training.optimizer.last_step
    place = f"group 0, parameter {tensor}, [{5 + tensor}]"
    assert last.skipped
    assert last.overflowed() == [place]
    assert last.overflowed_in() == [(NAMES.index(name), name, (place,))]
    assert same_bits(snapshot(training.optimizer), before)
    halved = [2.0 ** (4 + i - (n == name)) for i, n in enumerate(NAMES)]
    assert training.scales() == halved
    assert (training.optimizer.steps, training.optimizer.skipped_steps) == (2, 1)
    for loss in training.losses.values():
        assert (loss.steps, loss.skipped_steps) == (2, int(loss.name == name))
    training.step(("gan", 3))
    assert not training.optimizer.last_step.skipped


def test_a_loss_that_takes_no_part_does_not_move(engine: Engine) -> None:
    rule = mpcore.DynamicLossScale(2.0**4, growth_interval=2)
    training = Training(engine, **dict.fromkeys(NAMES, rule))
    for names in (["gan"], ["gan", "penalty"], ["penalty"], [""]):
        training.step(*((name, 1) for name in names))
    assert training.scales() == [2.0**4, 2.0**5, 2.0**5]
    assert [loss.steps for loss in training.losses.values()] == [2, 2]
    assert training.optimizer.steps == 4


def test_a_graph_that_was_scaled_before_another_loss_is_still_right(engine: Engine) -> None:
    training = Training(engine, **{"": mpcore.StaticLossScale(2.0**8)})
    param = training.params[0]
    scaled = training.optimizer.scale(param.float().sum())
    training.losses["gan"].backward(param.float().sum() * 2)
    scaled.backward()
    training.losses["penalty"].backward(param.float().sum() * 3)
    training.optimizer.unscale_()
    assert training.optimizer.grads()[0].tolist() == [6.0] * 5


def test_a_backward_pass_that_fails_takes_only_its_own_gradients(engine: Engine) -> None:
    training = Training(engine)
    param = training.params[0]
    training.optimizer.backward(param.float().sum())

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            raise ValueError("stop")

    half_way = training.params[2].sum() + Fails.apply(param.float()).sum()
    with pytest.raises(ValueError, match="stop"):
        training.losses["gan"].backward(half_way)
    assert [p.grad for p in training.params] == [None] * 3
    training.optimizer.unscale_()
    assert [grad.tolist() for grad in training.optimizer.grads()] == [[1.0] * 5]


def test_every_kind_of_loss_scale_can_be_one_of_several(engine: Engine) -> None:
    kinds = (mpcore.NoLossScale(), mpcore.StaticLossScale(4.0), mpcore.HeadroomLossScale(2.0**4))
    for rules in itertools.permutations(kinds):
        training = Training(engine, **dict(zip(NAMES, rules, strict=True)))
        before = training.scales()
        training.step(*((name, i) for i, name in enumerate(NAMES)))
        assert not training.optimizer.last_step.skipped
        for rule, old, new in zip(rules, before, training.scales(), strict=True):
            assert (new > old) == isinstance(rule, mpcore.HeadroomLossScale)


def test_a_loss_at_its_minimum_raises_if_told_to(engine: Engine) -> None:
    rule = mpcore.DynamicLossScale(1.0, at_min="raise")
    training = Training(engine, gan=rule)
    training.step(("penalty", 1, (0, math.inf)))  # not of the one that is at its minimum
    with pytest.raises(mpcore.LossScaleError):
        training.step(("gan", 1, (0, math.inf)), ("", 2))
    assert training.optimizer.skipped_steps == 2


@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_all_scales_are_saved_and_go_on(engine: Engine, way: str) -> None:
    def rounds(training: Training, numbers: range) -> None:
        for number in numbers:
            bad = (0, math.inf) if number % 3 == 1 else None
            training.step(("", number), ("gan", number, bad), ("penalty", number))

    training = Training(engine)
    rounds(training, range(2))
    other = Training(engine)
    if way == "file":
        buffer = io.BytesIO()
        torch.save(training.optimizer.state_dict(), buffer)
        buffer.seek(0)
        other.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        with torch.no_grad():
            for param, source in zip(other.params, training.params, strict=True):
                param.copy_(source)
    else:
        copied = copy.deepcopy if way == "deepcopy" else lambda t: pickle.loads(pickle.dumps(t))
        other = copied(training)
    rounds(training, range(2, 6))
    rounds(other, range(2, 6))
    assert same_bits(snapshot(other.optimizer), snapshot(training.optimizer))
    assert other.scales() == training.scales()
    assert same_bits(other.optimizer.state_dict(), training.optimizer.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["losses"].pop("gan"), r"\[\"losses\"\]: expected \['gan', 'penalty'\]"),
        (lambda s: s["losses"].update(x={}), r"\[\"losses\"\]: expected .*Add the same ones"),
        (lambda s: s.pop("totals"), r"\[\"totals\"\]: expected a list of 6 counters, got \[\]"),
        (lambda s: s["totals"].__setitem__(2, -1), "expected 'totals' to be an integer"),
        (
            lambda s: s["losses"]["gan"].update(scale=3.0),
            r"\['gan'\]\[\"scale\"\]: expected a power",
        ),
        (lambda s: s["losses"]["gan"].update(steps="x"), r"\['gan'\]: expected 'steps' to be"),
        (lambda s: s["losses"]["gan"].pop("steps"), r"\['gan'\]: expected the keys"),
    ],
)
def test_a_checkpoint_with_other_losses_changes_nothing(
    engine: Engine, change: Any, message: str
) -> None:
    training = Training(engine)
    training.step(("gan", 1), ("", 2))
    saved = copy.deepcopy(training.optimizer.state_dict())
    change(saved["mpcore"])
    training.step(("penalty", 3, (0, math.inf)))
    before = copy.deepcopy(training.optimizer.state_dict())
    with pytest.raises(mpcore.ArgumentError, match=message):
        training.optimizer.load_state_dict(saved)
    assert same_bits(training.optimizer.state_dict(), before)


def test_names_are_new_and_scales_are_loss_scales(engine: Engine) -> None:
    training = Training(engine)
    for name in ("", "gan", None, 3):
        with pytest.raises(mpcore.ArgumentError, match=r"^name: expected a new one"):
            training.optimizer.add_loss(name, mpcore.NoLossScale())
    with pytest.raises(mpcore.ArgumentTypeError, match=r"^loss_scale: expected"):
        training.optimizer.add_loss("new", 4.0)
    training.optimizer.unscale_()
    with pytest.raises(
        mpcore.StageError, match=r"backward\(\) of 'gan': expected .*before unscale_"
    ):
        training.backward("gan", 1)
    assert repr(training.losses["gan"]).startswith("ScaledLoss('gan', DynamicLossScale(init=32.0")


# addresses of fake tensors say nothing; here they only tell whether a plan is still good
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_nothing_syncs_until_it_is_read() -> None:
    with fake_cuda() as watch:
        params = [nn.Parameter(torch.empty(4, 3, dtype=d, device="cuda")) for d in (HALF, FULL)]
        optimizer = Engine("reference", "fused").wrap(torch.optim.AdamW(params, lr=0.1))
        gan = optimizer.add_loss("gan", mpcore.DynamicLossScale())
        for _ in range(3):
            for loss in (None, gan):  # autograd cannot run there
                optimizer.scale(torch.empty((), device="cuda"))
                for param in params:
                    param.grad = torch.empty_like(param)
                optimizer._stage.accumulate("a test", loss)
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert watch.operations > 100
        assert watch.reads == 0


def test_a_pass_whose_gradients_cannot_be_taken_leaves_none(engine: Engine) -> None:
    embedding, param = nn.Embedding(4, 1, sparse=True), nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([param, embedding.weight], lr=1.0)
    optimizer = engine.wrap(inner, mpcore.NoLossScale())
    gan = optimizer.add_loss("gan", mpcore.StaticLossScale(1024.0))
    optimizer.backward(param.sum())
    with pytest.raises(mpcore.ArgumentError, match="dense"):
        gan.backward(param.sum() + embedding(torch.tensor([1])).sum())
    optimizer.step()
    assert param.tolist() == [-1.0, -1.0]


def test_zeros_that_zero_grad_leaves_are_no_unscaled_gradients(engine: Engine) -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).half())]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.5), mpcore.StaticLossScale(8.0))
    gan = optimizer.add_loss("gan", mpcore.StaticLossScale(8.0))
    for _ in range(2):
        optimizer.backward(params[0].sum())
        gan.backward(params[1].float().sum())
        optimizer.step()
        optimizer.backward(params[0].sum())  # a gradient that is zeroed, not dropped
        optimizer.zero_grad(set_to_none=False)
        gan.backward(params[0].sum())
        optimizer.step()
    assert [param.tolist() for param in params] == [[-1.0] * 4, [0.0] * 4]


def test_all_alarms_look_before_one_raises(engine: Engine) -> None:
    rule = mpcore.DynamicLossScale(init=1.0, at_min="raise")
    training = Training(engine, **dict.fromkeys(NAMES, rule))
    with pytest.raises(mpcore.LossScaleError):
        training.step(*((name, 1, (0, math.inf)) for name in NAMES))
    training.optimizer.zero_grad()
    training.step(*((name, 2) for name in NAMES))  # is no news of the step before
    assert not training.optimizer.last_step.skipped


@pytest.mark.filterwarnings("ignore:each of the last")
def test_losses_that_overflow_in_turn_are_reported(engine: Engine) -> None:
    training = Training(engine)
    for number in range(99):
        training.step((NAMES[1 + number % 2], 1, (0, math.inf)))
    with pytest.warns(UserWarning, match="each of the last 100 steps was skipped"):
        training.step(("penalty", 1, (0, math.inf)))
    assert training.optimizer.skips_in_a_row == 100


def test_losses_are_found_by_name_in_copies(engine: Engine) -> None:
    training = Training(engine)
    other = copy.deepcopy(training.optimizer)
    assert list(other.losses) == ["gan", "penalty"]
    param = other.param_groups[0]["params"][0]
    other.losses["gan"].backward(param.float().sum())
    other.step()
    assert (other.steps, training.optimizer.steps) == (1, 0)
    with pytest.raises(TypeError):
        other.losses["new"] = None
