"""Random bits of roundings: the hash by integers of Python, and how even and independent they are.

Seeds are fixed: a statistic is the same number in each run. Bounds are 5 standard deviations.
"""

import copy
import math

import numpy as np
import pytest
import torch
from mpcore.backends import compiled, reference
from mpcore.stores import WEIGHT_SITE, key_of, offsets_in_memory, random_bits

from mpcore_testing.batches import BRAIN, FULL, make_batch, make_grads
from mpcore_testing.fused import Stepping, normal
from mpcore_testing.kernels import assert_same_bits
from mpcore_testing.stores import kept

BACKENDS = pytest.mark.parametrize("backend", [reference, compiled], ids=["reference", "compiled"])
COUNT = 2**18
KEY = key_of(3, 1)
LION = (1e-3, 0.9, 0.99, 0.1, 1.0)
ADAM = (1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0, 0.0)


def drawn(key=KEY, t=1.0, first=0, site=0, count=COUNT):
    """16 bits for each of a row of offsets."""
    return random_bits(key, torch.tensor(t), torch.arange(first, first + count), site).numpy()


def deviations(counts):
    """How many standard deviations chi-square of equally likely cells is from its mean."""
    expected = counts.sum() / counts.size
    assert expected > 100
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def assert_even(bits):
    """All values, by either byte: a rounding looks at the upper, small fractions at the lower."""
    for byte in (bits >> 8, bits & 0xFF):
        assert abs(deviations(np.bincount(byte, minlength=256))) < 5


def assert_independent(one, other):
    """Pairs of the upper 4 bits and of the lower 4, all 256 equally likely; no correlation."""
    for a, b in ((one >> 12, other >> 12), (one & 15, other & 15), (one >> 12, other & 15)):
        assert abs(deviations(np.bincount(16 * a + b, minlength=256))) < 5
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(one))


def test_words_are_what_integers_of_python_make():
    mask = 2**32 - 1

    def lowbias(x, between=0):
        x ^= x >> 16
        x = x * 0x7FEB352D & mask
        x ^= x >> 15
        x = (x + between) * 0x846CA68B & mask
        return x ^ x >> 16

    for key in (0, 2**64 - 1, KEY, key_of(-5, 2**31)):
        for t, word in ((1, 0), (7, 1), (2**24, 0), (2**31 + 5, 1)):
            low, high = key % 2**32, key // 2**32
            a = lowbias((lowbias(t ^ low) + high + word * 0x9E3779B9) % 2**32)
            b = lowbias(a ^ high)
            offsets = [0, 1, 255, 2**31, 2**32 - 1, 2**32, 2**40 + 3]
            words = [lowbias((offset + a) % 2**32, b) for offset in offsets]
            halves = [[w % 2**16 for w in words], [w // 2**16 for w in words]]
            step = torch.tensor(float(t), dtype=torch.float64)
            for half in (0, 1):
                got = random_bits(key, step, torch.tensor(offsets), 2 * word + half)
                assert got.tolist() == halves[half]


def test_keys_are_those_of_splitmix():
    def next_of(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    keys = {}
    for seed in (0, 1, 2, 77, 2**63, -1):
        for identity in (0, 1, 2, 100):
            mixed = next_of(seed % 2**64 ^ 0x6A09E667F3BCC909)
            expected = next_of((mixed + (identity + 1) * 0x9E3779B97F4A7C15) % 2**64)
            assert key_of(seed, identity) == expected
            keys[expected] = seed, identity
    assert len(keys) == 24


def test_words_of_different_offsets_differ():
    words = drawn(site=0).astype(np.int64) | drawn(site=1).astype(np.int64) << 16
    assert len(np.unique(words)) == COUNT


@pytest.mark.parametrize("site", range(WEIGHT_SITE + 1))
@pytest.mark.parametrize(("key", "t"), [(KEY, 1.0), (key_of(0, 0), 1.0), (key_of(0, 1), 1000.0)])
def test_offsets_draw_evenly(key, t, site):
    assert_even(drawn(key, t, site=site))


@pytest.mark.parametrize("offset", [0, 1, 2**20, 2**32 - 1])
def test_steps_and_parameters_draw_evenly_at_one_offset(offset):
    steps = random_bits(KEY, torch.arange(1, COUNT + 1), torch.tensor(offset), 0).numpy()
    assert_even(steps)
    assert_independent(steps[:-1], steps[1:])
    keys = [
        random_bits(key_of(0, i), torch.tensor(1), torch.tensor(offset), 0) for i in range(4096)
    ]
    counts = np.bincount(torch.stack(keys).numpy() >> 12, minlength=16)
    assert abs(deviations(counts)) < 5


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 16, 64, 255, 256, 1024, 2**14, 2**16])
def test_neighbours_are_independent(distance):
    assert_independent(drawn(), drawn(first=distance))


def test_roundings_of_one_element_are_independent():
    sites = [drawn(site=site) for site in range(WEIGHT_SITE + 1)]
    for i, one in enumerate(sites):
        for other in sites[:i]:
            assert_independent(one, other)


@pytest.mark.parametrize("site", [0, WEIGHT_SITE])
def test_steps_parameters_and_seeds_are_independent(site):
    of_others = [
        *(drawn(t=t, site=site) for t in (2.0, 3.0, 5.0, 257.0, 65537.0)),
        *(drawn(key_of(3, i), site=site) for i in (0, 2, 3, 257)),
        *(drawn(key_of(seed, 1), site=site) for seed in (2, 4, 0, -1)),
    ]
    for other in of_others:
        assert_independent(drawn(site=site), other)


def test_offsets_count_what_lies_in_memory():
    like = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    places = offsets_in_memory(like, 1000)
    flat = torch.empty(like.numel(), dtype=torch.int64)
    flat.as_strided(like.shape, like.stride()).copy_(places)
    assert flat.tolist() == list(range(1000, 1000 + like.numel()))


def of_rows(batch, rows):
    """The shard of a batch of one tensor that has these rows of dimension 0."""
    row = batch.masters[0].numel() // batch.masters[0].shape[0]
    shard = copy.deepcopy(batch)
    shard.masters = [batch.masters[0][rows].clone()]
    shard.moments = [[moment[0][rows].clone()] for moment in batch.moments]
    shard.scales = tuple(s if s is None else [s[0][rows].clone()] for s in batch.scales)
    shard.offsets = [rows.start * row]
    return shard


@BACKENDS
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_shards_of_dimension_0_have_the_bits_of_the_whole(backend, moments):
    plain = make_batch(2, BRAIN, [7 * 300], steps=0.0, make=normal)
    for tensors in (plain.masters, plain.weights, *plain.moments):
        tensors[:] = [tensors[0].view(7, 300)]
    whole = kept(plain, "none", moments)
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    shards = [Stepping(backend, "adam", of_rows(whole, rows)) for rows in parts]
    whole = Stepping(backend, "adam", whole)
    for step in range(3):
        grads = make_grads(whole.batch, BRAIN, step, normal)
        whole.step(grads, ADAM)
        for rows, shard in zip(parts, shards, strict=True):
            shard.step([grads[0][rows].clone()], ADAM)
    of_shards = [[t for t in shard.batch.everything() if t.dim()] for shard in shards]
    of_whole = [t for t in whole.batch.everything() if t.dim()]
    assert len(of_whole) == (3 if moments == "bfloat16" else 5)
    for expected, pieces in zip(of_whole, zip(*of_shards, strict=True), strict=True):
        assert_same_bits(torch.cat(pieces), expected)


@BACKENDS
def test_a_skipped_step_draws_nothing_and_a_step_that_counts_draws_anew(backend):
    made = kept(make_batch(1, BRAIN, [5000], steps=4.0, make=normal), "none", "bfloat16")
    grads = make_grads(made, FULL, 9, normal)
    skipped, straight, later, other = (
        Stepping(backend, "lion", copy.deepcopy(made)) for _ in "1234"
    )
    later.batch.steps[0] += 1
    other.batch.keys[0] ^= 1 << 40
    before = copy.deepcopy(made.everything())
    skipped.step(grads, LION, found_inf=1)
    for one, old in zip(skipped.batch.everything(), before, strict=True):
        assert_same_bits(one, old)
    for each in (skipped, straight, later, Stepping(backend, "lion", other.batch)):
        each.step(grads, LION)
    for one, same in zip(skipped.batch.everything(), straight.batch.everything(), strict=True):
        assert_same_bits(one, same)
    assert straight.batch.steps[0] == 5
    # of numbers that are rounded, half or fewer go the other way
    for unlike in (later, other):
        for one, another in (
            (straight.batch.masters[0], unlike.batch.masters[0]),
            (straight.batch.moments[0][0], unlike.batch.moments[0][0]),
        ):
            assert 0.1 < (one != another).double().mean() < 0.5
