"""Updates of masters and moments in every store: backends have the bits of the reference."""

import copy

import pytest
from mpcore.backends import compiled, reference

from mpcore_testing.batches import BRAIN, COMBINATIONS, KINDS, make_batch, make_grads
from mpcore_testing.fused import Stepping, normal
from mpcore_testing.kernels import assert_same_bits
from mpcore_testing.stores import kept

#: shapes by their rows: short of a block, one, several, with a rest, longer than a chunk
ROWS = [(3, 256), (2, 300), (5, 512), (1, 1000), (2, 2**16 + 300), (300, 257), (7, 64), (2, 255)]
FLAT = [0, 1, 15, 17, 300, 4097]


def named(values):
    return "-".join(map(str, values[:2]))


def stored(rule_moments, weight, store, moments, make=normal, negative=None):
    """A batch of float32 numbers and the same kept in stores."""
    if moments == "int8":
        plain = make_batch(rule_moments, weight, [r * c for r, c in ROWS], steps=0.0, make=make)
        shaped = [
            plain.masters,
            *([] if weight is None else [plain.weights]),
            *plain.moments,
        ]
        for tensors in shaped:
            tensors[:] = [t.view(shape) for t, shape in zip(tensors, ROWS, strict=True)]
    else:
        plain = make_batch(rule_moments, weight, FLAT, steps=0.0, make=make)
    batch = kept(plain, store, moments, negative)
    batch.offsets = [7 * i for i in range(len(batch.masters))]
    return batch


def stores_for(weight):
    """Masters that a weight can have."""
    if weight is None:
        return ["float32"]
    return ["float32", "split", "none"] if weight == BRAIN else ["float32", "split"]


CASES = [
    (grad, weight, store, moments)
    for grad, weight in COMBINATIONS
    for store in stores_for(weight)
    for moments in ("float32", "bfloat16", "int8")
    if (store, moments) != ("float32", "float32")
]


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize(("grad", "weight", "store", "moments"), CASES)
def test_steps_have_the_bits_of_the_reference(kind, grad, weight, store, moments):
    rule, count, numbers = kind
    batch = stored(count, weight, store, moments)
    pair = [Stepping(b, rule, copy.deepcopy(batch)) for b in (reference, compiled)]
    for step in range(3):
        grads = make_grads(batch, grad, 50 * step, normal)
        for stepping in pair:
            stepping.step(grads, numbers, found_inf=int(step == 1))
    for one, other in zip(*(stepping.batch.everything() for stepping in pair), strict=True):
        assert_same_bits(one, other)
    assert pair[0].saturated.item() == pair[1].saturated.item()
