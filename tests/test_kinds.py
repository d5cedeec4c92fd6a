"""`Kinds`: what is recognised is of the same kind, whatever differs is not."""

from collections.abc import Callable

import pytest
import torch
from mpcore.base import GradientSet, Kinds
from torch import Tensor, nn


def _tensors() -> list[Tensor]:
    return [torch.ones(4, 6).half(), torch.ones(3).half(), torch.ones(()).half()]


OTHERS: dict[str, Callable[[], Tensor]] = {
    "dtype": lambda: torch.ones(4, 6).bfloat16(),
    "shape": lambda: torch.ones(6, 4).half(),
    "fewer": lambda: torch.ones(4, 5).half(),
    "strides": lambda: torch.ones(6, 4).half().t(),
    "steps": lambda: torch.ones(4, 12).half()[:, ::2],
    "dimensions": lambda: torch.ones(24).half(),
    "device": lambda: torch.ones(4, 6, device="meta").half(),
    "sparse": lambda: torch.ones(4, 6).half().to_sparse(),
    "negated": lambda: torch._neg_view(torch.ones(4, 6).half()),
    "parameter": lambda: nn.Parameter(torch.ones(4, 6).half()),
    "subclass": lambda: torch.ones(4, 6).half().as_subclass(_Named),
    "graph": lambda: torch.ones(4, 6).half().requires_grad_(),
}


class _Named(Tensor):
    """A tensor of a type of its own."""


def test_others_of_the_same_kinds_are_recognised() -> None:
    kinds = Kinds(_tensors())
    assert kinds.fit(_tensors())
    assert kinds.fit(tuple(_tensors()))
    assert kinds.dtypes == {torch.float16}
    assert kinds.are_contiguous
    assert kinds.shapes == [(4, 6), (3,), ()]
    assert kinds.sizes == (24, 3, 1)


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_in_anything_is_not(name: str) -> None:
    kinds = Kinds(_tensors())
    other = OTHERS[name]()
    assert not kinds.fit([other, *_tensors()[1:]])
    assert kinds.fit(_tensors())


def test_fewer_more_and_others_in_order_are_not() -> None:
    first, second, third = _tensors()
    kinds = Kinds([first, second, third])
    assert not kinds.fit([first, second])
    assert not kinds.fit([first, second, third, torch.ones(2).half()])
    assert not kinds.fit([second, first, third])


def test_data_that_is_replaced_is_seen() -> None:
    tensors = _tensors()
    kinds = Kinds(tensors)
    tensors[0].data = tensors[0].data.view(6, 4).t()  # same memory, same shape
    assert not kinds.fit(tensors)
    assert not Kinds(tensors).are_contiguous


def test_where_nothing_is_recognised_nothing_is_wrong() -> None:
    """Autocast and inference mode change what torch compares: each tensor is asked, then."""
    tensors = _tensors()
    kinds = Kinds(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not kinds.fit(tensors)
    assert kinds.fit(tensors)
    twice = Kinds([tensors[0], tensors[0]])
    assert not twice.are_known
    assert not twice.fit([tensors[0], tensors[0]])
    assert not Kinds([]).fit([])


def test_facts_of_a_set_are_those_of_its_kinds() -> None:
    tensors = [torch.ones(6, 4).half().t(), torch.ones(3).bfloat16()]
    known = GradientSet.of_kinds(tensors, Kinds(tensors))
    alone = GradientSet(tensors)
    assert known.kinds is not None
    assert alone.kinds is None
    for fact in ("dtypes", "shapes", "sizes", "are_contiguous", "are_in_memory", "addresses"):
        assert getattr(known, fact) == getattr(alone, fact), fact
    freed = [torch.ones(4).half()]
    kinds = Kinds(freed)
    freed[0].untyped_storage().resize_(0)
    assert not GradientSet.of_kinds(freed, kinds).are_in_memory
