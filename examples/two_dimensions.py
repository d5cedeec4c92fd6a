"""A 2-D mesh: tensor parallel layers, FSDP2 over them, float16 shards with float32 masters.

    torchrun --nproc-per-node 4 examples/two_dimensions.py

On GPUs it takes one for each process; without any it runs on the CPU.
"""

import os

import mpcore
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def main() -> None:
    """Trains a small network to add up its inputs; ranks of "data" see other batches."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    size = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh(kind, (size // 2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    # each rank of "tensor" computes a half of the two layers of a block
    blocks = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(2)]
    model = nn.Sequential(nn.Linear(16, 32), *blocks, nn.Linear(32, 1)).to(kind, torch.float16)
    for block in blocks:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(block, mesh["tensor"], plan)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh["data"])
    # made after the shards; the ranks of both meshes agree without being told
    inner = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    optimizer = mpcore.MixedPrecisionOptimizer(inner)
    draw = torch.Generator().manual_seed(mesh["data"].get_local_rank())
    for step in range(100):
        x = torch.randn(32, 16, generator=draw).to(kind)
        loss = nn.functional.mse_loss(model(x.half()).float(), x.mean(dim=1, keepdim=True) * 4)
        optimizer.backward(loss)
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 33 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}, norm {norm.item():.3f}")
    if dist.get_rank() == 0:
        print(f"path {optimizer.path[0].path}, loss scale {optimizer.loss_scale:g}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
