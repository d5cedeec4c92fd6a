"""The C of the compiled backend: conversions, what rules become, and the compiler."""

import ctypes
import functools

import mpcore
import pytest
import torch
from mpcore.backends import _c_command, _c_compiler, _c_source
from mpcore.errors import BackendError
from mpcore.updates import RULES

from mpcore_testing.kernels import HALVES, all_patterns, assert_same_bits
from mpcore_testing.rounding import edge_masters, round_by_hand


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("portable", [False, True])
def test_every_16_bit_gradient_is_widened_exactly(dtype, portable):
    patterns = all_patterns(dtype)
    wide = torch.empty(2**16)
    widen = conversions(portable)[f"widen_{str(dtype).removeprefix('torch.')}"]
    widen(patterns.data_ptr(), wide.data_ptr(), 2**16)
    assert_same_bits(wide, patterns.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("portable", [False, True])
def test_masters_at_every_edge_are_rounded_and_counted(dtype, portable):
    masters = edge_masters(dtype)
    expected, clamped = round_by_hand(masters, dtype)
    weights = torch.empty(len(masters), dtype=dtype)
    narrow = conversions(portable)[f"narrow_{str(dtype).removeprefix('torch.')}"]
    assert narrow(masters.data_ptr(), weights.data_ptr(), len(masters)) == clamped > 0
    # the oracle is for numbers
    expected = torch.where(masters.isnan(), torch.nan, expected.view(dtype))
    assert_same_bits(weights, expected)


@functools.cache
def conversions(portable):
    """Those of `_numbers.h`, with the processor's instructions for them or without."""
    names = [f"{way}_{str(dtype).removeprefix('torch.')}" for way in SIGNATURES for dtype in HALVES]
    source = "#define PORTABLE\n" if portable else ""
    source += f'#include "{_c_command.SOURCE.with_name("_numbers.h")}"\n'
    for name in names:
        source += SIGNATURES[name.split("_")[0]].format(name)
    library = _c_compiler.load(source)
    found = {name: getattr(library, f"exported_{name}") for name in names}
    for name, function in found.items():
        function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64]
        function.restype = ctypes.c_int64 if name.startswith("narrow") else None
    return found


SIGNATURES = {
    "widen": "void exported_{0}(const uint16_t *from, float *to, int64_t n) "
    "{{ {0}(from, to, n); }}\n",
    "narrow": "int64_t exported_{0}(const float *from, uint16_t *to, int64_t n) "
    "{{ return {0}(from, to, n); }}\n",
}


def test_a_missing_compiler_is_named_when_the_optimizer_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(_c_command, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(_c_command, "BUILT", tmp_path)
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

    with pytest.raises(NotImplementedError, match=r"where, maximum.*got tanh"):
        _c_source.rule_source(Odd(), 0)


def test_scalars_that_c_does_not_know_are_refused_by_name():
    class Odd(type(RULES["sgd"])):
        def scalars(self, numbers, t):
            return (torch.exp(t),)

    with pytest.raises(NotImplementedError, match=r"power, sqrt64, got exp"):
        _c_source.scalars_source(Odd())


def test_numbers_in_scalars_are_float64_exactly():
    class Odd(type(RULES["sgd"])):
        def scalars(self, numbers, t):
            return (torch.where(t == 3, 0.1 / t, 0.3),)

    source = _c_source.scalars_source(Odd())
    assert f"(double){(0.1).hex()} / t" in source
    assert f"(t == (double)0x1.8000000000000p+1) ? t0 : (double){(0.3).hex()}" in source


def test_numbers_in_a_rule_are_float32_exactly():
    class Odd(type(RULES["sgd"])):
        def apply(self, grad, param, moments, s, sqrt=None):
            return 1 - (0.1 * grad + 2) / (3 / param), ()

    source = _c_source.rule_source(Odd(), 0)
    assert f"(float){(0.1).hex()} * g" in source
    assert "(float)0x1.8000000000000p+1 / p" in source


def test_the_steps_in_c_are_those_of_the_rules():
    # if they are not: make c-steps
    assert _c_command.HEADER.read_text() == _c_source.steps_header()


def test_every_number_of_moments_that_options_ask_for_has_a_step():
    kinds = {kind for rule in RULES.values() for kind in rule.optimizers}
    assert len(kinds) == 5
    for kind in kinds:
        for options in ({}, {"momentum": 0.9}, {"amsgrad": True}):
            try:
                group = kind([torch.zeros(1)], lr=0.1, **options).param_groups[0]
            except TypeError:  # an option of another optimizer
                continue
            rule = next(rule for rule in RULES.values() if kind in rule.optimizers)
            assert len(rule.moments(group)) in rule.moment_counts


def test_a_library_is_for_one_source_and_for_this_processor_or_lesser_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(_c_command, "BUILT", tmp_path)
    monkeypatch.setattr(_c_command.platform, "machine", lambda: "x86_64")
    assert _c_command.find_built("AVX512") is None
    name = "passes-{}-" + _c_command.identity() + ".so"
    (tmp_path / "passes-x86-64-v4-0123456789ab.so").touch()  # of an older source
    (tmp_path / name.format("x86-64")).touch()
    for capability in ("AVX512", "AVX2", "DEFAULT", "something new"):
        assert _c_command.find_built(capability) == tmp_path / name.format("x86-64")
    (tmp_path / name.format("x86-64-v4")).touch()
    assert _c_command.find_built("AVX512") == tmp_path / name.format("x86-64-v4")
    for capability in ("AVX2", "DEFAULT", "something new"):
        assert _c_command.find_built(capability) == tmp_path / name.format("x86-64")
    monkeypatch.setattr(_c_command.platform, "machine", lambda: "aarch64")
    assert _c_command.find_built("NEON") is None


@pytest.fixture
def small_source(monkeypatch, tmp_path):
    """Another source, for tests of what becomes of libraries: the real one takes seconds."""
    source = tmp_path / "small.c"
    source.write_text("int one(void) { return 1; }\n")
    monkeypatch.setattr(_c_command, "SOURCE", source)


@pytest.mark.usefixtures("small_source")
def test_building_again_replaces_what_was_built_unless_nothing_works(monkeypatch, tmp_path):
    folder = tmp_path / "built"
    monkeypatch.setattr(_c_command, "BUILT", folder)
    first = _c_command.build_in_place()
    assert first
    (folder / "passes-x86-64-0123456789ab.so").touch()
    assert sorted(_c_command.build_in_place()) == sorted(first) == sorted(folder.iterdir())
    monkeypatch.setattr(_c_command, "COMPILERS", ())
    assert _c_command.build_in_place() == []
    assert sorted(folder.iterdir()) == sorted(first)


@pytest.mark.usefixtures("small_source")
def test_a_compiler_that_cannot_be_run_is_passed_over(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_bytes(b"")
    broken.chmod(0o755)
    real = _c_command.find_compilers()[0]
    monkeypatch.setattr(_c_command, "COMPILERS", (str(broken), real))
    folder = tmp_path / "built"
    folder.mkdir()
    assert _c_command.build_levels(folder)
    monkeypatch.setattr(_c_command, "COMPILERS", (str(broken),))
    assert _c_command.build_levels(folder) == []


def test_auto_is_the_cpu_backend_where_the_library_cannot_be_loaded_or_found(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("this is no library")
    with monkeypatch.context() as patch:
        patch.setattr(_c_compiler, "find_built", lambda: broken)
        patch.setattr(_c_compiler, "passes", _c_compiler.passes.__wrapped__)
        assert not _c_compiler.comes_built.__wrapped__()
    monkeypatch.setattr(_c_command, "SOURCES", (tmp_path / "passes.zip" / "_passes.c",))
    assert _c_compiler.find_built() is None  # as in an archive
    assert not _c_compiler.comes_built.__wrapped__()


def test_a_library_that_cannot_be_loaded_is_an_error_of_the_backend(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("this is no library")
    monkeypatch.setattr(_c_compiler, "find_built", lambda: broken)
    with pytest.raises(BackendError, match=r'broken\.so.*backend="cpu"'):
        _c_compiler.passes.__wrapped__()


def test_an_installation_brings_the_library_and_takes_it(monkeypatch):
    assert _c_compiler.find_built() is not None, "install it again: pip install -e ."
    monkeypatch.setattr(_c_compiler, "load", None)  # compiles nothing
    library = _c_compiler.passes.__wrapped__()
    assert library.update
    assert library.square_sums


def test_a_folder_that_cannot_be_written_or_run_from_is_an_error_of_the_backend(monkeypatch):
    monkeypatch.setattr(_c_compiler.tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(BackendError, match=r'folder.*TMPDIR.*backend="cpu"'):
        _c_compiler.load("int two(void) { return 2; }")
