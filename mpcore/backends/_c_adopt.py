"""`adopt_` of the compiled backend: one call of C for all weights of a dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.backends import _cast
from mpcore.backends._blocks import memory_order
from mpcore.backends._c_compiler import passes
from mpcore.backends._c_work import DTYPES, Work, addresses_of, by_dtype, cut_chunks, run
from mpcore.base import SIXTEEN_BIT


@torch.no_grad()
def adopt_(weights: Sequence[Tensor], masters: Sequence[Tensor], counts: Tensor) -> None:
    """Makes weights that are not their rounded masters the masters, by element; CPU tensors.

    Bitwise `mpcore.backends.reference.adopt_`, which documents the arguments.

    Raises:
        BackendError: The compiler refused.
    """
    pass_over = passes().adopt  # before anything is written
    here: list[tuple[Tensor, Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor, Tensor]] = []
    for weight, master, row in zip(weights, masters, counts.unbind(), strict=True):
        (here if _lie_alike(weight, master) else others).append((weight.detach(), master, row))
    if here:
        held = [memory_order(master) for _, master, _ in here]
        flat = [memory_order(weight) for weight, _, _ in here]
        found = torch.zeros(len(here), 2, dtype=torch.int64, device="cpu")
        addresses = addresses_of(held)
        work = Work(masters=addresses.buffer_info()[0], edits=found.data_ptr(), tensors=len(held))
        work.keep(addresses, found)
        for dtype, cut, places in by_dtype(flat, cut_chunks([weight.numel() for weight in flat])):
            work.take_up(dtype, cut, places)
            work.weights, work.weight_dtype = places.buffer_info()[0], DTYPES[dtype]
            run(pass_over, work)
        for (_, _, row), count in zip(here, found.unbind(), strict=True):
            row.add_(count)
    for weight, master, row in others:
        _cast.adopt_([weight], [master], row.unsqueeze(0))


def _lie_alike(weight: Tensor, master: Tensor) -> bool:
    """Whether elements of both lie in the same order, without gaps, in dtypes that C knows."""
    same = weight.shape == master.shape and weight.stride() == master.stride()
    if not same or master.dtype != torch.float32 or weight.dtype not in SIXTEEN_BIT:
        return False
    return memory_order(master).data_ptr() == master.data_ptr()
