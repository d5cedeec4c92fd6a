"""Errors in `inspect` and `update_scale_`."""

from mutant import mutants

CHUNKS = mutants(
    "_chunks.py",
    ("test_inspect.py", "test_inspect_statistics.py"),
    ("NaN counts as an infinity", "tl.where(is_nan, 1, ", "tl.where(is_nan, 2, "),
    ("the signs of infinities are swapped", "tl.where(bits < 0, 4, 2)", "tl.where(bits < 0, 2, 4)"),
    (
        "chunks invert nothing",
        "coefficient = load_coefficient(coefficient_ptr, inverted)",
        "coefficient = tl.load(coefficient_ptr)",
    ),
    (
        "a product that overflows goes unnoticed",
        "tl.where(loaded, special, 8)",
        "tl.where(loaded, special, 0)",
    ),
    (
        "kinds are looked for one element too long",
        "is_nonfinite_magnitude(magnitude) & (at < count)",
        "is_nonfinite_magnitude(magnitude) & (at <= count)",
    ),
    (
        "the last bad place, not the first",
        "first = tl.minimum(first, tl.where(bad, at, _NOWHERE))",
        "first = tl.maximum(first, tl.where(bad, at, 0))",
    ),
    (
        "the largest is taken among infinities",
        "tl.where(is_nonfinite_magnitude(magnitude), 0, magnitude)",
        "magnitude",
    ),
    (
        "places are counted from the block, not from the chunk",
        "tl.where(bad, at, _NOWHERE)",
        "tl.where(bad, at - start, _NOWHERE)",
    ),
    (
        "a block forgets the kinds before it",
        "kinds |= _kinds_of(bits, bad, GRAD)",
        "kinds = _kinds_of(bits, bad, GRAD)",
    ),
    (
        "places are stored as kinds",
        "tl.store(facts_ptr + chunks + chunk, kinds)",
        "tl.store(facts_ptr + chunks + chunk, first)",
    ),
    (
        "a bad chunk is looked at up to its last block",
        "for start in range(0, count, BLOCK):",
        "for start in range(0, count - BLOCK, BLOCK):",
    ),
    ("mask one too short", "offsets < count\n", "offsets < count - 1\n"),
    ("mask one too long", "offsets < count\n", "offsets <= count\n"),
    (
        "largest before unscaling",
        "tl.max(magnitude_bits(unscaled)",
        "tl.max(magnitude_bits(widen(bits, GRAD))",
    ),
    ("every chunk counts as full", "(count == CHUNK)", "(count > 0)"),
    (
        "chunks of dtypes overwrite each other",
        "chunk = base.to(tl.int64) + tl.program_id(0)",
        "chunk = base.to(tl.int64) * 0 + tl.program_id(0)",
    ),
)
SUMS = mutants(
    "_sums.py",
    ("test_inspect.py", "test_against_reference.py"),
    ("half the units", "70368744177664.0", "35184372088832.0"),
    ("the exponent is one too large", "(bits >> 23) - 127", "(bits >> 23) - 126"),
    ("exponents are not clamped from above", "- 127, -126), 126)", "- 127, -126), 127)"),
    ("a shift ends at 31", "exponent_of(largest)), 63)", "exponent_of(largest)), 31)"),
    (
        "squares overflow",
        "power = ((127 - exponent_of(largest)) << 23)",
        "power = ((127 - 0 * largest) << 23)",
    ),
    (
        "pairs across halves",
        "tl.split(tl.reshape(x, (SIZE // 2, 2)))",
        "tl.split(tl.trans(tl.reshape(x, (2, SIZE // 2))))",
    ),
    ("half of each pair is lost", "return even + odd", "return even + even"),
    (
        "chunks are not brought to one exponent",
        "aligned = sums >> shift.to(tl.int64)",
        "aligned = sums",
    ),
    (
        "the exponent once instead of twice",
        "tl.minimum(2 * (exponent - exponent_of(largest)), 63)",
        "tl.minimum(exponent - exponent_of(largest), 63)",
    ),
    ("the high half is lost", "high.to(tl.float64) * 4294967296.0 + low", "low"),
)
FINISH = mutants(
    "_finish.py",
    ("test_finish.py", "test_inspect.py"),
    ("negative infinities are forgotten", "tl.max(kinds & 4, axis=0)", "tl.max(kinds & 2, axis=0)"),
    (
        "only the first round of chunks is summed",
        "for start in range(0, chunks, BLOCK):\n        at = start + lanes\n        sums",
        "for start in range(0, BLOCK, BLOCK):\n        at = start + lanes\n        sums",
    ),
    (
        "every tensor starts with the first chunk",
        "begin = tl.load(segments_ptr + (program - 1) * 2).to(tl.int32)",
        "begin = 0",
    ),
    (
        "the largest of earlier rounds is lost",
        "largest_lanes = tl.maximum(largest_lanes, tl.load(facts_ptr + at, mask=mask, other=0))",
        "largest_lanes = tl.load(facts_ptr + at, mask=mask, other=0)",
    ),
    ("the kinds of earlier rounds are lost", "kinds_lanes |= kinds", "kinds_lanes = kinds"),
    (
        "the first place of earlier rounds is lost",
        "tl.minimum(first_lanes, tl.where(kinds != 0, place, _NOWHERE))",
        "tl.where(kinds != 0, place, _NOWHERE)",
    ),
    ("a chunk of the next tensor is looked at", "mask = at < chunks\n", "mask = at <= chunks\n"),
    (
        "a NaN makes an infinite norm",
        'tl.where((kinds & 1) == 0, square_sum, float("nan"))',
        "square_sum",
    ),
    (
        "what is inverted is taken as it is",
        "tl.where(inverted != 0, tl.div_rn(1.0, given), given)",
        "given",
    ),
    (
        "everything is inverted",
        "tl.where(inverted != 0, tl.div_rn(1.0, given), given)",
        "tl.div_rn(1.0, given)",
    ),
    (
        "the clip is in what unscales",
        "tl.store(unscale_ptr, coefficient)",
        "tl.store(unscale_ptr, latched)",
    ),
    ("the norm is not rooted", "norm = tl.sqrt(square_sum)", "norm = square_sum"),
    ("the epsilon is forgotten", "limit / (norm + epsilon)", "limit / norm"),
    (
        "the clip scales up",
        "clip = tl.minimum(limit / (norm + epsilon), one)",
        "clip = limit / (norm + epsilon)",
    ),
    ("an overflow clips to nothing", "clip = tl.where(kinds == 0, clip, one)", "clip = clip"),
    ("the coefficient is not latched", "coefficient.to(tl.float64) * clip", "clip"),
    (
        "the place within the chunk alone",
        "place = at.to(tl.int64) * CHUNK + bad",
        "place = at.to(tl.int64) * 0 + bad",
    ),
    (
        "found_inf inverted",
        "tl.store(found_inf_ptr, (kinds != 0)",
        "tl.store(found_inf_ptr, (kinds == 0)",
    ),
    (
        "found_inf sees NaNs alone",
        "tl.store(found_inf_ptr, (kinds != 0)",
        "tl.store(found_inf_ptr, (kinds == 1)",
    ),
    (
        "facts of one tensor stored at the next",
        "tl.store(kinds_ptr + program - 1, kinds)",
        "tl.store(kinds_ptr + program % 2, kinds)",
    ),
    ("a first bad place where there is none", "tl.where(kinds != 0, first, -1)", "first"),
)
STATISTICS = mutants(
    "_statistics.py",
    ("test_inspect_statistics.py",),
    ("infinities count as NaN", "magnitude > exponent, 0", "magnitude >= exponent, 0"),
    ("zeros count as subnormal", "tl.where(magnitude == 0, 3, 4)", "tl.where(magnitude < 0, 3, 4)"),
    (
        "subnormals count as normal",
        "tl.where((bits & exponent) == 0, small, 5)",
        "tl.where(magnitude == 0, small, 5)",
    ),
    (
        "masked lanes are counted",
        "tl.histogram(_category(bits, GRAD), 8, mask=mask)",
        "tl.histogram(_category(bits, GRAD), 8)",
    ),
    (
        "masked lanes are counted by exponent",
        "_EXPONENTS_IN_KERNEL, mask=mask)",
        "_EXPONENTS_IN_KERNEL)",
    ),
    ("negative infinities count as positive", "tl.where(bits < 0, 2, 1)", "1"),
    ("exponents of 16-bit formats as they are", "magnitude >> 23,", "(magnitude >> 23) & 127,"),
    ("bins are shifted by one", "magnitude >> 23, _E", "(magnitude >> 23) ^ 1, _E"),
)
SCALE = mutants(
    "scale.py",
    ("test_scale.py",),
    ("the scale grows one step late", "grow = tracker >= growth", "grow = tracker > growth"),
    (
        "an overflow keeps the tracker",
        "tl.where(bad, 0, tl.load(growth_tracker_ptr) + 1)",
        "tl.load(growth_tracker_ptr) + 1",
    ),
    (
        "the floor is a ceiling",
        "tl.maximum(scale * backoff_factor, min_scale)",
        "tl.minimum(scale * backoff_factor, min_scale)",
    ),
    ("no ceiling", "tl.minimum(scale * growth_factor, max_scale)", "scale * growth_factor"),
    (
        "hysteresis is ignored",
        "tl.where(backs_off, lower, scale)",
        "tl.where(bad, lower, scale)",
    ),
    ("growth keeps the hysteresis used up", "tl.where(full, hysteresis, left)", "left"),
    ("the tracker is kept when the scale grows", "tl.where(grow, 0, tracker)", "tracker"),
    ("found_inf is compared to 1", "tl.load(found_inf_ptr) != 0", "tl.load(found_inf_ptr) == 1"),
    ("hysteresis is used up twice as fast", "tl.maximum(left - 1, 0)", "tl.maximum(left - 2, 0)"),
    ("clean steps always refill", "(refill & 1 != 0) & (bad == 0)", "(bad == 0)"),
    ("clean steps never refill", "(refill & 1 != 0) & (bad == 0)", "(refill < 0)"),
    ("backing off always refills", "(refill & 2 != 0) & backs_off", "backs_off"),
    ("backing off never refills", "(refill & 2 != 0) & backs_off", "(refill < 0)"),
    ("every overflow refills", "(refill & 2 != 0) & backs_off", "(refill & 2 != 0) & bad"),
    ("hysteresis is one overflow short", "bad & (left == 0)", "bad & (left <= 1)"),
    (
        "growth restores one overflow too few",
        "tl.where(full, hysteresis, left)",
        "tl.where(full, hysteresis - 1, left)",
    ),
    (
        "a skipped step is no step",
        "tl.store(counters_ptr, tl.load(counters_ptr) + 1)",
        "tl.store(counters_ptr, tl.load(counters_ptr) + 1 - failed)",
    ),
    (
        "good steps count as skipped",
        "tl.load(counters_ptr + 1) + failed",
        "tl.load(counters_ptr + 1) + 1",
    ),
    ("skips in a row outlive a clean step", "(tl.load(counters_ptr + 2) + 1) * failed", "failed"),
    ("every backing off is one at the minimum", "backs_off & (scale <= min_scale)", "backs_off"),
    (
        "none is at the minimum",
        "backs_off & (scale <= min_scale)",
        "backs_off & (scale < min_scale)",
    ),
    (
        "a tolerated share is too much",
        "many = overflows * of_steps >= since * few",
        "many = of_steps > few",
    ),
    (
        "the share itself is tolerated",
        "many = overflows * of_steps >=",
        "many = overflows * of_steps >",
    ),
    ("only backing off begins to count anew", "((grow | backs_off) == 0)", "(backs_off == 0)"),
    ("only growth begins to count anew", "((grow | backs_off) == 0)", "(grow == 0)"),
)
COUNTS = mutants(
    "_chunks.py",
    ("test_inspect_statistics.py",),
    (
        "counted for another tensor",
        "counters_ptr += index * _COUNTERS",
        "counters_ptr += 0 * index",
    ),
)

REDUCTIONS = [*CHUNKS, *COUNTS, *SUMS, *FINISH, *STATISTICS, *SCALE]
