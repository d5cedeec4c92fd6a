"""Which tensors have memory of their own.

C and Triton reach elements by address. A DTensor, a wrapper around other tensors, a sparse,
nested, meta or functional tensor has no address, or one where its values are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mpcore.base.bulk import layouts_of
from mpcore.base.dtensors import PLAIN


def why_no_memory(tensor: Tensor) -> str | None:
    """Returns why the values of a tensor are not what lies at its address, or None; no host sync.

    Example:
        >>> why_no_memory(torch.ones(2)) is None
        True
        >>> why_no_memory(torch.ones(2).to_sparse())
        'its layout is torch.sparse_coo'
    """
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_nested:
        return "it is a nested tensor"
    if torch._is_functional_tensor(tensor):
        return "it is a functional tensor"
    if tensor.is_neg():
        return "it is a view that negates its memory"
    if type(tensor) in PLAIN:
        if tensor.numel() and not tensor.is_meta and tensor.data_ptr() == 0:
            return "its memory was freed"
        return "it is on the meta device" if tensor.is_meta else None
    if hasattr(tensor, "to_local"):  # whose storage takes long to say that there is none
        return f"a {type(tensor).__name__} has no memory of its own"
    try:  # a tensor's own address has its offset in it, also where there is no storage
        storage = tensor.untyped_storage()
        address = 0 if storage.device.type == "meta" else storage.data_ptr()  # 0 of fake tensors
    except (RuntimeError, NotImplementedError):
        address = 0
    wraps = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if address == 0 and (wraps or tensor.numel() > 0):
        return f"a {type(tensor).__name__} has no memory of its own"
    return None


def are_in_memory(tensors: Sequence[Tensor], addresses: Callable[[], Iterable[int]]) -> bool:
    """Whether each tensor's values lie at its address; what most tensors are costs little.

    Args:
        tensors: Any.
        addresses: Returns where they are; not called for tensors that may have no address.
    """
    usual = (
        set(map(type, tensors)) <= PLAIN
        and layouts_of(tensors) <= {torch.strided}
        and not any(map(Tensor.is_neg, tensors))
        and 0 not in addresses()
    )
    return usual or all(why_no_memory(tensor) is None for tensor in tensors)


def all_in_memory(tensors: Iterable[Tensor]) -> bool:
    """Whether the values of each lie at its address."""
    tensors = list(tensors)
    return are_in_memory(tensors, lambda: map(Tensor.data_ptr, tensors))


def can_be_stepped(tensor: Tensor) -> bool:
    """Whether the general path can step a parameter, or take a gradient: in memory or a wrapper."""
    wrapper = type(tensor) not in PLAIN and tensor.layout == torch.strided
    return why_no_memory(tensor) is None or (wrapper and not tensor.is_nested)
