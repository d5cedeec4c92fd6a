"""Buffers of a cast model that stay in FP32: among 16-bit values, in copies and graphs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from mpcore import cast_model, cast_report
from torch import Tensor, nn

from mpcore_testing.writers import ONES, Inner

HALF = [torch.float16, torch.bfloat16]


class Queue(nn.Module):
    """Written and multiplied with: a memory of keys (MoCo), or a codebook of its own root."""

    def __init__(self, ema: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ema = ema
        self.register_buffer("bank", F.normalize(torch.randn(4, 16), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.linear(x).float(), dim=1).to(x.dtype)
        scores = torch.einsum("nc,ck->nk", q, self.bank.clone().detach()) + q @ self.bank
        with torch.no_grad():
            if self.ema:
                self.bank[:, :8].mul_(0.999).add_(q.mean(0)[:, None], alpha=0.001)
            else:
                self.bank[:, : len(x)] = q.T
        return scores


@pytest.mark.filterwarnings("ignore:cast_model. the forward pass writes")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("ema", [False, True])
def test_a_buffer_that_is_written_and_multiplied_with_runs(ema: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Queue(ema)
    model = cast_model(copy.deepcopy(plain), dtype)
    x = torch.randn(8, 4)
    for _ in range(50):
        ours, theirs = model(x), plain(x)
        assert ours.dtype == dtype
        assert (ours.float() - theirs).abs().max() < 8 * torch.finfo(dtype).eps
    ours.float().sum().backward()
    assert model.bank.dtype == torch.float32
    assert (model.bank - plain.bank).abs().max() < 4 * torch.finfo(dtype).eps


class Scaled(nn.Module):
    """Writes a buffer and multiplies with it, in the graph; `normed` by torch's batch norm."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.linear, self.normed = nn.Linear(4, 4), normed
        self.register_buffer("mid", torch.zeros(4))
        self.register_buffer("var", torch.full((4,), 1.001))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.normed:
            return F.batch_norm(y, self.mid, self.var, training=self.training, momentum=0.001)
        with torch.no_grad():
            self.mid += 0.001
            self.var.mul_(0.999)
        return y @ torch.diag(self.var) + y * self.mid + y @ self.var[:, None]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_the_graph_of_the_pass_that_widens_goes_backward(normed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Scaled(normed)
    model = cast_model(copy.deepcopy(plain), dtype)
    twin = nn.ModuleList([model])
    x = torch.randn(8, 4)
    with pytest.warns(UserWarning, match="writes to mid, var"):
        first = twin[0](x)
    second = model(x)
    for result in (first, second):
        assert result.dtype == dtype
        result.float().sum().backward()
    for _ in range(2):
        plain(x)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 0.01 * torch.finfo(dtype).eps
    model.eval(), plain.eval()
    before = model.var.clone()
    assert (model(x).float() - plain(x)).abs().max() <= 16 * torch.finfo(dtype).eps
    assert torch.equal(model.var, before) == normed


def test_evaluation_by_batch_norm_writes_nothing() -> None:
    model = cast_model(Scaled(True), torch.float16).eval()
    model(torch.randn(8, 4))
    assert model.var.dtype == torch.float16


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_buffer_that_is_given_other_data_is_noticed(dtype: torch.dtype) -> None:
    def update(module: nn.Module, x: Tensor) -> None:
        module.zorp.data = module.zorp * 0.999

    model = cast_model(Inner(ONES, update, True), dtype)
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    for _ in range(9):
        model(torch.ones(2, 4))
    assert (model.zorp - 0.999**10).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_methods_of_an_owner_that_others_call_see_what_gives_way(dtype: torch.dtype) -> None:
    class Code(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("blorb", 10000 ** (-torch.arange(0, 8, 2) / 8))

        def turn(self, x: Tensor) -> Tensor:
            angles = torch.outer(torch.arange(x.shape[-2]), self.blorb).repeat(1, 2)
            return x * angles.cos()

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.code = nn.Linear(8, 24), Code()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k = self.code.turn(q), self.code.turn(k)
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v  # type: ignore[no-any-return]

    model = cast_model(Head(), dtype)
    assert model.code.blorb.dtype == torch.float32
    assert model(torch.randn(2, 5, 8)).dtype == dtype
    assert type(model.code.blorb) is Tensor


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("old", [False, True])
def test_spectral_norm_keeps_its_vectors_and_says_nothing(old: bool, dtype: torch.dtype) -> None:
    norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(16, 8)), nn.ReLU(), norm(nn.Conv1d(1, 2, 3)))
    model = cast_model(model, dtype)
    for _ in range(3):
        model[0](torch.randn(4, 16)).float().sum().backward()
        model[2](torch.randn(4, 1, 9)).float().sum().backward()
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert torch.linalg.matrix_norm(model[0].weight.float(), 2) < 1.02


def test_a_kept_buffer_stays_plain_shared_and_in_the_checkpoint() -> None:
    table = 10.0 ** -torch.arange(8.0)
    model = nn.Sequential(
        Inner(table, lambda m, x: None, True), Inner(table, lambda m, x: None, True)
    )
    model[1].zorp = model[0].zorp
    model = cast_model(model, torch.float16)
    assert model[0].zorp is model[1].zorp
    for other in (model, copy.deepcopy(model.float()), model.double()):
        assert type(other.state_dict()["0.zorp"]) is Tensor


def test_a_cast_model_with_a_watch_is_copied_and_pickled() -> None:
    model = cast_model(Queue(True), torch.bfloat16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match="writes to bank"):
            other(torch.randn(8, 4))
        assert other.bank.dtype == torch.float32
        assert model.bank.dtype == torch.bfloat16


def test_an_exception_in_a_pass_leaves_plain_buffers_and_no_mode() -> None:
    def update(module: nn.Module, x: Tensor) -> None:
        module.zorp.add_(1)
        if x.sum() > 0:
            raise KeyError("no")

    model = cast_model(Inner(torch.ones(()), update, True), torch.float16)
    bank = cast_model(Inner(ONES, update, True), torch.float16)
    for each in (model, bank):
        with pytest.raises(KeyError):
            each(torch.ones(2, 4))
        assert type(each.zorp) is Tensor
        assert torch._C._len_torch_dispatch_stack() == 0
    assert bank.zorp.tolist() == [2.0] * 4
    with pytest.warns(UserWarning, match="writes to zorp"):
        bank(-torch.ones(2, 4))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_grave_rounding_is_warned_of_with_the_line_to_write(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("angles", torch.outer(torch.arange(2048.0), torch.tensor([1.0, 0.37])))
    model.register_buffer("small", torch.tensor([0.1, 0.3, 0.2]))
    model.register_buffer("mask", torch.full((2, 2), -1e9))
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="rounds buffers") as told:
        cast_model(model, dtype)
    (message,) = [str(each.message) for each in told]
    assert "keep_fp32=['angles']" in message
    assert "small" not in message
    report = str(cast_report(model))
    assert "| small | buffer |" in report
    assert f"{(plain.small - plain.small.to(dtype).float()).abs().max():.3g}" in report
    kept = cast_model(plain, dtype, keep_fp32=["angles"])
    assert kept.angles.dtype == torch.float32
    assert kept.mask.dtype == dtype


def test_the_same_buffers_may_be_kept_twice_and_others_not() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("small", torch.tensor([0.1, 0.3, 0.2]))
    cast_model(model, torch.float16, keep_fp32="sm*")
    assert model.small.dtype == torch.float32
    cast_model(model, torch.float16, keep_fp32=["small"])
    assert model.small.dtype == torch.float32
    with pytest.raises(Exception, match="cast otherwise"):
        cast_model(model, torch.float16)
