"""Errors in the kernels that change tensors, and in what all kernels share."""

from mutant import mutants

_ROUND = "(0x7FFF + ((bits >> 16) & 1))"
_NAN = "tl.where(is_nan, bits | 0x00400000, rounded)"
_FINITE = "clamped = (magnitude >= bound) & (magnitude < 0x7F800000)"
_INFINITE = "if largest == (0x7F800000 if OUT.is_fp32() else 0x7C00 if OUT.is_fp16() else 0x7F80):"
_OTHER = "other=None if count is None else 0"

DTYPES = mutants(
    "_dtypes.py",
    ("test_dtypes.py", "test_cast.py", "test_unscale.py"),
    ("bfloat16 rounds ties away from zero", _ROUND, "0x8000"),
    ("bfloat16 rounds ties towards zero", _ROUND, "0x7FFF"),
    ("bfloat16 truncates", _ROUND, "0"),
    ("bfloat16 rounds NaNs like numbers", _NAN, "rounded"),
    ("bfloat16 keeps NaNs unquieted", _NAN, "tl.where(is_nan, bits, rounded)"),
    ("infinity counts as NaN when rounded", "0x7FFFFFFF) > 0x7F8", "0x7FFFFFFF) >= 0x7F8"),
    ("a negative NaN rounds like a number", "(bits & 0x7FFFFFFF) > 0x7F8", "bits > 0x7F8"),
    (
        "bfloat16 is widened by a place too few",
        "bits.to(tl.int32) << 16",
        "bits.to(tl.int32) << 15",
    ),
    ("float16 is clamped to the value below the largest", "0x477FE000 if", "0x477FC000 if"),
    ("bfloat16 is clamped to the value below the largest", "else 0x7F7F0000", "else 0x7F7E0000"),
    ("float16 clamps from one place later", "0x477FF000 if", "0x477FF001 if"),
    ("float16 clamps from one place earlier", "0x477FF000 if", "0x477FEFFF if"),
    ("bfloat16 clamps from one place later", "else 0x7F7F8000", "else 0x7F7F8001"),
    ("bfloat16 clamps from one place earlier", "else 0x7F7F8000", "else 0x7F7F7FFF"),
    ("infinities are clamped", _FINITE, _FINITE.replace("< 0x7F", "<= 0x7F")),
    ("NaNs are clamped", _FINITE, "clamped = magnitude >= bound"),
    ("clamping loses the sign", "sign | largest", "largest"),
    (
        "a negative product loses its sign",
        "narrow(tl.abs(x), FORMAT) | sign",
        "narrow(tl.abs(x), FORMAT)",
    ),
    ("magnitudes keep their sign", "(bits & unsigned).to(tl.int32)", "bits.to(tl.int32)"),
    ("exponent mask one bit short", "- (1 << format.fp_m", "- (2 << format.fp_m"),
    ("only an infinity is not finite", "(bits & exponent) == exponent", "bits == exponent"),
)
TABLE = mutants(
    "_table.py",
    ("test_table.py", "test_unscale.py"),
    ("the last chunk of a tensor is dropped", "first + -(-size // CHUNK)", "first + size // CHUNK"),
    ("one chunk too many", "first + -(-size // CHUNK)", "first + size // CHUNK + 1"),
    (
        "an element at each chunk border is skipped",
        "(entry + 3)) * CHUNK",
        "(entry + 3)) * (CHUNK + 1)",
    ),
    (
        "offsets of 32 bits",
        "(program - tl.load(entry + 3))",
        "(program - tl.load(entry + 3)).to(tl.int32)",
    ),
    (
        "index within the group, not in the list",
        "size, first, index)",
        "size, first, len(groups.get(key, [])))",
    ),
    ("the size is read from another column", "tl.load(entry + 2)", "tl.load(entry + 3)"),
    (
        "tensors are grouped by their sources alone",
        "key = (source.dtype, destination.dtype)",
        "key = (source.dtype, source.dtype)",
    ),
    (
        "the other format's alignment is not looked at",
        "address % access_bytes(FORMAT, OTHER) == 0",
        "address % access_bytes(FORMAT, FORMAT) == 0",
    ),
    ("the flag of another tensor is raised", "tl.load(entry + 4)", "tl.load(entry + 3)"),
    (
        "source and destination swapped",
        "destination = tl.load(entry + 1)",
        "destination = tl.load(entry)",
    ),
    ("tensors of one element are skipped", "if size == 0:", "if size <= 1:"),
    (
        "alignment is promised for every address",
        "address % access_bytes(FORMAT, OTHER) == 0",
        "address % 2 == 0",
    ),
    (
        "autograd is not told of writes",
        "torch.autograd.graph.increment_version(tensor)",
        "tensor.requires_grad",
    ),
)
OFFSETS = [
    *mutants(
        "_table.py",
        ("test_long_tensors.py",),
        (
            "full chunks start at 32 bits of their offset",
            "pointer(address, FORMAT) + start,",
            "pointer(address, FORMAT) + start.to(tl.int32),",
        ),
    ),
    *mutants(
        "unscale.py",
        ("test_long_tensors.py",),
        (
            "masked reads start at 32 bits of their offset",
            "pointer(grad, GRAD) + start",
            "pointer(grad, GRAD) + start.to(tl.int32)",
        ),
        (
            "masked writes start at 32 bits of their offset",
            "pointer(out, OUT) + start",
            "pointer(out, OUT) + start.to(tl.int32)",
        ),
    ),
    *mutants(
        "cast.py",
        ("test_long_tensors.py",),
        (
            "masked writes start at 32 bits of their offset",
            "pointer(weight, WEIGHT) + start",
            "pointer(weight, WEIGHT) + start.to(tl.int32)",
        ),
    ),
    *mutants(
        "_finish.py",
        ("test_long_tensors.py",),
        ("places are counted in 32 bits", "at.to(tl.int64) * CHUNK", "at * CHUNK"),
    ),
]
UNSCALE = mutants(
    "unscale.py",
    ("test_unscale.py", "test_against_reference.py"),
    ("mask one too long", "offsets < count", "offsets <= count"),
    ("mask one too short", "offsets < count", "offsets < count - 1"),
    ("mask inverted", "offsets < count", "offsets >= count"),
    (
        "a chunk one element short counts as full",
        "(start + CHUNK <= size)",
        "(start + CHUNK <= size + 1)",
    ),
    ("every chunk counts as full", "(start + CHUNK <= size)", "(start < size)"),
    ("masked lanes load an infinity", _OTHER, "other=None if count is None else 0x7C00"),
    ("no flag is ever raised", "if is_nonfinite(largest, OUT):", "if largest == -1:"),
    (
        "the flag is raised when all is well",
        "if is_nonfinite(largest, OUT):",
        "if not is_nonfinite(largest, OUT):",
    ),
    ("a NaN alone raises no flag", "if is_nonfinite(largest, OUT):", _INFINITE),
    ("the flag is not 1", "nonfinite_ptr + index, 1)", "nonfinite_ptr + index, 2)"),
    (
        "later chunks clear the flag",
        "    if is_nonfinite(largest, OUT):\n        tl.store(nonfinite_ptr + index, 1)",
        "    tl.store(nonfinite_ptr + index, is_nonfinite(largest, OUT).to(tl.int32))",
    ),
    ("the flag looks at what was loaded", "magnitude_of(out, OUT)", "magnitude_of(bits, GRAD)"),
    (
        "only if all of a full chunk is non-finite is it flagged",
        "tl.max(block, axis=0)",
        "tl.min(block, axis=0)",
    ),
    (
        "only if all of the lanes saw a bad value is it flagged",
        "tl.max(lanes, axis=0)",
        "tl.min(lanes, axis=0)",
    ),
    ("masked bodies stop after a round", "range(0, count, ROUND)", "range(0, ROUND, ROUND)"),
    ("rounds overlap by one", "range(0, count, ROUND)", "range(0, count, ROUND - 1)"),
    (
        "an element between rounds is skipped",
        "range(0, count, ROUND)",
        "range(0, count, ROUND + 1)",
    ),
    ("every round is masked like the first", "count - at, coefficient", "count, coefficient"),
    ("a round forgets what those before found", "tl.maximum(lanes, block)", "block"),
    (
        "masked bodies write where they read",
        "out_ptr = pointer(out, OUT) + start",
        "out_ptr = pointer(grad, OUT) + start",
    ),
    ("adds instead of multiplying", "GRAD) * coefficient", "GRAD) + coefficient"),
    (
        "the coefficient is rounded to float16",
        "GRAD) * coefficient",
        "GRAD) * coefficient.to(tl.float16).to(tl.float32)",
    ),
    ("the flags' version is not raised", "mark_written(*grads, nonfinite)", "mark_written(*grads)"),
)
CAST = mutants(
    "cast.py",
    ("test_cast.py", "test_against_reference.py"),
    ("found_inf is ignored", "tl.load(found_inf_ptr) == 0", "tl.load(found_inf_ptr) != 12345"),
    ("found_inf is compared to 1", "tl.load(found_inf_ptr) == 0", "tl.load(found_inf_ptr) != 1"),
    (
        "a negative found_inf is ignored",
        "tl.load(found_inf_ptr) == 0",
        "tl.load(found_inf_ptr) <= 0",
    ),
    ("mask one too long", "offsets < count", "offsets <= count"),
    ("mask one too short", "offsets < count", "offsets < count - 1"),
    ("every chunk counts as full", "(start + CHUNK <= size)", "(start < size)"),
    ("masked lanes are counted", _OTHER, "other=None if count is None else 0x7F7FFFFF"),
    ("a full chunk counts at most one", "tl.sum(block, axis=0)", "tl.max(block, axis=0)"),
    ("masked bodies count by lanes", "tl.sum(lanes, axis=0)", "tl.sum((lanes != 0).to(tl.int32))"),
    ("masked bodies stop after a round", "range(0, count, ROUND)", "range(0, ROUND, ROUND)"),
    (
        "an element between rounds is skipped",
        "range(0, count, ROUND)",
        "range(0, count, ROUND + 1)",
    ),
    ("every round is masked like the first", "count - at, MASTER", "count, MASTER"),
    ("a round forgets what those before counted", "lanes += _cast", "lanes = _cast"),
    (
        "clamps to the range of bfloat16 always",
        "saturate(widen(bits, MASTER), WEIGHT)",
        "saturate(widen(bits, MASTER), MASTER)",
    ),
    (
        "the count is overwritten",
        'tl.atomic_add(saturated_ptr, clamped.to(tl.int64), sem="relaxed")',
        "tl.store(saturated_ptr, clamped.to(tl.int64))",
    ),
    (
        "what is clamped is not stored",
        "narrow(master, WEIGHT)",
        "narrow(widen(bits, MASTER), WEIGHT)",
    ),
    (
        "the count's version is not raised",
        "mark_written(*weights, saturated)",
        "mark_written(*weights)",
    ),
)
ELEMENTWISE = [*DTYPES, *TABLE, *OFFSETS, *UNSCALE, *CAST]
