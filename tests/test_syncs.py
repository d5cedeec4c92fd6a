"""Host syncs of a step: one beyond the inner optimizer's own, none if it takes `found_inf`."""

import mpcore
import pytest
import torch

from mpcore_testing.engines import GENERAL
from mpcore_testing.optimizers import Case, fused_cases, step_cases
from mpcore_testing.syncs import HostSyncError, ScalarReads, fake_cuda
from mpcore_testing.twins import mixed_groups

#: ours, or PyTorch's own where it was built without CUDA and asks for the device first
REFUSED = "the host|not linked with support for cuda"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

# ------------------------------------------------------------------ counting reads on a CPU


def reads(action):
    with ScalarReads() as counter:
        action()
    return counter.count


def excess_reads(case, *, clean_steps):
    """Reads by one step of the wrapper beyond those of the inner optimizer over FP32 copies."""
    groups = mixed_groups(torch.Generator().manual_seed(0), matrices_only=case.matrices_only)
    params = [param for group in groups for param in group]
    copies = [torch.nn.Parameter(p.detach().clone().float()) for p in params]
    wrapped = GENERAL.wrap(case.build(params))
    plain = case.build(copies)

    def wrapped_step():
        wrapped.scale(torch.ones(()))
        wrapped.clip_grad_norm_(1.0)
        wrapped.step()
        wrapped.zero_grad()

    for number in range(clean_steps + 1):
        for param, fp32 in zip(params, copies, strict=True):
            param.grad, fp32.grad = torch.ones_like(param), torch.ones_like(fp32)
        if number == clean_steps:
            return reads(wrapped_step) - reads(plain.step)
        wrapped_step()
        plain.step()


@pytest.mark.parametrize("case", step_cases(), ids=str)
def test_step_reads_one_value_more_than_the_inner_optimizer_and_none_if_that_takes_found_inf(case):
    assert excess_reads(case, clean_steps=2) == (0 if case.on_device else 1)


@pytest.mark.parametrize("case", step_cases(), ids=str)
def test_first_step_reads_at_most_one_value_more_than_the_inner_optimizer(case):
    # torch's fused SGD makes its momentum buffers in a first step that must not be skipped
    assert excess_reads(case, clean_steps=0) == (
        0 if case.on_device and not case.starts_together else 1
    )


def test_number_of_reads_does_not_grow_with_parameters_groups_or_backward_passes():
    params = [torch.nn.Parameter(torch.ones(3).half()) for _ in range(40)]
    groups = [{"params": params[i : i + 4]} for i in range(0, 40, 4)]
    optimizer = GENERAL.wrap(torch.optim.SGD(groups, lr=0.1))

    def step():
        for _ in range(3):
            optimizer.backward(sum(p.float().sum() for p in params))
        optimizer.unscale_()
        optimizer.grads()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    assert reads(step) == 1


def test_step_with_a_closure_reads_one_value_more_per_evaluation():
    # no line search: it would need more evaluations in one precision than in the other
    case = Case("LBFGS", {"lr": 0.5, "max_iter": 4})
    params = [torch.nn.Parameter(torch.ones(3).half()), torch.nn.Parameter(torch.ones(2))]
    copies = [torch.nn.Parameter(p.detach().clone().float()) for p in params]
    wrapped = GENERAL.wrap(case.build(params), mpcore.StaticLossScale(8.0))
    plain = case.build(copies)
    evaluations = []

    def closure_over(tensors, optimizer, backward):
        def closure():
            optimizer.zero_grad()
            loss = sum((t.float() - 0.5).square().sum() for t in tensors)
            backward(loss)
            evaluations.append(optimizer)
            return loss

        return closure

    with_scale = closure_over(params, wrapped, wrapped.backward)
    without = closure_over(copies, plain, torch.Tensor.backward)
    ours = reads(lambda: wrapped.step(with_scale))
    theirs = reads(lambda: plain.step(without))
    count = evaluations.count(wrapped)
    assert count == evaluations.count(plain) > 1
    assert ours - theirs <= count


def test_overflowing_step_with_a_fused_optimizer_reads_nothing_until_last_step_is_asked():
    weight = torch.nn.Parameter(torch.ones(3).half())
    optimizer = GENERAL.wrap(torch.optim.AdamW([weight], fused=True))

    def step():
        optimizer.scale(torch.ones(()))
        weight.grad = torch.full_like(weight, torch.inf)
        optimizer.step()

    # torch's fused Adam reads no value either
    assert reads(step) == 0
    assert reads(lambda: optimizer.last_step.skipped) == 1
    assert reads(lambda: optimizer.loss_scale) == 1
    assert optimizer.last_step.skipped


# ------------------------------------------------------------------ on "cuda", without a GPU


def fake_params():
    shapes = [((3, 4), HALF), ((0, 4), HALF), ((), BRAIN), ((5,), FULL), ((2, 2), BRAIN)]
    return [torch.nn.Parameter(torch.empty(s, dtype=d, device="cuda")) for s, d in shapes]


def steps_on(params, optimizer, count, *, use=lambda optimizer: optimizer.clip_grad_norm_(1.0)):
    """Whole steps; gradients are assigned as a backward pass would leave them."""
    for number in range(count):
        optimizer.scale(torch.empty((), device="cuda"))
        for param in params:
            param.grad = torch.empty_like(param)
        if number == 1:
            params[0].grad = None
        use(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def on_fake_cuda(case, loss_scale, use):
    params = fake_params()
    optimizer = GENERAL.wrap(
        case.build([{"params": params[:2]}, {"params": params[2:]}]),
        loss_scale,
    )
    steps_on(params, optimizer, 3, use=use)
    masters = [optimizer.state[p]["master"] for p in params if p.dtype != FULL]
    assert {(m.dtype, m.device.type) for m in masters} == {(FULL, "cuda")}


def unscale_edit_and_clip(optimizer):
    optimizer.unscale_()
    for grad in optimizer.grads():
        grad.mul_(0.5)
    optimizer.clip_grad_norm_(1.0)


WAYS = {
    "step": lambda optimizer: None,
    "clip": lambda optimizer: optimizer.clip_grad_norm_(1.0),
    "unscale": lambda optimizer: optimizer.unscale_(),
    "unscale, edit, clip": unscale_edit_and_clip,
}


LOSS_SCALES = [
    mpcore.DynamicLossScale(growth_interval=2, hysteresis=2),
    mpcore.StaticLossScale(8.0),
    mpcore.NoLossScale(),
]


@pytest.mark.parametrize("loss_scale", LOSS_SCALES, ids=lambda scale: type(scale).__name__)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_a_step_and_every_loss_scale_stay_on_the_device(way, loss_scale):
    with fake_cuda() as watch:
        on_fake_cuda(Case("AdamW", {"fused": True}), loss_scale, WAYS[way])
    assert watch.operations > 100
    assert watch.reads == 0


@pytest.mark.parametrize("case", [c for c in fused_cases() if not c.starts_together], ids=str)
def test_fused_optimizers_step_on_the_device_alone(case):
    with fake_cuda() as watch:
        on_fake_cuda(case, mpcore.DynamicLossScale(), WAYS["unscale, edit, clip"])
    assert watch.operations > 100
    assert watch.reads == 0


@pytest.mark.parametrize("case", [c for c in fused_cases() if c.starts_together], ids=str)
def test_fused_sgd_with_momentum_reads_once_in_its_first_step_and_then_never(case):
    with fake_cuda(answer=lambda: 0.0) as watch:
        params = fake_params()
        optimizer = GENERAL.wrap(case.build(params))
        steps_on(params, optimizer, 1)
        assert watch.reads == 1
        steps_on(params, optimizer, 3)
        assert watch.reads == 1


UNFUSED_ON_DEVICE = [
    Case("SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    Case("AdamW", {"capturable": True, "foreach": True}),
    Case("RMSprop", {"capturable": True, "foreach": False}),
]


@pytest.mark.parametrize("case", UNFUSED_ON_DEVICE, ids=str)
def test_step_of_an_unfused_optimizer_asks_the_device_exactly_once(case):
    with fake_cuda(answer=lambda: 0.0) as watch:
        params = fake_params()
        optimizer = GENERAL.wrap(case.build(params))
        for done in range(1, 4):
            steps_on(params, optimizer, 1)
            assert watch.reads == done


@pytest.mark.parametrize("case", UNFUSED_ON_DEVICE, ids=str)
def test_unfused_optimizer_raises_where_no_read_is_allowed(case):
    with fake_cuda():
        params = fake_params()
        optimizer = GENERAL.wrap(case.build(params))
        with pytest.raises(HostSyncError, match="read a value"):
            steps_on(params, optimizer, 1)


@pytest.mark.parametrize(
    "read",
    [
        lambda o: o.loss_scale,
        lambda o: o.steps,
        lambda o: o.last_step.skipped,
        lambda o: o.saturated,
    ],
)
def test_numbers_for_the_user_sync_only_when_they_are_read(read):
    with fake_cuda() as watch:
        params = fake_params()
        optimizer = GENERAL.wrap(torch.optim.AdamW(params, fused=True))
        steps_on(params, optimizer, 1)
        assert watch.reads == 0
        with pytest.raises(RuntimeError, match=REFUSED):
            read(optimizer)


SYNCING = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum()),
    "float": lambda t: float(t.sum()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "non-blocking copy to the host": lambda t: t.to("cpu", non_blocking=True),
    "copy into a host tensor": lambda t: torch.empty(5, dtype=t.dtype).copy_(t),
    "copy from the host": lambda t: torch.ones(3).to("cuda"),
    "host scalar in an operation": lambda t: torch.where(t > 0, t, torch.tensor(0.0)),
}


@pytest.mark.parametrize("name", SYNCING)
def test_harness_catches_a_sync_in_the_middle_of_a_step(name):
    """Control: the tests above can fail."""

    def sneak(optimizer):
        optimizer.unscale_()
        SYNCING[name](optimizer.grads()[-2])

    with fake_cuda(), pytest.raises(RuntimeError, match=REFUSED):
        on_fake_cuda(Case("AdamW", {"fused": True}), mpcore.DynamicLossScale(), sneak)


@pytest.mark.parametrize("read", [torch.equal, torch.allclose], ids=["equal", "allclose"])
def test_harness_catches_comparisons(read):
    with fake_cuda():
        tensor = torch.empty(3, device="cuda")
        other = torch.empty_like(tensor)
        with pytest.raises(RuntimeError, match=r"aten\.(equal|allclose)"):
            read(tensor, other)
