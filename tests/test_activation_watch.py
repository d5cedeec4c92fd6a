"""What modules return, as readings tell it: bit for bit what is counted by hand."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import starmap
from typing import Any, NamedTuple

import mpcore
import pytest
import torch
from mpcore.monitoring.records import read_records
from mpcore.monitoring.run_log import RunLog
from mpcore.report.run_page import render_runs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpcore_testing.engines import Engine


class Pair(NamedTuple):
    values: Tensor
    others: list[Tensor]


class Branches(nn.Module):
    """Returns a nest; what it hands on of its parts counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Pair:
        hidden = self.body(x)
        return Pair(self.head(hidden) * 2, [hidden.sum(1)])


def made(model: nn.Module, dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    scale = mpcore.StaticLossScale(8.0) if dtype == torch.float16 else mpcore.NoLossScale()
    optimizer = mpcore.MixedPrecisionOptimizer(inner, scale)
    mpcore.cast_model(model, dtype, optimizer)
    return optimizer, mpcore.Monitor(optimizer, model, **{"activations": True, **options})


def counted(name: str, tensors: list[Tensor]) -> dict[str, Any]:
    """By hand, in float64."""
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    finite = flat[flat.isfinite()]
    info = torch.finfo(tensors[0].dtype)
    small = (finite.abs() < info.tiny) & (finite != 0)
    largest = float(finite.abs().max()) if len(finite) else None
    return {
        "name": name,
        "zeros": float((flat == 0).sum()) / len(flat),
        "subnormal": float(small.sum()) / len(flat),
        "largest": largest,
        "headroom_bits": math.log2(info.max / largest) if largest else None,
        "finite": len(finite) == len(flat),
        "passes": len(tensors),
    }


def told(findings: Any) -> list[dict[str, Any]]:
    names = ("name", "zeros", "subnormal", "largest", "headroom_bits", "finite", "passes")
    return [{name: getattr(finding, name) for name in names} for finding in findings]


def kept(model: nn.Module, found: dict[str, list[Tensor]]) -> None:
    """Keeps what linear layers return, for an oracle."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.ReLU | nn.GELU):
            hook = lambda m, a, out, name=name: found.setdefault(name, []).append(out)  # noqa: E731
            module.register_forward_hook(hook)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_counts_are_those_by_hand_over_accumulated_passes(
    engine: Engine, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    # no biases: small inputs have subnormal results
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = engine.wrap(inner, mpcore.StaticLossScale(8.0))
    mpcore.cast_model(model, dtype, optimizer)
    oracle: dict[str, list[Tensor]] = {}
    kept(model, oracle)
    monitor = mpcore.Monitor(optimizer, model, every=2, activations=True)
    for step in range(4):
        oracle.clear()
        for part in range(2):
            x = torch.randn(5 + part, 4) * 2.0 ** -(4 * step)
            optimizer.backward(model(x).float().square().mean())
        optimizer.step()
        optimizer.zero_grad()
        hooks = sum(len(m._forward_hooks) for m in model.modules())
        if step % 2:  # a reading is over
            found = told(monitor.reading.activations)
            assert dtype == torch.bfloat16 or step == 1 or any(one["subnormal"] for one in found)
            for mine, right in zip(found, starmap(counted, oracle.items()), strict=True):
                assert mine == right
            watched = hooks
        else:
            assert hooks > 0
    monitor.close()
    # all are gone but those of the cast and of the oracle
    assert watched == sum(len(m._forward_hooks) for m in model.modules())


def test_between_readings_there_is_no_hook() -> None:
    model = nn.Linear(2, 2)
    optimizer, monitor = made(model, every=3)
    seen = []
    for _ in range(7):
        seen.append(any("_Hook" in repr(h) for h in model._forward_hooks.values()))
        optimizer.backward(model(torch.ones(1, 2)).float().sum())
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [False, False, True, False, False, True, False]
    assert [finding.name for finding in monitor.reading.activations] == ["Linear"]


def test_nests_say_where_and_what_is_handed_on_counts_once() -> None:
    model = Branches()
    optimizer, monitor = made(model, every=1)
    result = model(torch.ones(2, 4))
    optimizer.backward(result.values.float().sum() + result.others[0].float().sum())
    optimizer.step()
    names = [finding.name for finding in monitor.reading.activations]
    # the Sequential returns what its ReLU has
    assert names == ["body.0", "body.1", "head", "Branches.values", "Branches.others[0]"]


def test_what_overflows_in_a_module_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.fill_(60000.0)
        model[1].bias.zero_()
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    optimizer, monitor = made(model, every=1)
    optimizer.backward(model(torch.ones(1, 2)).float().sum())
    optimizer.step()
    first, second = monitor.reading.activations
    assert first.finite
    assert second.kinds == ("+inf",)
    assert monitor.reading.skipped


def test_evaluation_and_passes_that_run_again_do_not_count() -> None:
    class Rerun(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.GELU())

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.body, x, use_reentrant=False)

    model = Rerun()
    optimizer, monitor = made(model, every=1)
    model.eval()
    model(torch.ones(1, 3))
    model.train()
    optimizer.backward(model(torch.ones(2, 3)).float().sum())
    optimizer.step()
    assert [finding.passes for finding in monitor.reading.activations] == [1, 1]
    assert {finding.shape for finding in monitor.reading.activations} == {(2, 3)}


def test_gradients_cleared_between_forward_and_backward_leave_the_pass() -> None:
    model = nn.Linear(2, 2)
    optimizer, monitor = made(model, every=1)
    for _ in range(2):
        loss = model(torch.ones(1, 2)).float().sum()
        optimizer.zero_grad()
        optimizer.backward(loss)
        optimizer.step()
        assert [finding.passes for finding in monitor.reading.activations] == [1]


def test_watching_changes_no_bit() -> None:
    results = []
    for activations in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
        optimizer, _ = made(model, every=1, activations=activations)
        for _ in range(3):
            optimizer.backward(model(torch.randn(5, 4)).float().square().mean())
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *results))


def test_copies_and_pickles_of_a_watched_model_watch_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer, monitor = made(model, every=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(torch.ones(1, 2)), model(torch.ones(1, 2)))
        assert "_Hook" not in repr(other._forward_hooks)
    optimizer.backward(model(torch.ones(1, 2)).float().sum())
    optimizer.step()
    assert [finding.passes for finding in monitor.reading.activations] == [3]  # of the model's own


def test_a_compiled_model_trains_and_tells_of_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer, monitor = made(model, every=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer.backward(compiled(torch.ones(1, 2)).float().sum())
    optimizer.step()
    assert monitor.reading.activations == ()
    assert not optimizer.last_step.skipped


def test_what_has_no_values_of_its_own_is_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            each = torch.func.vmap(self.body)(x)
            empty, wide = each[:0], each.double()
            return {"each": each, "empty": empty, "wide": wide, "sparse": each.to_sparse()}

    model = Odd()
    optimizer, monitor = made(model, every=1)
    optimizer.backward(model(torch.ones(3, 2))["each"].float().sum())
    optimizer.step()
    assert [finding.name for finding in monitor.reading.activations] == ["Odd['each']"]
    assert not optimizer.last_step.skipped


def test_records_and_the_page_have_them(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    path = tmp_path / "run.jsonl"
    optimizer, monitor = made(model, torch.bfloat16, every=1, sinks=[mpcore.JsonLines(path)])
    for _ in range(2):
        optimizer.backward(model(torch.ones(1, 2)).float().sum())
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    readings = RunLog.of("run", read_records(path)).readings
    assert readings[-1].activations == monitor.reading.activations
    assert len(readings[-1].activations) == 2
    page = render_runs([RunLog.read(path)], "A run")
    assert "Module by module" in page
    assert page.count("No loss scale is in it") == 1


def test_without_a_model_there_is_nothing_to_watch() -> None:
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(mpcore.ArgumentError, match="activations: expected a model"):
        mpcore.Monitor(optimizer, activations=True)
    assert optimizer._stage.watcher is None
