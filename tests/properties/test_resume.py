"""Training that was saved anywhere and goes on has the bits of training that never stopped."""

from __future__ import annotations

import io
from typing import Any

import mpcore
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine, can_fuse
from mpcore_testing.snapshots import snapshot

INNERS: dict[str, Any] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1),
    "AMSGrad": lambda groups: torch.optim.Adam(groups, lr=0.05, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, lr_decay=0.1),
    "Lion": lambda groups: mpcore.optim.Lion(groups, lr=0.01),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=0.05),
}
SCALES = st.sampled_from(
    [
        mpcore.DynamicLossScale(2.0**6, growth_interval=2),
        mpcore.DynamicLossScale(2.0**6, growth_interval=2, hysteresis=2, refill="clean"),
        mpcore.DynamicLossScale(2.0**6, growth_interval=3, tolerance=0.4),
        mpcore.HeadroomLossScale(2.0**6, window=4),
        mpcore.StaticLossScale(2.0**5),
    ]
)
DTYPES = st.lists(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), min_size=1, max_size=3
)
#: for each step: how many micro-batches, and which of them overflows
STEP = st.tuples(st.integers(1, 3), st.none() | st.integers(0, 2))


class Run:
    """A model, its optimizer, and what is done to them."""

    def __init__(self, engine: Engine, kind: str, dtypes: Any, scale: Any, named: bool) -> None:
        values = [torch.linspace(-1, 1, 4 + i) for i in range(len(dtypes))]
        self.params = [nn.Parameter(v.to(d)) for v, d in zip(values, dtypes, strict=True)]
        names = [(f"p{i}", p) for i, p in enumerate(self.params)]
        chosen = names if named else self.params
        self.optimizer = engine.wrap(INNERS[kind]([{"params": chosen}]), scale)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def grow(self) -> None:
        """Adds a param group, half of it in 16 bits."""
        added = [nn.Parameter(torch.linspace(0, 1, 5).to(d)) for d in (torch.float16, torch.float)]
        self.params += added
        named = "param_names" in self.optimizer.param_groups[0]
        params = [(f"added{i}", p) for i, p in enumerate(added)] if named else added
        self.optimizer.add_param_group({"params": params, "lr": 0.02})
        # schedulers know the groups they were made with
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def micro_batch(self, seed: int, bad: bool, sums: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(p.shape, generator=generator) for p in self.params]
        if bad:
            noise[-1][0] = torch.inf
        pairs = zip(self.params, noise, strict=True)
        self.optimizer.backward(torch.stack([(p.float() * n).sum() for p, n in pairs]).sum())
        if sums:
            self.optimizer.accumulate()

    def step(self, clips: bool) -> None:
        if clips:
            self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def saved(self) -> Any:
        buffer = io.BytesIO()
        weights = [param.detach() for param in self.params]
        state = [weights, self.optimizer.state_dict(), self.scheduler.state_dict()]
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True, map_location="cpu")

    def load(self, saved: Any) -> None:
        weights, optimizer, scheduler = saved
        with torch.no_grad():
            for param, weight in zip(self.params, weights, strict=True):
                param.copy_(weight)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)

    def everything(self) -> Any:
        return snapshot(self.optimizer), self.optimizer.state_dict()


@settings(max_examples=150)
@given(
    engine=st.sampled_from(ENGINES),
    kind=st.sampled_from(sorted(INNERS)),
    dtypes=DTYPES,
    scale=SCALES,
    steps=st.lists(STEP, min_size=2, max_size=7),
    stops=st.sets(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1),
    flags=st.tuples(*[st.booleans()] * 3),
    grows=st.none() | st.integers(0, 5),
)
def test_stopping_anywhere_any_number_of_times_shows_in_no_bit(
    engine: Engine,
    kind: str,
    dtypes: Any,
    scale: Any,
    steps: Any,
    stops: Any,
    flags: Any,
    grows: int | None,
) -> None:
    if engine.fused and not can_fuse(INNERS[kind]):
        engine = Engine(engine.backend, "general")
    named, sums, clips = flags
    straight = Run(engine, kind, dtypes, scale, named)
    stopped = Run(engine, kind, dtypes, scale, named)
    for number, (batches, bad) in enumerate(steps):
        if number == grows:
            straight.grow()
            stopped.grow()
        for batch in range(batches):
            # within a step what was added up is saved, and gradients in `p.grad` are not
            if (number, batch) in stops and (batch == 0 or sums):
                saved = stopped.saved()
                stopped = Run(engine, kind, dtypes, scale, named)
                if grows is not None and number >= grows:
                    stopped.grow()
                stopped.load(saved)
            for run in (straight, stopped):
                run.micro_batch(10 * number + batch, bad == batch, sums)
        for run in (straight, stopped):
            run.step(clips)
    assert same_bits(stopped.everything(), straight.everything())
