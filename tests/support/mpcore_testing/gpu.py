"""What the tests for a real GPU need; where there is none, the CPU rehearses them.

A test that never runs decays: nobody notices when what it calls has changed. So whatever does not
need the device itself runs without one too, on fewer elements, through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton

from mpcore_kernels.unscale import _unscale_kernel

#: Whether the kernels are compiled, and not interpreted: settled when they are imported.
ON_A_GPU = torch.cuda.is_available() and isinstance(_unscale_kernel, triton.JITFunction)
DEVICE = torch.device("cuda" if ON_A_GPU else "cpu")


def many(on_a_gpu: int, rehearsed: int) -> int:
    """How many elements, tensors or repetitions."""
    return on_a_gpu if ON_A_GPU else rehearsed


def rehearsed(values: Iterable[Any], few: int) -> list[Any]:
    """All values of a parameter on a GPU, the first few in a rehearsal.

    What the others compute is tested on the CPU in tests/kernels.
    """
    chosen = list(values)
    return chosen if ON_A_GPU else chosen[:few]


@contextmanager
def no_sync() -> Iterator[None]:
    """Within it, a call that waits for the GPU raises."""
    if not ON_A_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], None], state: list[torch.Tensor]) -> Callable[[], None]:
    """Returns a replay of `step` from a CUDA graph, or `step` itself where there is no GPU.

    A step is taken first, as graphs want it; `state` is put back after it.
    """
    saved = [tensor.clone() for tensor in state]
    if ON_A_GPU:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    else:
        step()
    for tensor, value in zip(state, saved, strict=True):
        tensor.copy_(value)
    return graph.replay if ON_A_GPU else step
