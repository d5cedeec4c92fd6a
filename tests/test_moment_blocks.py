"""Moments in 8 bits against float64 of NumPy: how far off, how right on average, at which sizes.

With N the largest code, M the largest magnitude of a block and u = M / N^2, codes stand for q^2 u.
A number x = t^2 u lies between the codes q = floor(t) and q + 1, which are (2 q + 1) u apart:

    one draw        |error| < (2 q + 1) u
    nearest code    |error| <= (2 q + 1) u / 2
    all draws       |error of the mean| <= (2 q + 1) u / 2^17: probabilities come in 65536 parts

Float32 adds less than 2^-20 (q + 1)^2 u: of t three roundings, 2^-22 of it, and as much of the root
of what is read back. Below 2^-126 a number is a multiple of 2^-149.
"""

from collections import namedtuple

import numpy as np
import pytest
import torch
from mpcore.stores import blocks, moment_store

from mpcore_testing import c_stores

STORES = pytest.mark.parametrize("stores", [blocks, c_stores], ids=["reference", "compiled"])
DTYPES = pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
Codes = namedtuple("Codes", "lower unit")


def magnitudes(row, seed):
    """Float32 numbers of 12 decades below their largest, 1, uniform ones among them."""
    random = np.random.default_rng(seed)
    numbers = np.where(
        random.random(row) < 0.5, random.random(row), 10.0 ** random.uniform(-12, 0, row)
    )
    numbers[random.integers(row)] = 1.0
    return numbers


def sample(dtype, rows=4, row=700, scale=1.0):
    """Rows of several blocks, the last one short, as float32; signs where there are any."""
    numbers = np.stack([magnitudes(row, seed) for seed in range(rows)]) * scale
    if dtype == torch.int8:
        numbers *= np.random.default_rng(9).choice([-1, 1], numbers.shape)
    return torch.from_numpy(numbers.astype(np.float32))


def codes_of(value, dtype):
    """The lower codes of float32 numbers and the unit of their block, in float64."""
    most = 127 if dtype == torch.int8 else 255
    exact = np.abs(value.double().numpy())
    lower, unit = np.empty_like(exact), np.empty_like(exact)
    for first in range(0, exact.shape[1], 256):
        part = np.s_[:, first : first + 256]
        unit[part] = exact[part].max(axis=1, keepdims=True) / most**2
        with np.errstate(invalid="ignore"):
            lower[part] = np.floor(np.nan_to_num(np.sqrt(exact[part] / unit[part])))
    return Codes(lower, unit)


def slack(value, dtype):
    """What float32 may add to an error."""
    lower, unit = codes_of(value, dtype)
    return (lower + 1) ** 2 * unit * 2.0**-20 + 2.0**-148


def came_back(stores, value, dtype, bits):
    codes, scales = stores.encode_blocks(value, dtype, bits)
    return stores.decode_blocks(codes, scales).double().numpy()


def draws(shape, seed=0):
    return torch.randint(2**16, shape, generator=torch.Generator().manual_seed(seed))


SCALES = [1.0, 1e-38, 3.4e38, 1e38, 2.0**-130, 2.0**-149 * 40000, 1e-6, 7e4]


@STORES
@DTYPES
@pytest.mark.parametrize("scale", SCALES)
def test_numbers_of_any_size_come_back_within_their_two_codes(stores, dtype, scale):
    value = sample(dtype, scale=scale)
    lower, unit = codes_of(value, dtype)
    exact = value.double().numpy()
    for seed in range(3):
        error = np.abs(came_back(stores, value, dtype, draws(value.shape, seed)) - exact)
        least = unit if dtype == torch.uint8 else 0.0  # no root of 0 divides
        assert (error <= np.maximum((2 * lower + 1) * unit, least) + slack(value, dtype)).all()
        most = 127 if dtype == torch.int8 else 255
        assert (error / (unit * most**2) < 2 / most + 2.0**-19).all()


@DTYPES
@pytest.mark.parametrize("scale", SCALES)
def test_the_nearer_code_is_at_most_half_as_far(dtype, scale):
    value = sample(dtype, scale=scale)
    lower, unit = codes_of(value, dtype)
    error = np.abs(came_back(blocks, value, dtype, None) - value.double().numpy())
    # a uint8 number that is not 0 is at least 1
    apart = (2 * lower + 1) * unit / np.where((lower == 0) & (dtype == torch.uint8), 1, 2)
    assert (error <= apart + slack(value, dtype)).all()


@STORES
@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e38])
def test_the_mean_over_all_draws_is_the_number(stores, dtype, scale):
    most = 127 if dtype == torch.int8 else 255
    roots = [0.3, 0.9, 1.01, 1.5, 2.0, 2.7, 6.3, 9.99, 17.77, 40.2, 77.7, 100.5, 120.2]
    roots = np.array([*roots, most - 0.4, most - 1, most])
    numbers = (roots / most) ** 2 * scale
    if dtype == torch.int8:
        numbers[:8] *= -1
    # each of 4096 blocks has all numbers 16 times, each time with another draw
    value = torch.from_numpy(numbers.astype(np.float32)).repeat(1, 2**16)
    bits = torch.arange(2**16).repeat_interleave(16).unsqueeze(0)
    mean = came_back(stores, value, dtype, bits).reshape(2**16, 16).mean(axis=0)
    lower, unit = (each[0, :16] for each in codes_of(value[:, :256], dtype))
    error = np.abs(mean - value[0, :16].double().numpy())
    bound = (2 * lower + 1) * unit * 2.0**-17 + slack(value[:, :256], dtype)[0, :16]
    if dtype == torch.uint8:
        # below the first code, which they become
        assert np.allclose(mean[:2], unit[:2], rtol=1e-5, atol=0)
        error, bound = error[2:], bound[2:]
    assert (error <= bound).all()


@STORES
def test_parts_of_many_numbers_are_right_on_average(stores):
    # were draws the lower ends of their parts, the mean would be half a part, 0.5, too large
    numbers = (np.random.default_rng(4).uniform(1, 60, 4096) / 255) ** 2
    numbers[::256] = 1.0
    value = torch.from_numpy(numbers.astype(np.float32)).view(16, 256)
    lower, unit = codes_of(value, torch.uint8)
    counts = np.zeros(value.shape)
    # a part is one draw: only those around the one where codes change are looked at
    t = np.sqrt(value.double().numpy() / unit)
    parts = (t - lower) * (t + lower) / (2 * lower + 1) * 2**16
    nearby = np.clip(np.floor(parts) - 8, 0, 2**16 - 17)
    for offset in range(17):
        bits = torch.from_numpy(nearby + offset).to(torch.int64)
        codes, _ = stores.encode_blocks(value, torch.uint8, bits)
        counts += codes.numpy() > lower
    excess = (nearby + counts - parts)[value.numpy() < 1]
    assert np.abs(excess).max() < 1
    # uniform within half a part to either side: sd 0.29, of 4080 of them 0.0045
    assert abs(excess.mean()) < 0.03


@STORES
@DTYPES
def test_a_block_of_zeros_stays_one_and_signs_of_zeros_go(stores, dtype):
    value = torch.zeros(2, 300)
    value[0, 0] = -0.0
    codes, scales = stores.encode_blocks(value, dtype, draws(value.shape))
    assert not codes.any()
    assert scales.tolist() == [[0.0, 0.0]] * 2
    assert stores.decode_blocks(codes, scales).view(torch.int32).tolist() == [[0] * 300] * 2


@STORES
@DTYPES
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_block_that_is_not_finite_is_nan_as_a_whole_and_no_other_is(stores, dtype, bad):
    value = sample(dtype)
    expected = came_back(stores, value, dtype, draws(value.shape))
    value[1, 300] = bad
    codes, scales = stores.encode_blocks(value, dtype, draws(value.shape))
    assert scales.isnan().nonzero().tolist() == [[1, 1]]
    assert not codes[1, 256:512].any()
    got = stores.decode_blocks(codes, scales).double().numpy()
    broken = np.zeros(got.shape, bool)
    broken[1, 256:512] = True
    assert np.isnan(got[broken]).all()
    assert np.array_equal(got[~broken], expected[~broken])


@STORES
@DTYPES
@pytest.mark.parametrize("small", [1.0, 1e-3, 2.0**-149])
def test_one_huge_number_takes_the_codes_of_its_block_alone(stores, dtype, small):
    value = torch.full((1, 512), small)
    value[0, 5] = 3.4028234663852886e38
    got = came_back(stores, value, dtype, torch.full(value.shape, 2**15))
    assert abs(got[0, 5] / 3.4028234663852886e38 - 1) < 2.0**-20
    others = np.arange(256) != 5
    # of the others nothing is left, or where roots divide the first code: they step too little
    first = 3.4028234663852886e38 / 255**2 if dtype == torch.uint8 else 0.0
    assert np.allclose(got[0, :256][others], first, rtol=1e-6, atol=0)
    assert np.allclose(got[0, 256:], small, rtol=1e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 3e-19, 2.0**-60, 1.8e19])
def test_every_code_comes_back_when_nothing_is_drawn(dtype, scale):
    numbers = torch.arange(-127, 128) if dtype == torch.int8 else torch.arange(256)
    codes = numbers.to(dtype).unsqueeze(0)
    scales = torch.tensor([[scale]])
    again, same = blocks.encode_blocks(blocks.decode_blocks(codes, scales), dtype)
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


@STORES
@DTYPES
def test_a_uint8_number_above_0_never_becomes_it_and_an_int8_one_keeps_its_sign(stores, dtype):
    value = sample(dtype, row=256)
    for seed in range(4):
        codes, _ = stores.encode_blocks(value, dtype, draws(value.shape, seed))
        if dtype == torch.uint8:
            assert (codes > 0).all()
        else:
            assert ((codes.sign() == value.sign()) | (codes == 0)).all()


@STORES
@DTYPES
@pytest.mark.parametrize("row", [1, 100, 255, 256, 257, 511, 513])
def test_blocks_begin_anew_at_each_row_and_the_last_may_be_short(stores, dtype, row):
    # largest numbers of rows far apart: a scale of another row would show
    value = sample(dtype, rows=5, row=row) * torch.tensor(10.0) ** torch.arange(5).unsqueeze(1)
    bits = draws(value.shape)
    codes, scales = stores.encode_blocks(value, dtype, bits)
    assert scales.shape == (5, -(-row // 256))
    for i in range(5):
        for j in range(scales.shape[1]):
            part = value[i, 256 * j : 256 * (j + 1)].double().abs().max().sqrt()
            assert scales[i, j] == part.float()
    for rows in (slice(0, 2), slice(2, 5)):
        alone, of_shard = stores.encode_blocks(value[rows], dtype, bits[rows].contiguous())
        assert torch.equal(alone, codes[rows])
        assert torch.equal(of_shard, scales[rows])


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((256,), (1,), "bfloat16"),
        ((), (), "bfloat16"),
        ((10, 63), (63, 1), "bfloat16"),
        ((10, 64), (64, 1), "int8"),
        ((10, 3, 100), (300, 100, 1), "int8"),
        ((10, 3, 100), (300, 1, 3), "int8"),
        ((300, 300), (1, 300), "bfloat16"),
        ((1, 300), (1, 1), "int8"),
        ((0, 300), (300, 1), "int8"),
    ],
)
def test_what_has_no_whole_block_in_a_row_gets_bfloat16(shape, stride, expected):
    unsigned = {"int8": "uint8"}.get(expected, expected)
    assert moment_store("int8", shape, stride).name == expected
    assert moment_store("int8", shape, stride, negative=False).name == unsigned
    for name in ("float32", "bfloat16"):
        assert moment_store(name, shape, stride).name == name
