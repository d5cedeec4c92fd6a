"""Float16 under DistributedDataParallel: two passes a step, summed in float32, clipped as one.

    torchrun --nproc-per-node 2 examples/ddp.py

On GPUs it takes one for each process; without any it runs on the CPU.
"""

import contextlib
import os

import mpcore
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Trains a small network to add up its inputs; every rank sees other data."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).to(device)
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=3e-3), ranks=mpcore.Ranks()
    )
    mpcore.cast_model(model, torch.float16, optimizer)
    ddp = DistributedDataParallel(model)
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    for step in range(100):
        for micro_batch in range(2):
            x = torch.randn(32, 16, generator=draw).to(device)
            waits = ddp.no_sync() if micro_batch == 0 else contextlib.nullcontext()
            with waits:  # sums are exchanged once, in the step, in float32
                loss = nn.functional.mse_loss(ddp(x).float(), x.mean(dim=1, keepdim=True) * 4)
                optimizer.backward(loss / 2)
            optimizer.accumulate()
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 33 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}, norm {norm.item():.3f}")
    weights = torch.cat([param.detach().float().reshape(-1) for param in model.parameters()])
    first = weights.clone()
    dist.broadcast(first, 0)
    assert torch.equal(weights, first), "ranks have drifted apart"
    if dist.get_rank() == 0:
        print(f"ranks agree; loss scale {optimizer.loss_scale:g}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
