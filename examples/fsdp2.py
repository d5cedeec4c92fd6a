"""FSDP2: sharded float32 weights, bfloat16 arithmetic, a clip over all ranks, a checkpoint.

    torchrun --nproc-per-node 2 examples/fsdp2.py FOLDER

Run it twice: it saves into FOLDER half way, and goes on from what is there. On GPUs or a CPU.
"""

import os
import sys

import mpcore
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def main(folder: str) -> None:
    """Trains a small Transformer on tokens that count up."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)
    blocks = [nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in "12"]
    model = nn.Sequential(nn.Embedding(64, 32), *blocks, nn.Linear(32, 64)).to(kind)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in [*blocks, model]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    inner = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale())  # the mesh agrees
    if os.path.exists(f"{folder}/.metadata"):
        weights, states = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    begin = optimizer.steps
    for step in range(begin, 20):
        draw = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        tokens = (torch.randint(64, (8, 1), generator=draw) + torch.arange(17)).remainder(64)
        logits = model(tokens[:, :-1].to(kind)).float()
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:].to(kind))
        optimizer.backward(loss)
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 9:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        print(f"from step {begin}: loss {loss.item()!r}, norm {norm.item()!r}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
