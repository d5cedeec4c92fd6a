"""What others do to compact moments, and to weights without masters; and what watches them."""

import mpcore
import pytest
import torch
from mpcore.monitoring.memory import resident_bytes
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.compact import ADAMW, BUILDS, ENGINES, compact
from mpcore_testing.engines import Engine
from mpcore_testing.stored import bytes_of

KEPT = pytest.mark.parametrize("moments", ["bfloat16", "int8"])
MASTERS = pytest.mark.parametrize("masters", ["float32", "split", "none"])


def trained(engine, build=ADAMW, steps=3, **options):
    one = compact(engine, build, **options)
    for seed in range(steps):
        one.step(seed)
    return one


# ------------------------------------------------------------------ state


@KEPT
@MASTERS
@ENGINES
def test_float32_state_is_written_and_read_back(engine, masters, moments):
    one = trained(engine, masters=masters, moments=moments)
    for param in one.params:
        there = one.optimizer.float32_state(param)
        assert not {"random_key", "exp_avg_scales"} & set(there)
        assert all(value.dtype == torch.float32 for value in there.values())
        before = one.bits()
        one.optimizer.set_float32_state(param, there)  # what was decoded comes back as it was
        assert same_bits(one.bits(), before)
        new = {name: torch.full_like(there[name], 4.0) for name in ("exp_avg", "exp_avg_sq")}
        one.optimizer.set_float32_state(param, new)
        after = one.optimizer.float32_state(param)
        assert same_bits({name: after[name] for name in new}, new)
        there["exp_avg"].fill_(9.0)  # copies
        assert same_bits(one.optimizer.float32_state(param), after)


@KEPT
@ENGINES
def test_edits_of_what_lies_there_count(engine, moments):
    one, other = (trained(engine, moments=moments) for _ in range(2))
    state = one.optimizer.state[one.params[0]]
    for name in [name for name in state if name.startswith("exp_avg")]:
        state[name].zero_()
    zeros = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(4, 300))
    other.optimizer.set_float32_state(other.params[0], zeros)
    for each in (one, other):
        each.step(4)
    assert same_bits(one.bits(), other.bits())


@KEPT
@ENGINES
def test_float32_tensors_that_are_put_there_are_kept_as_the_others(engine, moments):
    one, other = (trained(engine, moments=moments) for _ in range(2))
    values = one.optimizer.float32_state(one.params[0])["exp_avg"] * 2
    one.optimizer.state[one.params[0]]["exp_avg"] = values
    other.optimizer.set_float32_state(other.params[0], {"exp_avg": values})
    for each in (one, other):
        each.step(4)
    assert same_bits(one.bits(), other.bits())


@ENGINES
def test_codes_without_scales_are_refused_before_the_step(engine):
    one = trained(engine, moments="int8")
    del one.optimizer.state[one.params[0]]["exp_avg_scales"]
    before = one.bits()
    one.give(4)
    with pytest.raises(mpcore.ArgumentError, match="expected 'exp_avg_scales' beside codes of"):
        one.optimizer.step()
    assert same_bits(one.bits()[0], before[0])


@KEPT
@MASTERS
@ENGINES
def test_a_state_that_was_deleted_begins_anew(engine, masters, moments):
    one = trained(engine, masters=masters, moments=moments)
    key = one.optimizer.state[one.params[1]]["random_key"]
    del one.optimizer.state[one.params[1]]
    one.step(4)
    state = one.optimizer.state[one.params[1]]
    assert (float(state["step"]), state["random_key"]) == (1.0, key)


@ENGINES
def test_state_of_an_optimizer_that_was_trained_before_is_kept(engine):
    weight = nn.Parameter(torch.randn(4, 300))
    inner = torch.optim.AdamW([weight])
    weight.grad = torch.randn(4, 300)
    inner.step()
    before = inner.state[weight]["exp_avg"].clone()
    weight.data = weight.data.bfloat16()
    weight.grad = None
    optimizer = engine.wrap(inner, mpcore.NoLossScale(), moments="int8", masters="split")
    weight.grad = torch.full_like(weight, 0.125)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.int8
    found, expected = optimizer.float32_state(weight)["exp_avg"], 0.9 * before + 0.0125
    # two roundings, of half a code and of a whole one; codes are 2 / 127 of the largest apart
    assert (found - expected).abs().max() < 1.6 * 2 / 127 * before.abs().max()


@ENGINES
def test_no_tensor_of_float32_is_left(engine):
    one = trained(engine, masters="split", moments="int8")
    state = one.optimizer.state[one.params[0]]
    full = [v for v in state.values() if torch.is_tensor(v) and v.numel() >= 1200]
    assert sorted(str(v.dtype) for v in full) == ["torch.int16", "torch.int8", "torch.uint8"]


# ------------------------------------------------------------------ bytes


@ENGINES
@pytest.mark.parametrize(
    ("masters", "moments", "expected"),
    [
        ("float32", "float32", 16),
        ("split", "float32", 14),
        ("split", "bfloat16", 10),
        ("split", "int8", 8 + 2 * 4 / 256),
        ("none", "float32", 12),
        ("none", "bfloat16", 8),
        ("none", "int8", 6 + 2 * 4 / 256),
    ],
)
def test_bytes_of_a_parameter(masters, moments, expected, engine):
    weight = nn.Parameter(torch.randn(64, 512).bfloat16())
    scale = mpcore.NoLossScale()
    optimizer = engine.wrap(ADAMW([weight]), scale, masters=masters, moments=moments)
    optimizer.backward(weight.float().square().mean())
    optimizer.step()
    state = optimizer.state[weight]
    tensors = [value for name, value in state.items() if torch.is_tensor(value) and name != "step"]
    assert bytes_of([weight, weight.grad, *tensors]) == expected * weight.numel()
    assert resident_bytes(optimizer).per_parameter == expected


# ------------------------------------------------------------------ watching


@KEPT
@ENGINES
def test_a_monitor_reads_what_it_reads_of_float32_moments(engine, moments):
    readings = []
    for kept in (moments, "float32"):
        one = compact(engine, BUILDS["SGD"], masters="split", moments=kept)
        monitor = mpcore.Monitor(one.optimizer, every=1)
        for seed in range(3):
            one.step(seed, overflow=seed == 1)
            readings.append((monitor.reading.lost_updates, monitor.reading.findings))
    assert readings[:3] == readings[3:]


@ENGINES
def test_a_monitor_counts_no_lost_updates_where_there_are_no_masters(engine):
    one = compact(engine, masters="none", moments="bfloat16")
    del one.params[3:]  # which are float32
    monitor = mpcore.Monitor(one.optimizer, every=1)
    for seed in range(3):
        one.step(seed)
        assert monitor.reading.lost_updates is None
    assert monitor.reading.saturated == 0


@ENGINES
def test_weights_beyond_the_largest_one_become_it_and_count(engine):
    largest = torch.finfo(torch.bfloat16).max
    weight = nn.Parameter(torch.full((3,), largest, dtype=torch.bfloat16))
    sgd = torch.optim.SGD([weight], lr=1.0)
    optimizer = engine.wrap(sgd, mpcore.NoLossScale(), masters="none")
    weight.grad = torch.tensor([-1e36, 0.0, 2.0**120]).bfloat16()
    optimizer.step()
    assert optimizer.saturated == 1
    assert weight.tolist() == [largest, largest, largest - 2.0**120]


# ------------------------------------------------------------------ weights without masters


@KEPT
@ENGINES
def test_a_weight_that_others_write_simply_is_the_weight(engine, moments):
    one = trained(engine, masters="none", moments=moments)
    weight = one.params[0]
    with torch.no_grad():
        weight[0] = 3.0
        weight.data[1, 0] = 0.0
    master = one.optimizer.float32_state(weight)["master"]
    assert torch.equal(master, weight.detach().float())
    one.optimizer.sync_masters_from_model(exact=True)
    assert torch.equal(master, weight.detach().float())
    assert one.optimizer.check_masters() == []
    one.step(3)
    assert (weight[0] - 3.0).abs().max() < 0.05


@ENGINES
def test_a_master_that_is_written_is_rounded_to_the_weight(engine):
    one = trained(engine, masters="none")
    value = torch.full((4, 300), 1 / 3)
    one.optimizer.set_float32_state(one.params[0], {"master": value})
    assert torch.equal(one.params[0].detach(), value.bfloat16())
    assert "master" not in one.optimizer.state[one.params[0]]


@ENGINES
def test_originals_of_a_cast_become_the_weights(engine):
    model = nn.Linear(300, 4)
    optimizer = engine.wrap(torch.optim.AdamW(model.parameters()), masters="none")
    before = model.weight.detach().clone()
    model = mpcore.cast_model(model, torch.bfloat16, optimizer)
    assert torch.equal(model.weight, before.bfloat16())
    optimizer.backward(model(torch.ones(2, 300).bfloat16()).float().sum())
    optimizer.step()
    assert set(optimizer.state[model.weight]) == {"exp_avg", "exp_avg_sq", "step", "random_key"}


def test_float16_weights_need_masters():
    halves = [nn.Parameter(torch.ones(2).half())]
    engine = Engine("compiled", "fused")
    with pytest.raises(mpcore.ArgumentError, match=r"expected weights of torch.bfloat16 with 'non"):
        engine.wrap(torch.optim.AdamW(halves), masters="none")
    weight = nn.Parameter(torch.ones(2).bfloat16())
    optimizer = engine.wrap(torch.optim.AdamW([weight]), masters="none")
    with pytest.raises(mpcore.ArgumentError, match=r"expected weights of torch.bfloat16 with 'non"):
        optimizer.add_param_group({"params": halves})
    assert len(optimizer.param_groups) == 1


@ENGINES
def test_a_model_that_becomes_float16_is_refused(engine):
    model = nn.Linear(300, 4)
    optimizer = engine.wrap(torch.optim.AdamW(model.parameters()), masters="none")
    with pytest.raises(mpcore.ArgumentError, match=r"expected weights of torch.bfloat16 with 'non"):
        mpcore.cast_model(model, torch.float16, optimizer)


@pytest.mark.parametrize("rule", ["raise"])
def test_writes_to_weights_cannot_be_found_where_there_is_nothing_to_compare(rule):
    weight = nn.Parameter(torch.ones(2).bfloat16())
    with pytest.raises(mpcore.ArgumentError, match="on_weight_edit"):
        Engine("compiled", "fused").wrap(
            torch.optim.AdamW([weight]), masters="none", on_weight_edit=rule
        )
