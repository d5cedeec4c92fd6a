"""Buffers of a cast model: what it writes itself counts and averages as in FP32."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpcore import cast_model, cast_report
from torch import Tensor, nn

HALF = [torch.float16, torch.bfloat16]
Update = Callable[[nn.Module, Tensor], None]


class Inner(nn.Module):
    """Has a linear layer and a buffer of any name, which it updates in some way in each pass."""

    def __init__(self, first: Tensor, update: Update, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("zorp", first.clone(), persistent=persistent)
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        with torch.no_grad():
            self.update(self, x.detach())
        return y


class Outer(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.parts = nn.ModuleDict({"q": Inner(*args)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parts["q"](x) + self.stem(x)
        return y


def rebind(change: Callable[[Tensor, Tensor], Tensor]) -> Update:
    def update(module: nn.Module, x: Tensor) -> None:
        module.zorp = change(module.zorp, x)

    return update


def index(module: nn.Module, x: Tensor) -> None:
    module.zorp[torch.tensor([0, 2])] += 0.001 * x[0, :2]


def put(module: nn.Module, x: Tensor) -> None:
    where = (torch.arange(4),)
    module.zorp.index_put_(where, 0.001 * x.mean(0), accumulate=True)


def foreach(module: nn.Module, x: Tensor) -> None:
    torch._foreach_mul_([module.zorp], 0.999)
    torch._foreach_add_([module.zorp], [0.001 * x.mean(0)])


ONES = torch.ones(4)
UPDATES: dict[str, tuple[Tensor, Update]] = {
    "mul_": (ONES, lambda m, x: m.zorp.mul_(0.999)),
    "mul_ and add_": (ONES, lambda m, x: m.zorp.mul_(0.999).add_(x.mean(0), alpha=0.001)),
    "lerp_": (ONES, lambda m, x: m.zorp.lerp_(x.mean(0), 0.001)),
    "copy_": (ONES, lambda m, x: m.zorp.copy_(0.999 * m.zorp + 0.001 * x.mean(0))),
    "data": (ONES, lambda m, x: m.zorp.data.mul_(0.999)),
    "data copy_": (ONES, lambda m, x: m.zorp.data.copy_(m.zorp.data * 0.999)),
    "detach": (ONES, lambda m, x: m.zorp.detach().mul_(0.999)),
    "a view": (ONES, lambda m, x: m.zorp.view(2, 2).mul_(0.999)),
    "augmented": (ONES, lambda m, x: m.zorp.__imul__(0.999)),
    "setitem": (ONES, index),
    "index_put_": (ONES, put),
    "index_add_": (ONES, lambda m, x: m.zorp.index_add_(0, torch.arange(4), 0.001 * x.mean(0))),
    "addcmul_": (ONES, lambda m, x: m.zorp.addcmul_(x.mean(0), x.mean(0), value=0.001)),
    "fill_": (ONES, lambda m, x: m.zorp.fill_(m.zorp[0] * 0.999)),
    "set by slices": (ONES, lambda m, x: m.zorp.__setitem__(slice(None), m.zorp * 0.999)),
    "out=": (ONES, lambda m, x: torch.mul(m.zorp, 0.999, out=m.zorp)),
    "foreach": (ONES, foreach),
    "rebound": (ONES, rebind(lambda b, x: 0.999 * b + 0.001 * x.mean(0))),
    "rebound lerp": (ONES, rebind(lambda b, x: torch.lerp(b, x.mean(0), 0.001))),
    "counter": (torch.full((4,), 2040.0), lambda m, x: m.zorp.add_(1)),
    "0-d counter": (torch.tensor(2040.0), lambda m, x: m.zorp.add_(1)),
    "1-element counter": (torch.tensor([2040.0]), lambda m, x: m.zorp.add_(1)),
    "rebound counter": (torch.tensor([2040.0]), rebind(lambda b, x: b + 1)),
    "0-d average": (torch.ones(()), lambda m, x: m.zorp.lerp_(x.abs().amax(), 0.001)),
    "0-d rebound": (torch.ones(()), rebind(lambda b, x: 0.999 * b + 0.001 * x.abs().amax())),
    "1-element average": (torch.ones(1), rebind(lambda b, x: 0.999 * b + 0.001 * x.mean())),
    "running maximum": (torch.zeros(()), rebind(lambda b, x: torch.maximum(0.999 * b, x.amax()))),
    "2-d": (torch.ones(3, 4), lambda m, x: m.zorp.mul_(0.999).add_(x[:3], alpha=0.001)),
}


@pytest.mark.filterwarnings("ignore:cast_model. the forward pass writes")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_what_a_forward_pass_writes_moves_as_in_fp32(name: str, dtype: torch.dtype) -> None:
    """60 passes; exactly as in FP32 where only numbers are added."""
    torch.manual_seed(0)
    first, update = UPDATES[name]
    plain = Outer(first, update, name != "data")
    model = cast_model(copy.deepcopy(plain), dtype)
    x = torch.randn(8, 4).to(dtype).float()  # so that the inputs are the same
    for _ in range(60):
        model(x)
        plain(x)
    ours, theirs = model.parts["q"].zorp, plain.parts["q"].zorp
    assert ours.dtype == torch.float32
    assert type(ours) is Tensor
    assert not torch.equal(theirs, first)
    # statistics of a batch are 16-bit, and the first pass of a rebound buffer is
    assert (ours - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()
    if "counter" in name:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_pass_that_widens_a_buffer_loses_nothing_and_says_so_once(dtype: torch.dtype) -> None:
    first = torch.tensor([1000.5, 1.001, 0.1, 2049.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is rounded
        model = cast_model(Inner(first, lambda m, x: m.zorp.data.add_(1), True), dtype)
    assert model.zorp.dtype == dtype
    with pytest.warns(UserWarning, match=r"writes to zorp.*keep_fp32=\['zorp'\]") as told:
        model(torch.ones(2, 4))
    assert len(told) == 1
    assert torch.equal(model.zorp, first + 1)
    model(torch.ones(2, 4))
    assert torch.equal(model.zorp, first + 2)
    assert "written by the forward pass" in str(cast_report(model))


@pytest.mark.parametrize("training", [True, False])
def test_a_write_in_a_later_pass_is_noticed_too(training: bool) -> None:
    def update(module: nn.Module, x: Tensor) -> None:
        if x.sum() > 0:
            module.zorp.add_(1)

    model = cast_model(Inner(torch.full((4,), 7.0), update, True), torch.bfloat16).train(training)
    for _ in range(3):
        model(-torch.ones(2, 4))
    assert model.zorp.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    assert model.zorp.tolist() == [8.0] * 4
    assert model.zorp.dtype == torch.float32


def test_a_buffer_that_training_alone_writes_is_noticed_after_evaluation() -> None:
    def update(module: nn.Module, x: Tensor) -> None:
        if module.training:
            module.zorp.data.mul_(0.999)

    model = cast_model(Inner(ONES, update, True), torch.bfloat16).eval()
    model(torch.ones(2, 4))
    model.train()
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    assert torch.equal(model.zorp, ONES * 0.999)


def test_a_checkpoint_loaded_before_the_first_pass_is_where_it_goes_on() -> None:
    model = cast_model(Inner(ONES, lambda m, x: m.zorp.add_(1), True), torch.bfloat16)
    model.load_state_dict(model.state_dict() | {"zorp": torch.full((4,), 8.0)})
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    assert model.zorp.tolist() == [9.0] * 4


def test_random_numbers_of_a_written_buffer_are_drawn_once() -> None:
    torch.manual_seed(0)
    plain = Inner(torch.ones(64), lambda m, x: m.zorp.normal_(), True)
    model = cast_model(copy.deepcopy(plain), torch.float16)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="writes to zorp"):
        model(torch.ones(2, 4))
    ours, after = model.zorp.clone(), torch.rand(1)
    torch.manual_seed(1)
    torch.ones(64).half().normal_()
    assert torch.equal(after, torch.rand(1))
    assert ours.std() > 0.5


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
