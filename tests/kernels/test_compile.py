"""What the compiler makes of every kernel on four GPUs, read from the machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

# older compilers keep every bit and make other code: narrower accesses, more registers, spills
pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason=f"what the machine code promises is stated for triton 3.9, this is {triton.__version__}",
)

TARGETS = ["80", "90", "100", "gfx942"]
VARIANTS = [
    ("_unscale_kernel", "float16", "float16"),
    ("_unscale_kernel", "bfloat16", "bfloat16"),
    ("_unscale_kernel", "float32", "float32"),
    ("_unscale_kernel", "float16", "float32"),
    ("_unscale_kernel", "bfloat16", "float32"),
    ("_cast_kernel", "float32", "float16"),
    ("_cast_kernel", "float32", "bfloat16"),
]
# int64 fields of the table that a program reads, 64 bits wide too
TABLE_READS = {"_unscale_kernel": 6, "_cast_kernel": 5}
ELEMENTS_PER_THREAD = 16
# five programs of 256 threads on an SM of sm_90: 65536 registers / (5 * 256) = 51, in steps of 8
MOST_REGISTERS = 48
AMD_MODES = {
    "round_mode_32": 0,
    "round_mode_16_64": 0,
    "denorm_mode_32": 3,
    "denorm_mode_16_64": 3,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One run of compile_kernels.py, from an empty cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    # the script must find the packages that this process tests
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiled(report):
    return {
        (entry["kernel"], *entry["formats"], entry["target"]): entry for entry in report["compiled"]
    }


def count(entry, *prefixes):
    return sum(n for name, n in entry["instructions"].items() if name.startswith(prefixes))


def wide_accesses(dtype, other):
    """How many 128-bit and 64-bit accesses a thread needs for its elements of one side."""
    if dtype != "float32" and other == "float32":
        return (0, ELEMENTS_PER_THREAD // 4)
    return (ELEMENTS_PER_THREAD // (4 if dtype == "float32" else 8), 0)


# few tests that look at everything: spread over several workers, each would compile it all again
def test_every_kernel_compiles_for_every_gpu(compiled):
    assert set(compiled) == {(*variant, target) for variant in VARIANTS for target in TARGETS}


def test_nothing_spills(compiled):
    assert {key: entry["spilled"] for key, entry in compiled.items() if entry["spilled"]} == {}


@pytest.mark.parametrize("prefix", ["LDG", "STG"])
def test_full_chunks_use_the_widest_accesses_on_sm_90(compiled, prefix):
    for kernel, source, destination in VARIANTS:
        entry = compiled[(kernel, source, destination, "90")]
        found = (count(entry, f"{prefix}.E.128"), count(entry, f"{prefix}.E.64"))
        if prefix == "LDG":
            expected, in_table = wide_accesses(source, destination), TABLE_READS[kernel]
        else:
            expected, in_table = wide_accesses(destination, source), 0
        assert (found[0], found[1] - in_table) == expected, (kernel, source, destination)


def test_alignment_is_promised_for_the_two_pointers_of_full_chunks_alone(compiled):
    for (_, source, destination, _), entry in compiled.items():
        sides = [(source, destination), (destination, source)]
        promised = [16 if wide_accesses(*side)[0] else 8 for side in sides]
        assert entry["promises"] == promised


def test_masked_lanes_are_defined(compiled):
    for entry in compiled.values():
        assert (entry["masked_loads"], entry["undefined_loads"]) == (1, 0)


def test_registers_leave_room_for_enough_threads_on_sm_90(compiled):
    used = {key: entry["registers"] for key, entry in compiled.items() if key[-1] == "90"}
    assert {key: n for key, n in used.items() if n > MOST_REGISTERS} == {}


def test_arithmetic_is_ieee_without_contraction_or_flushed_subnormals(compiled):
    for (kernel, *_, target), entry in compiled.items():
        if target == "gfx942":
            assert count(entry, "v_fma", "v_pk_fma", "v_mac", "v_fmac", "v_mad_f") == 0
            # 3: subnormals in and out; 0: round to nearest even
            modes = {name: entry["modes"][name] for name in AMD_MODES}
            assert modes == AMD_MODES
        else:
            assert count(entry, "FFMA", "HFMA") == 0
            assert not [name for name in entry["instructions"] if "FTZ" in name]
        multiplies = count(entry, "FMUL", "v_mul_f32", "v_pk_mul_f32")
        assert (multiplies > 0) == (kernel == "_unscale_kernel")


def test_only_the_count_is_atomic_and_it_is_an_integer(compiled):
    integer = {"RED.E.ADD.64.STRONG.GPU", "REDG.E.ADD.64.STRONG.GPU", "global_atomic_add_x2"}
    prefixes = ("ATOM", "RED.", "REDG", "global_atomic", "buffer_atomic", "flat_atomic")
    for (kernel, *_), entry in compiled.items():
        atomic = {name for name in entry["instructions"] if name.startswith(prefixes)}
        assert atomic <= integer
        assert bool(atomic) == (kernel == "_cast_kernel")


def test_compiled_kernels_refuse_cpu_tensors(report):
    assert report["refusal"].startswith("tensors: expected a CUDA or ROCm device, got cpu.")
