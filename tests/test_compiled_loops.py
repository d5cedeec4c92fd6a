"""The loops of the compiled update: conversions within them, every pair of formats, vectors."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from mpcore.backends import _c_command, _c_compiler, _c_source, _c_update, compiled

from mpcore_testing.batches import BRAIN, FULL, HALF, KINDS, Batch, Hyper, make_batch, make_grads
from mpcore_testing.fused import Twin
from mpcore_testing.kernels import HALVES, all_patterns, assert_same_bits
from mpcore_testing.rounding import edge_masters, round_by_hand

SPAN = 4096  # elements after which the largest weight is looked at, as `_passes.c` has it
KEEP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # SGD that moves nothing
TAKE = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # SGD whose step is the gradient
LIMITS = {HALF: 0x477FF000, BRAIN: 0x7F7F8000}  # bits of the first master that is clamped


@pytest.fixture(params=[False, True], ids=["native", "portable"])
def library(request, monkeypatch):
    """The passes for this processor, with its instructions for conversions or without."""
    if request.param:
        source = f'#define PORTABLE\n#include "{_c_command.SOURCE}"'
        monkeypatch.setattr(_c_update, "passes", lambda: _c_compiler.load(source))


def one_step(grad, master, weight, numbers):
    """Updates one tensor with SGD; returns how many weights were clamped."""
    plan = compiled.plan_update("sgd", [Batch([master], [weight], [], None, [0])])
    compiled.prepare_(plan, Hyper.of(numbers))
    saturated = torch.tensor(0)
    go = torch.tensor(0, dtype=torch.int32)
    compiled.update_(plan, [[grad]], torch.tensor(1.0), go, saturated)
    return saturated.item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("library")
def test_every_16_bit_gradient_is_widened_exactly(dtype):
    patterns, master = all_patterns(dtype), torch.zeros(2**16)
    one_step(patterns, master, torch.zeros(2**16, dtype=dtype), TAKE)
    assert_same_bits(master, 0 - patterns.float() * -1)


@pytest.mark.parametrize("grad", [*HALVES, FULL])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("library")
def test_masters_at_every_edge_are_rounded_and_counted(dtype, grad):
    master = edge_masters(dtype)
    weight = torch.zeros(len(master), dtype=dtype)
    count = one_step(torch.zeros(len(master), dtype=grad), master, weight, KEEP)
    expected, clamped = round_by_hand(master, dtype)
    assert count == clamped > 0
    # the oracle is for numbers
    assert_same_bits(weight, torch.where(master.isnan(), torch.nan, expected.view(dtype)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("library")
def test_masters_that_nothing_clamps_are_rounded_in_the_loop(dtype):
    master = edge_masters(dtype)
    magnitudes = master.view(torch.int32) & 0x7FFFFFFF
    master = master[magnitudes < LIMITS[dtype]]
    assert (master.view(torch.int32) & 0x7FFFFFFF).max() == LIMITS[dtype] - 1
    weight = torch.zeros(len(master), dtype=dtype)
    assert one_step(torch.zeros(len(master), dtype=dtype), master, weight, KEEP) == 0
    assert_same_bits(weight, round_by_hand(master, dtype)[0].view(dtype))


@pytest.mark.parametrize("place", [0, 15, 16, SPAN - 1, SPAN, 3 * SPAN - 1, 3 * SPAN, 3 * SPAN + 4])
@pytest.mark.parametrize("dtype", HALVES)
def test_one_master_that_is_clamped_is_found_wherever_it_is(dtype, place, monkeypatch):
    for streaming in (2**24, 1):
        monkeypatch.setattr(_c_update, "_STREAMING", streaming)
        for bits in (LIMITS[dtype] - 1, LIMITS[dtype]):
            master = torch.linspace(-1, 1, 3 * SPAN + 5)
            master.view(torch.int32)[place] = bits - 2**31
            weight = torch.zeros(len(master), dtype=dtype)
            clamped = one_step(torch.zeros_like(weight), master, weight, KEEP)
            assert clamped == (bits == LIMITS[dtype])
            assert_same_bits(weight, round_by_hand(master, dtype)[0].view(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize(
    ("grad", "weight"), [(HALF, BRAIN), (BRAIN, HALF), (HALF, None), (BRAIN, None)]
)
def test_gradients_of_another_format_than_the_weights(kind, grad, weight):
    rule, moments, numbers = kind
    batch = make_batch(moments, weight, [1, 17, SPAN + 3], steps=0.0)
    both = Twin(rule, [batch], "cpu", backend=compiled)
    for step in range(2):
        both.step([make_grads(batch, grad, 50 * step)], Hyper.of(numbers))


@pytest.fixture
def gcc():
    """The compiler, which has to be GCC."""
    compiler = _c_command.find_compilers()[0]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    if "Free Software Foundation" not in version.stdout:
        pytest.skip("known of GCC only")
    return compiler


def test_conversions_are_vectorized(gcc):
    flags = [*_c_command.FLAGS, "-DPORTABLE", *_c_command.NATIVE[1], "-fopt-info-vec"]
    command = [gcc, *flags, str(_c_command.SOURCE), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loops = set()
    for line in done.stderr.splitlines():
        if "vectorized" in line:
            path, number = line.split(":")[:2]
            above = Path(path).read_text().splitlines()[: int(number)]
            loops.add(next((text for text in reversed(above) if text.startswith("LOOP")), ""))
    names = ["widen_bfloat16", "widen_float16", "narrow_bfloat16", "narrow_float16"]
    names += ["join_bfloat16", "split_bfloat16", "join_float16", "rests_of_float16"]
    names += ["largest_of", "clamp", "draw", "round_randomly", "count_beyond"]
    for expected in names:
        assert any(f" {expected}(" in loop for loop in loops), (expected, loops)


@pytest.mark.parametrize("level", _c_command.levels("x86_64").values(), ids=lambda level: level[0])
def test_no_loop_of_an_update_computes_one_element_at_a_time(gcc, level):
    if _c_command.platform.machine() != "x86_64":
        pytest.skip("reads the assembly of x86")
    command = [gcc, *_c_command.FLAGS, *level[1], "-S", str(_c_command.SOURCE), "-o", "-"]
    command.remove("-shared")
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"^(\w+):\n(.*?)^\t\.size\t\1,", assembly, re.DOTALL | re.MULTILINE))
    # arithmetic on one float, and loads and stores of one 16-bit number
    one = r"\bv?(?:add|sub|mul|div|sqrt|cvt\w+)ss\b.*|\b(?:movw|movzw\w)\b.*"
    for rule, moments in _c_source.STEPS:
        for name in _c_source.loop_names(rule, moments):
            assert re.search(r"\bv?mulps\b", bodies[name]), name
            assert re.findall(one, bodies[name]) == [], name
    for dtype in ("float16", "bfloat16"):  # the look at weights before it
        assert re.findall(one, bodies[f"all_fit_{dtype}"]) == [], dtype
