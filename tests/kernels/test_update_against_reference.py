"""Whole fused steps, inspect to loss scale, against the reference backend, bit for bit."""

import pytest
import torch
from mpcore import updates
from mpcore.backends import ScaleMove, reference

import mpcore_kernels
from mpcore_kernels._update_kernel import CHUNK
from mpcore_testing.batches import BRAIN, FULL, HALF, OPTIONS, Move, make_batch, make_grads, scalar
from mpcore_testing.inspections import assert_same_inspection
from mpcore_testing.lengths import in_turn
from mpcore_testing.updates import assert_same_batches

SIZES = [0, 1, 7, 300, CHUNK, CHUNK + 1]
BAD_STEPS = [0, 3]
#: dtypes of gradient and weight, of the batches of one plan
DTYPES = [[(HALF, HALF), (FULL, None)], [(BRAIN, BRAIN)], [(FULL, HALF), (FULL, BRAIN)]]


class Training:
    """Batches of one backend, at one place, and a loss scale."""

    def __init__(self, backend, rule, batches, device):
        self.backend = backend
        self.device = device
        self.batches = [updates.Batch(**vars(batch.on(device))) for batch in batches]
        self.plan = backend.plan_update(rule, self.batches)
        self.move = ScaleMove(**vars(Move.on(device)))
        self.saturated = scalar(0, torch.int64, device)

    def step(self, grads, hyper):
        placed = [[_copy(grad, self.device) for grad in batch] for batch in grads]
        found = self.backend.inspect(
            [grad for batch in placed for grad in batch],
            torch.reciprocal(self.move.scale),
            1.0,
            plan=self.plan,
            hyper=hyper,
        )
        self.backend.update_(
            *(self.plan, placed, found.coefficient, found.found_inf, self.saturated),
            then=self.move,
        )
        return found

    def counts(self):
        move = self.move
        state = [move.scale.item(), move.growth_tracker.item(), move.overflows_left.item()]
        state += move.counters.tolist()
        return [self.saturated.item(), *state]


def _copy(tensor, device):
    return torch.empty_like(tensor, device=device).copy_(tensor)


@pytest.mark.parametrize(("options", "dtypes"), in_turn(OPTIONS, DTYPES))
def test_steps_across_overflows_are_those_of_the_reference(options, dtypes, device):
    rule, moments, numbers = options
    groups = [i % 2 for i in range(len(SIZES))]
    batches = [
        make_batch(moments, weight, SIZES, steps=0.0, groups=groups, seed=i)
        for i, (_, weight) in enumerate(dtypes)
    ]
    ours = Training(mpcore_kernels.Launcher(), rule, batches, device)
    theirs = Training(reference, rule, batches, torch.device("cpu"))
    for step in range(6):
        lr = torch.tensor(0.1 / (step + 1))
        hypers = [
            updates.Hyper((numbers, (0.5 * numbers[0], *numbers[1:])), (lr.to(place), None))
            for place in (device, "cpu")
        ]
        grads = [make_grads(b, d, step) for b, (d, _) in zip(batches, dtypes, strict=True)]
        if step in BAD_STEPS:
            grads[-1][3][17] = torch.nan
        found = [t.step(grads, h) for t, h in zip((ours, theirs), hypers, strict=True)]
        assert_same_inspection(*found)
        assert_same_batches([_plain(b) for b in ours.batches], [_plain(b) for b in theirs.batches])
        assert ours.counts() == theirs.counts()
    assert ours.move.counters[1].item() == len(BAD_STEPS)


def _plain(batch):
    """A batch of the test suite's own kind: it can list its tensors."""
    kind = type(make_batch(0, None, []))
    return kind(**vars(batch))
