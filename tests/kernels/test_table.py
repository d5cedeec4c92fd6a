"""The table that tells each program of a launch which elements of which tensor are its own."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from mpcore_kernels._dtypes import FORMATS
from mpcore_kernels._table import CHUNK, build, is_aligned, locate, mark_written

SIZES = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def covered(table):
    """The (index, source, destination, first element, end) of every program, from the table."""
    spans = []
    for program, owner in enumerate(table.owners.tolist()):
        source, destination, size, first, index = table.entries[owner].tolist()
        start = (program - first) * CHUNK
        spans.append((index, source, destination, start, min(start + CHUNK, size)))
    return spans


def expected_spans(sources, destinations, indices):
    return [
        (
            i,
            sources[i].data_ptr(),
            destinations[i].data_ptr(),
            s,
            min(s + CHUNK, sources[i].numel()),
        )
        for i in indices
        for s in range(0, sources[i].numel(), CHUNK)
    ]


@given(sizes=st.lists(st.sampled_from(SIZES), max_size=8))
def test_table_gives_every_element_to_exactly_one_program(sizes):
    sources = [torch.zeros(size, dtype=torch.float16) for size in sizes]
    destinations = [torch.zeros(size) for size in sizes]
    tables = build(sources, destinations)
    assert len(tables) == (1 if any(sizes) else 0)
    for table in tables:
        assert covered(table) == expected_spans(sources, destinations, range(len(sizes)))
        assert table.programs == len(covered(table))


def test_table_groups_by_dtypes_and_keeps_the_callers_indices():
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float16, torch.float32]
    sizes = [5, CHUNK + 1, 0, 3, 2 * CHUNK]
    sources = [torch.zeros(n, dtype=dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    tables = build(sources, sources)
    groups = {(table.source, table.destination): covered(table) for table in tables}
    assert groups == {
        (torch.float32, torch.float32): expected_spans(sources, sources, [0, 4]),
        (torch.float16, torch.float16): expected_spans(sources, sources, [1, 3]),
    }


@pytest.mark.parametrize("count", [1, 1000, 20_000])
def test_any_number_of_tensors_of_one_dtype_is_one_launch(count):
    buffer = torch.zeros(count + 2)
    tensors = [buffer[i : i + 1 + i % 3] for i in range(count)]
    (table,) = build(tensors, tensors)
    assert table.programs == count
    assert covered(table) == expected_spans(tensors, tensors, range(count))


def test_empty_lists_and_zero_sized_tensors_are_no_launch():
    assert build([], []) == []
    assert build([torch.zeros(0), torch.zeros(3, 0)], [torch.zeros(0), torch.zeros(3, 0)]) == []


def test_table_counts_tensors_beyond_two_to_the_31_elements():
    size = 2**32 + 1
    # one element of memory; the table only asks for the number
    huge = torch.zeros(1, dtype=torch.float16).expand(size)
    small = torch.zeros(1, dtype=torch.float16)
    (table,) = build([huge, small], [huge, small])
    assert table.programs == 2**32 // CHUNK + 2
    assert table.entries[:, 2:].tolist() == [[size, 0, 0], [1, table.programs - 1, 1]]
    assert table.owners[-2:].tolist() == [0, 1]


def test_table_ignores_the_default_device():
    tensors = [torch.zeros(3)]
    with torch.device("meta"):
        (table,) = build(tensors, tensors)
    assert table.entries.device == tensors[0].device


@triton.jit
def _locate_kernel(entries_ptr, owners_ptr, out_ptr, CHUNK: tl.constexpr):
    source, destination, start, size, index = locate(entries_ptr, owners_ptr, CHUNK)
    out_ptr += tl.program_id(0) * 5
    tl.store(out_ptr, source)
    tl.store(out_ptr + 1, destination)
    tl.store(out_ptr + 2, start)
    tl.store(out_ptr + 3, size)
    tl.store(out_ptr + 4, index)


def test_locate_reads_the_programs_own_entry_with_64_bit_offsets(device):
    # a first program far below 0 stands for a program far into a tensor
    entries = [[11, 12, 13, 0, 14], [2**50, 2**51, 2**40, -(2**31), 3]]
    out = torch.zeros(3, 5, dtype=torch.int64, device=device)
    _locate_kernel[(3,)](
        torch.tensor(entries, device=device),
        torch.tensor([0, 1, 1], device=device),
        out,
        CHUNK=CHUNK,
        enable_fp_fusion=False,
    )
    assert out.tolist() == [
        [11, 12, 0, 13, 14],
        [2**50, 2**51, (2**31 + 1) * CHUNK, 2**40, 3],
        [2**50, 2**51, (2**31 + 2) * CHUNK, 2**40, 3],
    ]


@triton.jit
def _is_aligned_kernel(addresses_ptr, out_ptr, FORMAT: tl.constexpr, OTHER: tl.constexpr):
    at = tl.arange(0, 32)
    aligned = is_aligned(tl.load(addresses_ptr + at), FORMAT, OTHER)
    tl.store(out_ptr + at, aligned.to(tl.int32))


@pytest.mark.parametrize(
    ("fmt", "other", "needed"),
    [
        (torch.float16, torch.float16, 16),
        (torch.bfloat16, torch.float32, 8),
        (torch.float32, torch.bfloat16, 16),
        (torch.float32, torch.float32, 16),
    ],
)
def test_is_aligned_holds_only_where_the_promise_to_the_compiler_is_true(
    fmt, other, needed, device
):
    addresses = torch.arange(2**46 - 16, 2**46 + 16, device=device)
    out = torch.zeros(32, dtype=torch.int32, device=device)
    _is_aligned_kernel[(1,)](
        addresses, out, FORMAT=FORMATS[fmt], OTHER=FORMATS[other], enable_fp_fusion=False
    )
    assert torch.equal(out.bool(), addresses % needed == 0)


def test_mark_written_raises_version_counters_and_accepts_inference_tensors():
    tensor = torch.zeros(2)
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    before = tensor._version
    mark_written(tensor, uncounted)
    assert tensor._version > before
