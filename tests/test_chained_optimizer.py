"""Several optimizers as one: alone it steps as they do, wrapped each group takes its own path."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.migration import to_torch
from mpcore.optim import ChainedOptimizer, Lion
from torch import Tensor, nn

from mpcore_testing.bits import bits

SCALE = mpcore.DynamicLossScale(init=2.0**6, growth_interval=2)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2))


def sorted_params(net: nn.Module) -> tuple[list[Any], list[Any]]:
    """Named matrices, and the rest."""
    named = list(net.named_parameters())
    return [each for each in named if each[1].ndim == 2], [e for e in named if e[1].ndim != 2]


def parts_over(net: nn.Module) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    matrices, others = sorted_params(net)
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)


def loss(net: nn.Module, seed: int) -> Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    half = next(net.parameters()).dtype
    result: Tensor = net(x.to(half)).float().square().mean()
    return result


def cast_by_hand(
    net: nn.Module, wrappers: list[mpcore.MixedPrecisionOptimizer], dtype: torch.dtype
) -> None:
    """What `cast_model` does of one optimizer, of one for matrices and one for the rest."""
    originals = {name: param.detach().clone() for name, param in net.named_parameters()}
    net.to(dtype)
    for wrapper, some in zip(wrappers, sorted_params(net), strict=True):
        wrapper.adopt_masters([(param, originals[name]) for name, param in some])


def same(net: nn.Module, other: nn.Module) -> bool:
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return all(torch.equal(bits(mine), bits(theirs)) for mine, theirs in pairs)


def test_alone_it_steps_each_in_turn_with_the_bits_of_each() -> None:
    net, twin = model(), model()
    chain, parts = ChainedOptimizer(*parts_over(net)), parts_over(twin)
    for step in range(3):
        chain.zero_grad()
        value = chain.step(lambda: [each := loss(net, step), each.backward()][0])  # noqa: B023
        for part in parts:
            part.zero_grad()
        expected = loss(twin, step)
        expected.backward()
        for part in parts:
            part.step()
        assert torch.equal(value, expected)
        assert same(net, twin)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_chain_goes_on_from_a_checkpoint_or_a_copy(way: str) -> None:
    net = model()
    chain = ChainedOptimizer(*parts_over(net))
    loss(net, 0).backward()
    chain.step()
    if way == "state_dict":
        other = model(1)
        other.load_state_dict(net.state_dict())
        parts = parts_over(other)
        again = ChainedOptimizer(*parts)
        again.load_state_dict(copy.deepcopy(chain.state_dict()))  # torch copies no tensors
        assert again.optimizers == parts  # the same objects, which schedulers know
    else:
        copied = copy.deepcopy if way == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        other, again = copied((net, chain))
    assert [type(part).__name__ for part in again.optimizers] == ["Muon", "AdamW"]
    for part in again.optimizers:
        assert part.state is again.state
    for each, optimizer in ((net, chain), (other, again)):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.1
        loss(each, 1).backward()
        optimizer.step()
    assert same(net, other)


def test_schedulers_over_the_chain_or_an_optimizer_in_it_drive_the_same_groups() -> None:
    net = model()
    muon, adamw = parts_over(net)
    chain = ChainedOptimizer(muon, adamw)
    optimizer = mpcore.MixedPrecisionOptimizer(chain, SCALE)
    mpcore.cast_model(net, torch.float16, optimizer)
    schedulers: list[Any] = [
        torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, chain, adamw)
    ]
    optimizer.backward(loss(net, 0))
    optimizer.step()
    for scheduler in schedulers:
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 4, 0.01 / 8]
    assert [path.path for path in optimizer.path] == ["general", "fused"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_muon_for_matrices_and_adamw_for_the_rest_as_two_wrappers_of_one_scaler(
    dtype: torch.dtype,
) -> None:
    """The oracle: a wrapper each, one GradScaler over both, as before there were chains."""
    net, twin = model(), model()
    optimizer = mpcore.MixedPrecisionOptimizer(ChainedOptimizer(*parts_over(net)), SCALE)
    mpcore.cast_model(net, dtype, optimizer)
    assert [str(path) for path in optimizer.path] == [
        "general: no fused update for Muon",
        "fused: AdamW",
    ]
    wrappers = [
        mpcore.MixedPrecisionOptimizer(part, mpcore.NoLossScale()) for part in parts_over(twin)
    ]
    scaler = mpcore.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    cast_by_hand(twin, wrappers, dtype)
    for step, bad in enumerate([False, True, False, False, False]):
        optimizer.zero_grad()
        optimizer.backward(loss(net, step))
        for wrapper in wrappers:
            wrapper.zero_grad()
        scaler.scale(loss(twin, step)).backward()
        if bad:
            for each in (net, twin):
                next(each.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
        norm = optimizer.clip_grad_norm_(0.05)
        expected = scaler.clip_grad_norm_(wrappers, 0.05)
        assert bad or torch.allclose(norm, expected, rtol=1e-6)
        optimizer.step()
        for wrapper in wrappers:
            scaler.step(wrapper)
        scaler.update()
        assert optimizer.loss_scale == scaler.get_scale()
        assert optimizer.last_step.skipped is bad
        for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            # the clip's factor is rounded in another place: one unit of 2^-24 of it
            torch.testing.assert_close(
                mine, theirs, rtol=2**-7 if dtype.itemsize == 2 else 0, atol=0
            )


def test_a_chain_of_optimizers_that_all_are_fused_is_stepped_without_them() -> None:
    net, twin = model(), model()
    matrices, others = sorted_params(net)
    inner = Lion(matrices, lr=0.001), torch.optim.AdamW(others, lr=0.01)
    optimizer = mpcore.MixedPrecisionOptimizer(ChainedOptimizer(*inner), SCALE, path="fused")
    mpcore.cast_model(net, torch.float16, optimizer)
    assert [path.reason for path in optimizer.path] == ["Lion", "AdamW"]
    alone = []
    for build, some in ((Lion, 0), (torch.optim.AdamW, 1)):
        rate = 0.001 if build is Lion else 0.01
        part = build(sorted_params(twin)[some], lr=rate)
        alone.append(mpcore.MixedPrecisionOptimizer(part, SCALE, path="fused"))
    cast_by_hand(twin, alone, torch.float16)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.backward(loss(net, step))
        for wrapper in alone:
            wrapper.zero_grad()
        # both scales are the same number
        alone[1].scale(torch.ones(()))
        alone[0].backward(loss(twin, step))
        optimizer.step()
        for wrapper in alone:
            wrapper.step()
        assert same(net, twin)
    assert optimizer.loss_scale == alone[0].loss_scale == alone[1].loss_scale > 2.0**6
    assert [len(part.state) for part in inner] == [4, 4]  # the one state of the chain


def test_a_wrapped_chain_goes_on_from_its_state_dict() -> None:
    nets = [model(), model(1)]
    wrapped = []
    for net in nets:
        chain = ChainedOptimizer(*parts_over(net))
        wrapped.append(mpcore.MixedPrecisionOptimizer(chain, SCALE))
        mpcore.cast_model(net, torch.float16, wrapped[-1])
    for step in range(2):
        wrapped[0].backward(loss(nets[0], step))
        wrapped[0].step()
        wrapped[0].zero_grad()
    nets[1].load_state_dict(nets[0].state_dict())
    wrapped[1].load_state_dict(wrapped[0].state_dict())
    for net, optimizer in zip(nets, wrapped, strict=True):
        optimizer.backward(loss(net, 2))
        optimizer.step()
    assert same(*nets)
    assert wrapped[0].state_dict()["mpcore"] == wrapped[1].state_dict()["mpcore"]
    state = wrapped[0].state_dict()
    states = state["state"]
    states[2]["exp_avg"] = states[2]["exp_avg"][:1]  # of a bias, whose rule is known
    with pytest.raises(ArgumentError, match="exp_avg"):
        wrapped[1].load_state_dict(state)


def test_states_go_to_torch_by_the_rule_of_each_group() -> None:
    net = model()
    matrices, others = sorted_params(net)
    inner = ChainedOptimizer(
        torch.optim.Muon(matrices), torch.optim.SGD(others, lr=0.1, momentum=0.9)
    )
    optimizer = mpcore.MixedPrecisionOptimizer(inner, SCALE)
    mpcore.cast_model(net, torch.float16, optimizer)
    optimizer.backward(loss(net, 0))
    optimizer.step()
    state = to_torch(optimizer)["state"]
    assert {key for values in state.values() for key in values} == {"momentum_buffer"}


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda: (), ArgumentError, "at least one optimizer, got none"),
    "no optimizer": (lambda: ([],), ArgumentTypeError, "got list"),
    "a chain": (
        lambda: (ChainedOptimizer(torch.optim.SGD([torch.ones(2)])),),
        ArgumentError,
        "got a chain of them",
    ),
    "a closure": (
        lambda: (torch.optim.LBFGS([torch.ones(2)]),),
        ArgumentError,
        "without a closure",
    ),
    "names of some": (
        lambda: (
            torch.optim.SGD([torch.ones(2)]),
            torch.optim.SGD([("weight", torch.ones(2))]),
        ),
        ArgumentError,
        "names of all parameters or of none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_chained_is_refused(case: str) -> None:
    build, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        ChainedOptimizer(*build())


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    weight = torch.ones(2)
    with pytest.raises(ArgumentError, match="every parameter in one optimizer"):
        ChainedOptimizer(torch.optim.SGD([weight]), torch.optim.Adam([weight]))


def test_groups_that_come_later_are_refused_wherever_they_are_added() -> None:
    sgd = torch.optim.SGD([torch.ones(2)])
    chain = ChainedOptimizer(sgd)
    with pytest.raises(ArgumentError, match="no word of which optimizer"):
        chain.add_param_group({"params": [torch.ones(3)]})
    assert len(chain.param_groups) == 1
    sgd.add_param_group({"params": [torch.ones(3)]})
    with pytest.raises(ArgumentError, match="expected the param groups that it was made of"):
        chain.step()


def test_what_no_wrapper_takes_is_refused_in_a_chain_as_well() -> None:
    sparse = torch.optim.SparseAdam([nn.Parameter(torch.ones(2))])
    chain = ChainedOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))]), sparse)
    with pytest.raises(ArgumentError, match="got SparseAdam"):
        mpcore.MixedPrecisionOptimizer(chain)
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    wrapper = mpcore.MixedPrecisionOptimizer(sgd)
    with pytest.raises(ArgumentError, match="another MixedPrecisionOptimizer wraps"):
        mpcore.MixedPrecisionOptimizer(ChainedOptimizer(sgd))
    assert wrapper.steps == 0


def test_a_checkpoint_loads_when_one_of_the_optimizers_has_had_no_gradient() -> None:
    net = model().half()
    wrapper = mpcore.MixedPrecisionOptimizer(ChainedOptimizer(*parts_over(net)), SCALE)
    matrices, _ = sorted_params(net)
    wrapper.backward(sum(param.float().sum() for _, param in matrices))
    wrapper.step()
    other = model().half()
    resumed = mpcore.MixedPrecisionOptimizer(ChainedOptimizer(*parts_over(other)), SCALE)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(wrapper.state_dict())
    for _ in range(2):
        for optimizer, each in ((wrapper, net), (resumed, other)):
            optimizer.zero_grad()
            optimizer.backward(loss(each, 1))
            optimizer.step()
        assert same(net, other)


def test_an_optimizer_that_comes_back_to_the_fused_path_has_its_step_count_in_the_state() -> None:
    net = model().half()
    matrices, others = sorted_params(net)
    sgd = torch.optim.SGD(others, lr=0.01, momentum=0.9)
    chain = ChainedOptimizer(torch.optim.AdamW(matrices, lr=0.01), sgd)
    wrapper = mpcore.MixedPrecisionOptimizer(chain, SCALE, backend="compiled")
    for foreach, counts in ((None, True), (True, False), (None, True)):
        sgd.param_groups[0]["foreach"] = foreach
        wrapper.backward(loss(net, 1))
        wrapper.step()
        wrapper.zero_grad()
        assert [("step" in wrapper.state[param]) for _, param in others] == [counts] * len(others)
