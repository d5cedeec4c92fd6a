"""`mpcore.preflight` over what is not finite in float32 already."""

from __future__ import annotations

from collections.abc import Callable

import mpcore
import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two layers and a function over them."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.h, self.body = nn.Linear(4, 4), nn.Linear(4, 1), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def normal() -> Tensor:
    return torch.randn(32, 4, generator=torch.Generator().manual_seed(1))


def squared(output: Tensor) -> Tensor:
    return output.float().square().mean()


def test_nan_in_float32_is_an_error_that_names_where_it_began() -> None:
    model = Net(lambda n, x: n.h(n.l(x).log()))
    with pytest.raises(mpcore.ArgumentError, match=r"the loss\. It begins in log .*not_finite\.py"):
        mpcore.preflight(model, normal(), squared)
    root = Net(lambda n, x: n.h(n.l(x) + (n.l(x) * 0).pow(2).sum(-1, keepdim=True).sqrt()))
    with pytest.raises(mpcore.ArgumentError, match=r"a gradient\. It begins in div .*backward"):
        mpcore.preflight(root, normal(), squared)
    model = Net(lambda n, x: n.h(n.l(x)))
    with torch.no_grad():
        model.l.weight[0, 0] = torch.nan
    with pytest.raises(mpcore.ArgumentError, match=r"weight l\.weight"):
        mpcore.preflight(model, normal(), squared)


def test_nan_and_infinities_that_do_no_harm_are_none() -> None:
    def selected(net: Net, x: Tensor) -> Tensor:
        y = net.l(x)
        return net.h(torch.where(y > 0, y.detach().log(), y))

    def saturated(net: Net, x: Tensor) -> Tensor:
        return net.h(1 / (1 + (-net.l(x).detach() * 1e4).exp()))

    for body in (selected, saturated):
        assert mpcore.preflight(Net(body), normal(), squared).dtype == torch.float16


def test_infinities_that_do_harm_are_named_with_their_line() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        return net.h(net.l(x)) + (net.l(x).detach().abs().sum() + 100).exp()  # infinite

    found = mpcore.preflight(Net(body), normal(), lambda out: out.abs().mean() * 1.0)
    assert found.dtype == torch.float32
    assert "exp (" in found.reason
    assert "is infinite in it already" in found.reason
