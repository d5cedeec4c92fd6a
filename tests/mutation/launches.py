"""Errors outside the kernels, in checks and the cache, and those that machine code shows."""

from mutant import mutants

_MASKED = "block = _unscale_block(grad_ptr, out_ptr, (size - start).to(tl.int32),"
_TWICE = """    tl.debug_barrier()
    out += tl.load(grad_ptr + offsets, mask=mask, volatile=True) * 0
    return magnitude_of(out, OUT)"""

CHECKS = mutants(
    "_checks.py",
    ("test_checks.py", "test_devices.py"),
    ("tensors may be on any device", "if tensor.device != device:", "if False:"),
    (
        "states may be on any device",
        "device is not None and tensor.device",
        "False and tensor.device",
    ),
    ("neighbours count as sharing memory", "if start < other[1]:", "if start <= other[1]:"),
    (
        "memory that is only read may be written",
        "other = furthest if is_written else furthest_written",
        "other = furthest_written",
    ),
    ("gaps between elements are overlooked", "if stride != expected:", "if stride < expected:"),
    ("layouts may differ within a pair", "return _steps(first) == _steps(second)", "return True"),
)
CACHE = mutants(
    "_cache.py",
    ("test_cache.py", "test_devices.py"),
    (
        "a capture is looked for on the first device",
        "with torch.cuda.device(device):",
        'with torch.cuda.device(torch.device("cuda", 0)):',
    ),
    (
        "a table is used on any stream",
        "entry is None or entry.stream != stream",
        "entry is None",
    ),
    ("the most recently used table goes first", "popitem(last=False)", "popitem(last=True)"),
    ("strides are not looked at", "Tensor.data_ptr, Tensor.stride,", "Tensor.data_ptr,"),
    ("addresses are not looked at", "Tensor.data_ptr, Tensor.stride,", "Tensor.stride,"),
    (
        "dtypes are not looked at",
        '("shape", "dtype", "device")',
        '("shape", "device")',
    ),
    (
        "devices are not looked at",
        '("shape", "dtype", "device")',
        '("shape", "dtype")',
    ),
    ("the table of a graph may go", "self._held.append(entry)", "self._held.count(entry)"),
    ("a capture builds tables", "if is_capturing(device):", "if False:"),
)
CONTRACTION = mutants(
    "_chunks.py",
    ("test_launches.py",),
    ("contraction is left on", "enable_fp_fusion=False", "enable_fp_fusion=True"),
)
MACHINE_CODE = [
    *mutants(
        "_table.py",
        ("audit unscale fp16 fp32",),
        (
            "full chunks are read without a promise",
            "tl.multiple_of(pointer(address, FORMAT) + start, access_bytes(FORMAT, OTHER))",
            "pointer(address, FORMAT) + start",
        ),
    ),
    *mutants(
        "_dtypes.py",
        ("audit unscale fp16 fp32",),
        (
            "16 bytes of both formats in one access",
            "return 16 * bits // max(bits, other_bits)",
            "return 16",
        ),
    ),
    *mutants(
        "unscale.py",
        ("audit unscale bf16 fp32",),
        (
            "full chunks are masked",
            "block = _unscale_block(grad_ptr, out_ptr, None,",
            _MASKED,
        ),
        (
            "gradients are read twice",
            "    return magnitude_of(out, OUT)",
            _TWICE,
        ),
        (
            "the launch compiles alignments in",
            '"coefficient_ptr", "nonfinite_ptr"]',
            '"coefficient_ptr"]',
        ),
        (
            "the flag is raised by an atomic operation",
            "tl.store(nonfinite_ptr + index, 1)",
            "tl.atomic_max(nonfinite_ptr + index, 1)",
        ),
    ),
    *mutants(
        "cast.py",
        ("audit cast fp32 fp16",),
        ("masked bodies take whole chunks", '("ROUND", ROUND)', '("ROUND", CHUNK)'),
    ),
    *mutants(
        "_chunks.py",
        ("audit inspect fp32 STATISTICS=False",),
        (
            "a sum is written twice",
            "tl.store(sums_ptr + chunk, total)",
            "tl.store(sums_ptr + chunk, total)\n    tl.store(sums_ptr + chunk + chunks, total)",
        ),
        (
            "the maximum is taken twice",
            "if STATISTICS:",
            "largest = tl.max(magnitude_bits(unscaled) & largest, axis=0)\n    if STATISTICS:",
        ),
    ),
    *mutants(
        "_finish.py",
        ("audit finish",),
        (
            "the clip is divided as fast as float32 can",
            "limit / (norm + epsilon)",
            "(limit.to(tl.float32) / (norm + epsilon).to(tl.float32)).to(tl.float64)",
        ),
        (
            "the root is taken as fast as float32 can",
            "norm = tl.sqrt(square_sum)",
            "norm = tl.sqrt(square_sum.to(tl.float32)).to(tl.float64)",
        ),
    ),
]

LAUNCHES = [*CHECKS, *CACHE, *CONTRACTION]
