"""A user's script, as type checkers see it: `make lint` reads it, nobody runs it."""

import mpcore
import torch

model: torch.nn.Module = torch.nn.Linear(4, 1)
optimizer = mpcore.MixedPrecisionOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    mpcore.DynamicLossScale(2.0**10),
    path="fused",
    backend="auto",
    on_weight_edit="adopt",
)
model = mpcore.cast_model(model, torch.float16, optimizer)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
x = torch.randn(8, 4)
for _ in range(3):
    loss = model(x).float().square().mean()
    optimizer.backward(loss)
    print(optimizer.clip_grad_norm_(1.0).item())
    optimizer.step()
    mpcore.step_scheduler(scheduler, optimizer.last_step)
    mpcore.step_scheduler(cosine, optimizer.last_step)
    mpcore.step_scheduler(plateau, optimizer.last_step, 1.0)
    optimizer.zero_grad()
with mpcore.Monitor(optimizer, model, every=2, sinks=[print]) as monitor:
    pass
scaler = mpcore.GradScaler("cpu", init_scale=2.0**8)
state = optimizer.state_dict()
optimizer.load_state_dict(state)
optimizer.accumulate()
trace = mpcore.trace_overflow(model, x, lambda out: out.float().mean())
found = mpcore.preflight(torch.nn.Linear(4, 1), x, lambda out: out.mean())
print(found.dtype, optimizer.path, optimizer.backend)


def train(run: mpcore.TrainingRun) -> float:
    model = torch.nn.Linear(4, 1)
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.step()
    return 1.0


print(mpcore.compare(train, ["float16", ("bfloat16", mpcore.NoLossScale())], seeds=1))
