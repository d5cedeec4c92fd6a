"""What stays from one fused update to the next: the tables of a plan and what was checked of them.

A plan is made once for a set of tensors, whose addresses are taken as fixed. What changes from step
to step is small: the gradients' addresses, which are uploaded if they are not those of a recent
step, and the hyper-parameters, likewise. The host reads each gradient's address once per step and
compares lists of properties; it loops over no tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mpcore_kernels._cache import PLAIN_TYPES, TableCache, remembered
from mpcore_kernels._checks import check_no_overlap, check_pairs, check_tensors
from mpcore_kernels._table import upload
from mpcore_kernels._update_batch import Batch, Hyper, check_batch, tensors_of
from mpcore_kernels._update_kernel import CHUNK, ROW
from mpcore_kernels.rules import Rule

# steps whose gradients' addresses, or hyper-parameters, are kept on the device
_KEPT = 8
_LAYOUT: tuple[Any, ...] = (attrgetter("shape"), Tensor.stride)
_KIND: tuple[Any, ...] = (*map(attrgetter, ("dtype", "device", "layout")), Tensor.is_neg)


@dataclass(frozen=True)
class Part:
    """One batch and its tables.

    Attributes:
        batch: The tensors.
        place: Where its tensors are among those of all batches.
        weight: Dtype of the weights; None for float32 parameters.
        rows: `[tensors, 8]`, int64: see `_update_kernel.py`.
        owners: `[chunks]`, int64: see there.
        layout: Shapes and strides of the masters.
    """

    batch: Batch
    place: slice
    weight: torch.dtype | None
    rows: Tensor
    owners: Tensor
    layout: list[list[Any]]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What its gradients may hold."""
        return (torch.float32,) if self.weight is None else (self.weight, torch.float32)


@dataclass
class Plan:
    """Made by `plan_update` and used up by nothing: it serves every step of the same tensors.

    Attributes:
        rule: What computes the update.
        device: Where the tensors are; of no meaning if there are none.
        parts: The batches.
        owners: `[tensors, 2]`, int64: address of the step count, or 0, and param group.
        scalars: `[tensors, columns + 1]`, float32: see `_prepare.py`.
        groups: How many param groups there must be.
        written: Everything that an update writes.
        spans: Ascending start and end addresses of that, on the host.
        prepared: Whether `scalars` are those of the next update.

    Example:
        >>> from types import SimpleNamespace
        >>> from mpcore_kernels import plan_update
        >>> masters = [torch.zeros(5000), torch.zeros(3)]
        >>> batch = SimpleNamespace(masters=masters, weights=None, moments=[], steps=None,
        ...                         groups=[0, 1])
        >>> plan = plan_update("sgd", [batch])
        >>> plan.tensors, plan.groups, plan.parts[0].owners.tolist()
        (2, 2, [0, 0, 0, 1])
    """

    rule: Rule
    device: torch.device
    parts: list[Part]
    owners: Tensor
    scalars: Tensor
    groups: int
    written: list[Tensor]
    spans: tuple[Tensor, Tensor]
    prepared: bool = False
    _addresses: TableCache = field(default_factory=lambda: TableCache(_KEPT))
    _numbers: TableCache = field(default_factory=lambda: TableCache(_KEPT))

    @property
    def tensors(self) -> int:
        """How many tensors all batches have."""
        return self.owners.shape[0]

    def prepare_arguments(self, hyper: Hyper) -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns the arguments of `_prepare_kernel`; no host sync.

        Raises:
            ValueError: If `hyper` does not fit the rule, the param groups or the device.
            RuntimeError: If a CUDA graph is being captured and `hyper` is new.
        """
        bits = array("d", chain.from_iterable(hyper.numbers)).tobytes()
        lrs = [None if lr is None else (lr.data_ptr(), lr.dtype, lr.device) for lr in hyper.lrs]
        key = (bits, tuple(map(len, hyper.numbers)), tuple(lrs))
        numbers = remembered(
            self._numbers,
            key,
            name="prepare_",
            what="hyper-parameters that are new",
            device=self.device,
            make=lambda: self._upload_numbers(hyper, bits),
        )
        return self.owners, numbers, self.scalars, self.tensors

    def _upload_numbers(self, hyper: Hyper, bits: bytes) -> Tensor:
        width = len(self.rule.numbers)
        for index, row in enumerate(hyper.numbers):
            if len(row) != width:
                raise ValueError(
                    f"hyper.numbers[{index}]: expected {width} numbers, "
                    f"{', '.join(self.rule.numbers)}, got {len(row)}."
                )
        if len(hyper.numbers) < self.groups or len(hyper.lrs) != len(hyper.numbers):
            raise ValueError(
                f"hyper: expected a row of numbers and an entry of lrs for each of at least "
                f"{self.groups} param groups, got {len(hyper.numbers)} and {len(hyper.lrs)}."
            )
        for index, lr in enumerate(hyper.lrs):
            if lr is not None and (
                lr.dtype != torch.float32 or lr.numel() != 1 or lr.device != self.device
            ):
                raise ValueError(
                    f"hyper.lrs[{index}]: expected a float32 tensor of one element on "
                    f"{self.device}, got {lr.dtype} of {lr.numel()} elements on {lr.device}."
                )
        table = torch.empty(len(hyper.numbers), width + 1, dtype=torch.int64, device="cpu")
        table[:, 1:] = torch.frombuffer(bytearray(bits), dtype=torch.int64).view(-1, width)
        addresses = [0 if lr is None else lr.data_ptr() for lr in hyper.lrs]
        table[:, 0] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return upload(table, self.device)

    def addresses_of(
        self, grads: Sequence[Sequence[Tensor]]
    ) -> tuple[list[torch.dtype], list[Tensor]]:
        """Returns dtype and addresses, on the device, of the gradients of each batch; no host sync.

        Raises:
            TypeError: If a gradient is no tensor.
            ValueError: If gradients do not fit their batch, or share memory with what is written.
            RuntimeError: If a CUDA graph is being captured and the gradients are new.
        """
        if not self.tensors and not any(map(len, grads)):
            return [], []
        if len(grads) != len(self.parts):
            raise ValueError(f"grads: expected {len(self.parts)} lists, got {len(grads)}.")
        dtypes = [
            self._dtype_of(index, part, list(tensors))
            for index, (part, tensors) in enumerate(zip(self.parts, grads, strict=True))
        ]
        found = tuple(map(Tensor.data_ptr, chain.from_iterable(grads)))
        table = remembered(
            self._addresses,
            (found, tuple(dtypes)),
            name="update_",
            what="gradients that are new",
            device=self.device,
            make=lambda: self._upload_addresses(found, dtypes),
        )
        return dtypes, table

    def _dtype_of(self, index: int, part: Part, grads: list[Any]) -> torch.dtype:
        """Returns the dtype of the gradients of a batch; raises unless they are what it needs."""
        # lists and sets of properties, made and compared in the interpreter's C
        if len(grads) == len(part.batch.masters) and PLAIN_TYPES.issuperset(map(type, grads)):
            kinds = [set(map(read, grads)) for read in _KIND]
            ours = [{self.device}, {torch.strided}, {False}]
            layout = [list(map(read, grads)) for read in _LAYOUT] if kinds[1:] == ours else None
            if layout == part.layout and len(kinds[0]) == 1 and kinds[0].issubset(part.dtypes):
                dtype: torch.dtype = grads[0].dtype
                return dtype
        # something differs: say what, or find that it does not matter
        name = f"grads[{index}]"
        check_tensors(name, grads, part.dtypes, self.device)
        check_pairs("masters", part.batch.masters, name, grads)
        if len({grad.dtype for grad in grads}) > 1:
            raise ValueError(f"{name}: expected one dtype, got several. Make a batch of each.")
        return next((grad.dtype for grad in grads), part.dtypes[0])

    def _upload_addresses(
        self, found: tuple[int, ...], dtypes: Sequence[torch.dtype]
    ) -> list[Tensor]:
        starts = torch.tensor(found, dtype=torch.int64, device="cpu")
        sizes = [
            master.numel() * dtype.itemsize
            for part, dtype in zip(self.parts, dtypes, strict=True)
            for master in part.batch.masters
        ]
        ends = starts + torch.tensor(sizes, dtype=torch.int64, device="cpu")
        if ((starts == 0) & (ends != 0)).any():
            raise ValueError("grads: expected tensors that hold memory, got one that holds none.")
        first, last = self.spans
        # the first span that ends behind the start of the gradient
        place = torch.searchsorted(last, starts, right=True)
        shares = (place < len(first)) & (ends > starts)
        if len(first):
            shares &= first[place.clamp(max=len(first) - 1)] < ends
        if shares.any():
            index = int(shares.nonzero()[0])
            raise ValueError(
                f"grads: expected memory of their own, got memory shared with what is updated, "
                f"from gradient {index} of all batches on. Pass no view of a parameter."
            )
        table = upload(starts, self.device)
        return [table[part.place] for part in self.parts]


def make_plan(rule: Rule, batches: Sequence[Batch]) -> Plan:
    """Checks the tensors of all batches and builds their tables, without a host sync."""
    device = next((batch.masters[0].device for batch in batches if len(batch.masters)), None)
    if device is None:
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        return Plan(
            rule=rule,
            device=nothing.device,
            parts=[],
            owners=nothing.view(0, 2),
            scalars=torch.empty(0, rule.columns + 1, device="cpu"),
            groups=0,
            written=[],
            spans=(nothing, nothing),
        )
    parts: list[Part] = []
    owners: list[tuple[int, int]] = []
    written: list[Tensor] = []
    first = 0
    for index, batch in enumerate(batches):
        check_batch(f"batches[{index}]", rule, batch, device)
        place = slice(first, first + len(batch.masters))
        parts.append(_part(batch, place, device))
        steps = [0] * len(batch.masters) if batch.steps is None else map(_address, batch.steps)
        owners += zip(steps, batch.groups, strict=True)
        written += tensors_of(batch)
        first = place.stop
    check_no_overlap("batches", written)
    return Plan(
        rule=rule,
        device=device,
        parts=parts,
        owners=upload(torch.tensor(owners, dtype=torch.int64, device="cpu").view(-1, 2), device),
        scalars=torch.empty(first, rule.columns + 1, dtype=torch.float32, device=device),
        groups=1 + max(group for batch in batches for group in batch.groups),
        written=written,
        spans=_spans(written),
    )


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _spans(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns ascending start and end addresses of tensors that share no memory."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for tensor in tensors
        if tensor.numel()
    )
    table = torch.tensor(spans, dtype=torch.int64, device="cpu").view(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()


def _part(batch: Batch, place: slice, device: torch.device) -> Part:
    """Describes one batch on its device, without a host sync."""
    masters, nothing = batch.masters, [0] * len(batch.masters)
    # a tensor without elements has a step count, and so a program that writes it
    programs = [max(1, -(-master.numel() // CHUNK)) for master in masters]
    columns = [
        [master.numel() for master in masters],
        [0, *accumulate(programs)][:-1],
        nothing if batch.weights is None else [*map(_address, batch.weights)],
        nothing if batch.steps is None else [*map(_address, batch.steps)],
        [*map(_address, masters)],
        *([*map(_address, moment)] for moment in batch.moments),
    ]
    columns += [nothing] * (ROW - len(columns))
    rows = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()
    owners = torch.repeat_interleave(torch.tensor(programs, dtype=torch.int64, device="cpu"))
    return Part(
        batch=batch,
        place=place,
        weight=batch.weights[0].dtype if batch.weights else None,
        rows=upload(rows, device),
        owners=upload(owners, device),
        layout=[list(map(read, masters)) for read in _LAYOUT],
    )
