"""Findings as columns: the same as one by one, made when somebody asks."""

from __future__ import annotations

import copy
import math
import pickle

import mpcore
import pytest
import torch
from mpcore.backends import reference
from mpcore.engine import Look
from mpcore.monitoring.findings import Columns, Finding, FindingTable
from mpcore.monitoring.names import Names
from mpcore.monitoring.reading import summed_up


def table(sums: bool = False) -> FindingTable:
    grads = [torch.tensor([1.0, 0.0, 2.0**-20]).half(), torch.tensor([[4.0, math.inf]])]
    grads.append(torch.zeros(2).bfloat16())
    found = reference.inspect(grads, torch.tensor(0.5), None, statistics=True)
    layouts = tuple((g.dtype, g.stride()) for g in grads)
    look = Look(tuple(grads), [g.shape for g in grads], layouts, found)
    names = {id(grad): name for grad, name in zip(grads, "abc", strict=True)}
    columns = Columns([names[id(grad)] for grad in grads], look, 2.0, sums=sums)
    return FindingTable([columns], [2, 0, 1])


def test_a_table_is_its_findings() -> None:
    found = table()
    c, a, b = found
    assert (a.name, a.dtype, a.shape, a.kinds) == ("a", "float16", (3,), ())
    assert (a.zeros, a.subnormal, a.largest) == (1 / 3, 1 / 3, 0.5)
    assert a.headroom_bits == math.log2(65504 / 1.0)
    assert a.histogram is not None
    assert (a.histogram[4], a.histogram[24]) == (1, 1)
    assert (b.kinds, b.first_bad, b.norm) == (("+inf",), (0, 1), math.inf)
    assert (c.zeros, c.headroom_bits) == (1.0, None)
    assert found == (c, a, b)
    assert (c, a, b) == found
    assert found[1:] == (a, b)
    assert found != (c, a)
    assert found != [c, a, b]
    assert hash(found) == hash((c, a, b))
    assert repr(found) == repr((c, a, b))
    assert len(found) == 3


def test_sums_of_columns_are_sums_of_findings() -> None:
    found = table()
    assert summed_up(found) == summed_up(tuple(found))
    assert summed_up(found)["zeros"] == (1.0 * 2 + 1 / 3 * 3) / 7
    assert sum(summed_up(found)["histogram"]) == 2  # float16 alone, without its zero
    assert summed_up(table(sums=True))["zeros"] is None


def test_findings_are_made_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(Columns, "finding", lambda self, place: made.append(place))
    found = table()
    summed_up(found)
    assert len(found) == 3
    assert not made
    list(found), list(found)
    assert made == [2, 0, 1]


def test_copies_and_pickles_hold_the_same() -> None:
    found = table()
    assert copy.deepcopy(found) == found
    assert pickle.loads(pickle.dumps(found)) == found


def test_names_follow_the_groups() -> None:
    first, second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([("w", first)], lr=0.1)
    names = Names(mpcore.MixedPrecisionOptimizer(inner), None)
    assert names.current()(first) == "w"
    inner.param_groups[0]["param_names"][0] = "v"
    assert names.current()(first) == "v"
    inner.add_param_group({"params": [("z", second)]})
    assert [names.current()(param) for param in (first, second)] == ["v", "z"]
    assert isinstance(table()[0], Finding)
