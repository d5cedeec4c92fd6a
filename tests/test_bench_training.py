"""`mpcore bench --train` and `--host`: bytes counted by hand, no times asserted."""

from __future__ import annotations

import pytest
import torch
from mpcore.bench import host, training
from mpcore.bench.training import TrainSettings, run_training, saved_bytes, train_table
from mpcore.demo.model import GPTConfig
from mpcore.demo.regimes import AdamWSettings, prepare
from mpcore.loss_scale import DynamicLossScale
from torch import nn

TINY = TrainSettings(GPTConfig(vocabulary=16, context=8, width=8, heads=2, layers=1), batch=2)


def test_a_storage_saved_twice_counts_once_and_parameters_do_not_count():
    weight = nn.Parameter(torch.ones(3))
    values = torch.ones(10)[:3]  # the storage has 40 bytes
    assert saved_bytes(lambda: (weight * values) + (weight * values), [weight]) == 40
    assert saved_bytes(lambda: weight * values, []) == 40
    assert saved_bytes(lambda: weight * weight, [weight]) == 0


@pytest.mark.parametrize(
    ("regime", "weights", "state", "activations"),
    [
        # Linear(4, 3) without bias on 5 rows: input 60 B wide or 40 B half, output of tanh
        (training.FP32, 48, 96, 5 * 4 * 4 + 5 * 3 * 4),
        (training.FP16_MASTERS, 24, 48 + 96, 5 * 4 * 2 + 5 * 3 * 2),
        (training.BF16_MASTERS, 24, 48 + 96, 5 * 4 * 2 + 5 * 3 * 2),
        (training.FP16_SPLIT, 24, 24 + 96, 5 * 4 * 2 + 5 * 3 * 2),
        (training.BF16_SPLIT, 24, 24 + 96, 5 * 4 * 2 + 5 * 3 * 2),
        (training.BF16_SPLIT_BF16, 24, 24 + 48, 5 * 4 * 2 + 5 * 3 * 2),
        (training.BF16_NONE_BF16, 24, 48, 5 * 4 * 2 + 5 * 3 * 2),
        # rows of 4 numbers fill no block of 8 bits
        (training.BF16_SPLIT_INT8, 24, 24 + 48, 5 * 4 * 2 + 5 * 3 * 2),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_bytes_of_a_tiny_module_are_those_counted_by_hand(regime, weights, state, activations):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh())
    adamw = AdamWSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    model, engine = prepare(model, regime, adamw, DynamicLossScale(init=2.0))
    inputs = torch.ones(5, 4, dtype=regime.weights)
    found = training.measure(regime, model, engine, lambda: model(inputs).sum(), TINY)
    assert found.parameters == 12
    assert (found.weights, found.gradients, found.state) == (weights, weights, state)
    assert found.activations == activations
    assert found.total == 2 * weights + state + activations
    assert found.seconds is None


def test_training_table_shows_shares_of_fp32_and_no_time_on_a_cpu():
    measured = run_training(TINY)
    assert [row.regime for row in measured] == list(training.REGIMES)
    table = train_table(measured, TINY)
    assert table.rows[0][5:] == ("100.0%", "100.0%")
    assert "ms" not in table.header
    assert any("No times" in note for note in table.notes)
    fp32, fp16, fp16_split, bf16, bf16_split, *compact, autocast = measured
    assert fp16.activations == bf16.activations < autocast.activations < fp32.activations
    split_half, split_codes, none_half, none_codes = (row.state for row in compact)
    assert none_half < split_half < bf16_split.state
    assert (split_half, none_half) == (split_codes, none_codes)  # rows of 32 at most: no 8 bits
    assert {row.activations for row in compact} == {bf16.activations}
    for split, whole in ((fp16_split, fp16), (bf16_split, bf16)):
        assert split.activations == whole.activations
        assert 0 < whole.state - split.state < whole.weights  # of weights that are 16-bit


def test_a_step_of_the_demo_takes_the_share_of_fp32_that_its_page_states():
    measured = {row.regime: row for row in run_training(TrainSettings())}
    fp32 = measured[training.FP32]
    shares = {regime.key: row.total / fp32.total for regime, row in measured.items()}
    assert shares["bf16-split-bf16"] <= 0.57
    assert shares["bf16-split-int8"] <= 0.53
    # a loss in FP32 and statistics of rows are all that is above one half
    assert measured[training.BF16_MASTERS].activations <= 0.52 * fp32.activations
    # two codes and their scales; vectors, a hundredth of all, have none
    codes = measured[training.BF16_NONE_INT8]
    assert 2 * codes.parameters < codes.state <= 2.1 * codes.parameters


def test_host_time_is_measured_for_all_and_leaves_torch_as_it_was():
    before = torch._fused_adamw_
    measured = host.run_host(torch.device("cpu"), 1, "reference", tensors=8)
    assert torch._fused_adamw_ is before
    assert [time.label for time in measured][-1] == "torch AdamW(fused=True): step"
    assert all(time.bare > 0 and time.whole > 0 for time in measured)
    table = host.host_table(measured, 8)
    assert table.rows[-1][2] == table.rows[-1][4] == "1.00x"


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("make", ["mpcore", "torch"])
def test_a_step_without_kernels_changes_nothing(make, bare):
    device = torch.device("cpu")
    if make == "mpcore":
        steps = host._mpcore(device, "reference", 8, bare, clip=True)
        cells = dict(zip(steps.step.__code__.co_freevars, steps.step.__closure__, strict=True))
        optimizer = cells["optimizer"].cell_contents
    else:
        steps = host._torch(device, 8, bare)
        optimizer = steps.step.__self__
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert len({group["lr"] for group in optimizer.param_groups}) == host.GROUPS
    steps.before()
    host._host_seconds(steps, device)
    assert all(bool((param == 0).all()) == bare for param in params)
