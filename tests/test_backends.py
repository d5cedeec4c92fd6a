"""The reference backend against NumPy over every 16-bit pattern, and the choice of a backend."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.backends import NAMES, _c_command, compiled, cpu, reference, resolve, why_not_release
from mpcore.backends._c_compiler import comes_built
from mpcore.errors import ArgumentError, BackendError

HALF = [torch.float16, torch.bfloat16]
COEFFICIENTS = [1.0, 2.0**-16, 2.0**-24, 0.3 * 2.0**-16, 2.0**-126, 2.0**126, 1e-3, 0.0]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is an optional dependency"
)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(256, 256)


def widened(bits: torch.Tensor) -> np.ndarray:
    """The float32 values of a 16-bit tensor, by NumPy (bfloat16: the upper half of a float32)."""
    patterns = bits.view(torch.int16).numpy().view(np.uint16)
    if bits.dtype == torch.float16:
        return patterns.view(np.float16).astype(np.float32)
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The 16-bit patterns of float32 values rounded to nearest even, without clamping."""
    if dtype == torch.float16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def patterns_of(tensor: torch.Tensor) -> np.ndarray:
    size = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(size).numpy().view(f"uint{8 * tensor.element_size()}")


def assert_same_bits(tensor: torch.Tensor, expected: np.ndarray) -> None:
    """Compares patterns; any NaN equals any NaN, whose payloads are not part of the contract."""
    both_nan = tensor.float().isnan().numpy() & np.isnan(
        expected.view(np.float32)
        if expected.dtype == np.uint32
        else widened(torch.from_numpy(expected.view(np.int16)).view(tensor.dtype))
    )
    assert np.array_equal(
        np.where(both_nan, 0, patterns_of(tensor)), np.where(both_nan, 0, expected)
    )


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("dtype", HALF)
def test_unscale_into_equals_numpy_on_every_pattern(dtype: torch.dtype, coefficient: float) -> None:
    grads = every_pattern(dtype)
    rows, out = list(grads.clone().unbind()), torch.empty(256, 256)
    flags = torch.zeros(256, dtype=torch.int32)
    reference.unscale_into(rows, list(out.unbind()), torch.tensor(coefficient), flags)
    product = widened(grads) * np.float32(coefficient)
    assert_same_bits(out, product.view(np.uint32))
    assert flags.tolist() == (~np.isfinite(product)).any(1).astype(int).tolist()
    assert np.array_equal(patterns_of(torch.stack(rows)), patterns_of(grads))


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("dtype", HALF)
def test_unscale_in_place_equals_numpy_on_every_pattern(
    dtype: torch.dtype, coefficient: float
) -> None:
    grads = every_pattern(dtype)
    values = widened(grads)
    flags = torch.zeros(256, dtype=torch.int32)
    reference.unscale_(list(grads.unbind()), torch.tensor(coefficient), flags)
    stored = rounded(values * np.float32(coefficient), dtype)
    assert_same_bits(grads, stored)
    # what is stored decides: an overflow made by the last rounding counts as well
    finite = np.isfinite(widened(torch.from_numpy(stored.view(np.int16)).view(dtype)))
    assert flags.tolist() == (~finite).any(1).astype(int).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unscale_of_wide_gradients_equals_numpy(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, 1e-38, 3e38], dtype=dtype)
    grad, flags = values.clone(), torch.zeros(1, dtype=torch.int32)
    reference.unscale_([grad], torch.tensor(1e-3), flags)
    factor = np.float32(1e-3)
    product = values.numpy() * factor.astype(values.numpy().dtype)
    assert grad.dtype == dtype
    assert grad.numpy().tobytes() == product.tobytes()
    assert flags.tolist() == [0]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_flags_are_raised_for_the_right_tensor_and_never_cleared(bad: float) -> None:
    grads = [torch.ones(3).half(), torch.tensor([1.0, bad]), torch.ones(()).bfloat16()]
    flags = torch.tensor([1, 0, 0], dtype=torch.int32)
    reference.unscale_(grads, torch.tensor(0.5), flags)
    assert flags.tolist() == [1, 1, 0]
    assert [grads[0].tolist(), grads[2].item()] == [[0.5] * 3, 0.5]


def test_a_zero_coefficient_still_flags_infinity() -> None:
    grads, flags = [torch.tensor([torch.inf]).half()], torch.zeros(1, dtype=torch.int32)
    reference.unscale_into(grads, [torch.empty(1)], torch.tensor(0.0), flags)
    assert flags.tolist() == [1]


def test_empty_lists_and_empty_and_strided_tensors_are_accepted() -> None:
    none, half = torch.zeros(0, dtype=torch.int32), torch.tensor(0.5)
    reference.unscale_([], half, none)
    reference.unscale_into([], [], half, none)
    reference.cast_into([], [], torch.tensor(0), torch.tensor(0))
    grads = [torch.empty(0, 3).half(), torch.arange(6.0).half().reshape(2, 3).t()]
    outs, flags = [torch.empty(0, 3), torch.empty(3, 2)], torch.zeros(2, dtype=torch.int32)
    reference.unscale_into(grads, outs, half, flags)
    assert outs[1].tolist() == [[0.0, 1.5], [0.5, 2.0], [1.0, 2.5]]
    reference.unscale_(grads, half, flags)
    assert grads[1].tolist() == [[0.0, 1.5], [0.5, 2.0], [1.0, 2.5]]
    assert flags.tolist() == [0, 0]


def masters_to_round() -> np.ndarray:
    """Every upper half of a float32, with lower halves on, beside and between rounding ties."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (upper[:, None] | lower.astype(np.uint32)).view(np.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_cast_into_rounds_to_nearest_even_clamps_and_counts(dtype: torch.dtype) -> None:
    values = masters_to_round()
    masters = torch.from_numpy(values.copy())
    weights, count = torch.zeros(values.shape, dtype=dtype), torch.tensor(5)
    reference.cast_into([masters], [weights], torch.tensor(0, dtype=torch.int32), count)
    expected = rounded(values, dtype)
    infinity = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[dtype]
    clamped = ((expected & 0x7FFF) == infinity) & np.isfinite(values)
    expected = np.where(clamped, expected - np.uint16(1), expected)  # the largest finite, signed
    assert_same_bits(weights, expected)
    assert count.item() == 5 + clamped.sum()
    assert clamped.sum() > 0
    assert masters.numpy().tobytes() == values.tobytes()


def test_cast_into_clamps_from_the_first_value_that_would_round_to_infinity() -> None:
    masters = [torch.tensor([65519.996, 65520.0, -65520.0, torch.inf, -torch.inf, torch.nan])]
    weights, count = [torch.zeros(6).half()], torch.tensor(0)
    reference.cast_into(masters, weights, torch.tensor(0), count)
    assert weights[0][:5].tolist() == [65504.0, 65504.0, -65504.0, torch.inf, -torch.inf]
    assert weights[0][5].isnan()
    assert count.item() == 2


@pytest.mark.parametrize("found_inf", [1, 2, -1])
def test_cast_into_writes_and_counts_nothing_once_found_inf_is_not_zero(found_inf: int) -> None:
    weights = [torch.tensor([1.0, torch.nan]).half(), torch.tensor(3.0).bfloat16()]
    before = [patterns_of(weight).copy() for weight in weights]
    count = torch.tensor(7)
    flag = torch.tensor(found_inf, dtype=torch.int32)
    reference.cast_into([torch.full((2,), 1e6), torch.tensor(1.0)], weights, flag, count)
    assert all(map(np.array_equal, before, map(patterns_of, weights)))
    assert count.item() == 7


@pytest.mark.parametrize("name", ["", "cuda", "Reference", "numpy", None, 3])
def test_resolve_rejects_an_unknown_name_and_lists_the_known_ones(name: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^backend: expected one of .*, got ") as raised:
        resolve(name, [torch.device("cpu")])
    assert all(known in str(raised.value) for known in NAMES)


@pytest.mark.parametrize("built", [True, False])
def test_auto_on_a_cpu_is_the_library_of_the_package_or_what_needs_none_and_elsewhere_pytorch(
    built: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    if not built:
        monkeypatch.setattr(_c_command, "BUILT", tmp_path)
        monkeypatch.setattr("mpcore.backends.comes_built", comes_built.__wrapped__)
    best = ("compiled", compiled) if built else ("cpu", cpu)
    for dtypes in ([], [torch.float16, torch.float64]):
        assert resolve("auto", [torch.device("cpu")], dtypes) == best
        assert resolve("reference", [torch.device("cpu")], dtypes) == ("reference", reference)
    assert resolve("auto", []) == best
    mixed = [torch.device("cpu"), torch.device("cuda")]
    assert resolve("auto", iter(mixed)) == ("reference", reference)


@needs_triton
def test_triton_asked_for_by_name_refuses_float64_before_anything_changes() -> None:
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    inner = torch.optim.SGD([param], lr=1.0)
    with pytest.raises(BackendError, match=r'"triton": .*float64.*Pass backend="auto"'):
        mpcore.MixedPrecisionOptimizer(inner, backend="triton")
    assert mpcore.MixedPrecisionOptimizer(inner).backend == "compiled"


@pytest.mark.parametrize(
    ("triton", "numpy", "words"),
    [
        ("3.6.0", "2.4.0", "Triton 3.6.0's interpreter needs a NumPy before 2.4, and 2.4.0"),
        ("3.6.0", "2.10.1", "before 2.4, and 2.10.1"),
        ("3.6.0", "2.3.5", None),
        ("3.7.1", "2.4.6", None),
        ("3.10.0", "2.4.6", None),
    ],
)
def test_triton_is_refused_only_where_its_interpreter_fails(
    triton: str, numpy: str, words: str | None
) -> None:
    reason = why_not_release(triton, beside_numpy=numpy)
    assert reason is None if words is None else reason is not None and words in reason


def test_triton_whose_roots_are_wrong_on_amd_is_refused_there_alone() -> None:
    assert "square root" in (why_not_release("3.6.0", on_amd=True) or "")
    assert why_not_release("3.6.0") is None
    assert why_not_release("3.7.1", on_amd=True) is None
    assert why_not_release("3.10.0", on_amd=True) is None


@needs_triton
@pytest.mark.parametrize(("hip", "name"), [(None, "triton"), ("7.0", "reference")])
def test_auto_on_a_gpu_asks_whether_the_release_fits(
    hip: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("triton"), "__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert resolve("auto", [torch.device("cuda")])[0] == name


@needs_triton
def test_triton_by_name_asks_for_another_numpy_where_it_interprets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = importlib.import_module("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(importlib.import_module("numpy"), "__version__", "2.4.6")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here")
    with pytest.raises(BackendError, match=r"NumPy before 2\.4, and 2\.4\.6 is installed"):
        resolve("triton", [torch.device("cpu")])


PROBE = """
import json, sys, torch, mpcore
from mpcore.backends import resolve
cpu = [torch.device("cpu")]
def outcome(name):
    try:
        name, module = resolve(name, cpu, [torch.float16])
        return [name, getattr(module, "__name__", type(module).__module__.split(".")[0])]
    except mpcore.BackendError as error:
        return str(error)
found = {"auto": outcome("auto"), "imported": "triton" in sys.modules}
found["triton"] = outcome("triton")
sys.modules["triton"] = None
found["absent"] = outcome("triton")
print(json.dumps(found))
"""


def probe(**environment: str) -> Any:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROBE)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@needs_triton
def test_triton_on_a_cpu_without_the_interpreter_raises_with_the_remedy() -> None:
    found = probe()
    assert found["auto"] == ["compiled", "mpcore.backends.compiled"]
    assert not found["imported"]
    message = found["triton"]
    assert message.startswith('backend: expected one that can run here, got "triton"')
    assert "CUDA or ROCm" in message
    assert 'Pass backend="auto" or backend="reference".' in message
    assert 'pip install "mpcore[triton]"' in found["absent"]


@needs_triton
def test_triton_on_a_cpu_with_the_interpreter_is_the_kernels() -> None:
    found = probe(TRITON_INTERPRET="1")
    assert found["triton"] == ["triton", "mpcore_kernels"]
    assert found["auto"] == ["compiled", "mpcore.backends.compiled"]
