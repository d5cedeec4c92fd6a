"""How many launches the launchers queue, and with which options; nothing is run here."""

import pytest
import torch

from mpcore_kernels import _chunks, _finish, adopt, cast, inspect, scale, unscale
from mpcore_kernels._dtypes import FORMATS
from mpcore_testing.batches import Move
from mpcore_testing.kernels import FLOATS, HALVES, flags


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, options))

    def formats(self, *names):
        return [tuple(options[name] for name in names) for _, options in self.launches]


@pytest.fixture
def recorded(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(unscale, "_unscale_kernel", recorder)
    monkeypatch.setattr(cast, "_cast_kernel", recorder)
    monkeypatch.setattr(adopt, "_adopt_kernel", recorder)
    monkeypatch.setattr(_chunks, "_inspect_kernel", recorder)
    monkeypatch.setattr(_finish, "_finish_kernel", recorder)
    monkeypatch.setattr(scale, "_update_scale_kernel", recorder)
    return recorder


def tensors(count, dtypes, size=3):
    return [torch.zeros(size, dtype=dtypes[i % len(dtypes)]) for i in range(count)]


def test_unscale_launches_once_per_dtype_whatever_the_number_of_tensors(recorded):
    unscale.unscale_(tensors(100, FLOATS), torch.tensor(1.0), flags(100, "cpu"))
    assert recorded.formats("GRAD", "OUT") == [(FORMATS[d], FORMATS[d]) for d in FLOATS]
    assert [grid for grid, _ in recorded.launches] == [(34,), (33,), (33,)]


def test_unscale_into_launches_once_per_dtype_whatever_the_number_of_tensors(recorded):
    outs = tensors(100, [torch.float32])
    unscale.unscale_into(tensors(100, FLOATS), outs, torch.tensor(1.0), flags(100, "cpu"))
    full = FORMATS[torch.float32]
    assert recorded.formats("GRAD", "OUT") == [(FORMATS[d], full) for d in FLOATS]


def test_cast_launches_once_per_dtype_whatever_the_number_of_tensors(recorded):
    masters, weights = tensors(100, [torch.float32]), tensors(100, HALVES)
    cast.cast_into(masters, weights, flags(1, "cpu")[0], torch.tensor(0))
    full = FORMATS[torch.float32]
    assert recorded.formats("MASTER", "WEIGHT") == [(full, FORMATS[d]) for d in HALVES]


def test_adopt_launches_once_per_dtype_whatever_the_number_of_tensors(recorded):
    counts = torch.zeros(100, 2, dtype=torch.int64)
    adopt.adopt_(tensors(100, HALVES), tensors(100, [torch.float32]), counts)
    full = FORMATS[torch.float32]
    assert recorded.formats("WEIGHT", "MASTER") == [(FORMATS[d], full) for d in HALVES]


@pytest.mark.parametrize("statistics", [False, True])
def test_inspect_launches_once_per_dtype_and_once_for_all_tensors(recorded, statistics):
    inspect(tensors(100, FLOATS), torch.tensor(1.0), None, statistics=statistics)
    assert [grid for grid, _ in recorded.launches] == [(34,), (33,), (33,), (101,)]
    assert [options.get("GRAD") for _, options in recorded.launches[:3]] == [
        FORMATS[d] for d in FLOATS
    ]
    assert {options["STATISTICS"] for _, options in recorded.launches[:3]} == {statistics}


def test_update_scale_launches_one_program(recorded):
    scale.update_scale_(Move.on("cpu"), flags(1, "cpu")[0])
    assert [grid for grid, _ in recorded.launches] == [(1,)]


def test_nothing_to_do_is_no_launch(recorded):
    empty = tensors(3, FLOATS, size=0)
    unscale.unscale_(empty, torch.tensor(1.0), flags(3, "cpu"))
    cast.cast_into([], [], flags(1, "cpu")[0], torch.tensor(0))
    assert recorded.launches == []


def test_every_launch_switches_contraction_off(recorded):
    unscale.unscale_(tensors(3, FLOATS), torch.tensor(1.0), flags(3, "cpu"))
    masters = tensors(2, [torch.float32])
    cast.cast_into(masters, tensors(2, HALVES), flags(1, "cpu")[0], torch.tensor(0))
    inspect(tensors(3, FLOATS), torch.tensor(1.0), None)
    assert [options["enable_fp_fusion"] for _, options in recorded.launches] == [False] * 9
