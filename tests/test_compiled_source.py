"""The C of the compiled backend: conversions, what rules become, and the compiler."""

import subprocess

import mpcore
import pytest
import torch
from mpcore.backends import _c_compiler, _c_source, _c_work
from mpcore.errors import BackendError
from mpcore.updates import RULES

from mpcore_testing.kernels import HALVES, all_patterns, assert_same_bits
from mpcore_testing.rounding import edge_masters, round_by_hand


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("portable", [False, True])
def test_every_16_bit_gradient_is_widened_exactly(dtype, portable):
    patterns = all_patterns(dtype)
    wide = torch.empty(2**16)
    converted("widen", dtype, portable)(patterns.data_ptr(), wide.data_ptr(), 2**16)
    assert_same_bits(wide, patterns.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("portable", [False, True])
def test_masters_at_every_edge_are_rounded_and_counted(dtype, portable):
    masters = edge_masters(dtype)
    expected, clamped = round_by_hand(masters, dtype)
    weights = torch.empty(len(masters), dtype=dtype)
    narrow = converted("narrow", dtype, portable)
    assert narrow(masters.data_ptr(), weights.data_ptr(), len(masters)) == clamped > 0
    # the oracle is for numbers
    expected = torch.where(masters.isnan(), torch.nan, expected.view(dtype))
    assert_same_bits(weights, expected)
    # the fast loop is for blocks in which nothing has to be clamped
    mild = masters[masters.abs() < 6e4]
    for start in range(0, len(mild), 1021):
        part = mild[start : start + 1021].clone()
        assert narrow(part.data_ptr(), weights.data_ptr(), len(part)) == 0
        assert_same_bits(weights[: len(part)], round_by_hand(part, dtype)[0].view(dtype))


def converted(name, dtype, portable):
    """A conversion of `_passes.c`, with the processor's instructions for it or without."""
    source = _c_source.square_sums_source(dtype)
    function = f"{name}_{str(dtype).removeprefix('torch.')}"
    types = ("uint16_t", "float") if name == "widen" else ("float", "uint16_t")
    result = "return " if name == "narrow" else ""
    source += (
        f"{'int64_t' if result else 'void'} exported(const {types[0]} *from, {types[1]} *to, "
        f"int64_t n) {{ {result}{function}(from, to, n); }}\n"
    )
    exported = _c_compiler.load(source, ("PORTABLE",) if portable else ()).exported
    exported.argtypes = [_c_work.ctypes.c_void_p] * 2 + [_c_work.ctypes.c_int64]
    exported.restype = _c_work.ctypes.c_int64 if result else None
    return exported


def test_a_missing_compiler_is_named_when_the_optimizer_is_made(monkeypatch):
    monkeypatch.setattr(_c_compiler, "COMPILERS", ("no-such-compiler",))
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3).half())])
    with pytest.raises(BackendError, match=r"no-such-compiler.*Install one, or pass backend="):
        mpcore.MixedPrecisionOptimizer(inner, backend="compiled")


def test_what_a_compiler_refuses_is_shown():
    with pytest.raises(BackendError, match=r"(?s)to compile.*nonsense.*backend=\"cpu\""):
        _c_compiler.load("nonsense")


def test_compiling_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(_c_compiler.tempfile, "tempdir", str(tmp_path))
    assert _c_compiler.load("int one(void) { return 1; }").one() == 1
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_c_does_not_know_is_refused_by_name():
    class Odd(type(RULES["sgd"])):
        def apply(self, grad, param, moments, s, sqrt=None):
            return torch.tanh(grad), ()

    with pytest.raises(NotImplementedError, match=r"torch\.where.*got tanh"):
        _c_source.step_source(Odd(), 0)


def test_numbers_in_a_rule_are_float32_exactly():
    class Odd(type(RULES["sgd"])):
        def apply(self, grad, param, moments, s, sqrt=None):
            return 1 - (0.1 * grad + 2) / (3 / param), ()

    source = _c_source.step_source(Odd(), 0)
    assert f"(float){(0.1).hex()} * g" in source
    assert "(float)0x1.8000000000000p+1 / p" in source


@pytest.mark.parametrize("dtype", HALVES)
def test_the_loops_are_vectorized(dtype):
    compiler = _c_compiler.find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    if "Free Software Foundation" not in version.stdout:
        pytest.skip("only GCC says which loops it vectorized")
    source = _c_source.update_source("adam", 2, dtype, dtype)
    flags = [*_c_compiler._FLAGS, "-DPORTABLE", "-march=native", "-fopt-info-vec", "-x", "c", "-"]
    done = subprocess.run(
        [compiler, *flags, "-o", "/dev/null"],
        input=source,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {int(line.split(":")[1]) for line in done.stderr.splitlines() if "vectorized" in line}
    texts = source.splitlines()
    loops = {next(t for t in reversed(texts[:n]) if t.startswith("LOOP")) for n in lines}
    name = str(dtype).removeprefix("torch.")
    for expected in ("step_loop(", f"widen_{name}(", f"narrow_{name}("):
        expected = expected.replace("narrow_float16", "narrow_any_float16")
        assert any(expected in loop for loop in loops), (expected, loops)


def test_a_folder_that_cannot_be_written_or_run_from_is_an_error_of_the_backend(monkeypatch):
    monkeypatch.setattr(_c_compiler.tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(BackendError, match=r'folder.*TMPDIR.*backend="cpu"'):
        _c_compiler.load("int two(void) { return 2; }")
