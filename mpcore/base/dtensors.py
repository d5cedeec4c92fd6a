"""DTensors: what this rank holds of them, and how a value becomes one like a parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mpcore.errors import ArgumentError

#: types whose tensors are what they seem to be
PLAIN = {Tensor, nn.Parameter}


def held_here(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a DTensor, whatever its placement; others as they are."""
    if type(tensor) in PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    # `to_local` goes through autograd, which takes as long as all else that a step asks
    local: Any = getattr(tensor, "_local_tensor", None)
    local = tensor.to_local() if local is None else local
    here: Tensor = local.wait() if hasattr(local, "wait") else local  # still on its way
    return here


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a DTensor."""
    kinds = set(map(type, tensors))
    return not kinds <= PLAIN and any(hasattr(kind, "to_local") for kind in kinds)


def addresses_of(tensors: Iterable[Tensor], *, sharded: bool) -> list[int]:
    """Returns where tensors lie in memory; fails for sparse ones.

    Args:
        tensors: Any.
        sharded: Whether some may be DTensors, of which it is asked where what this rank holds is.
    """
    return list(map(Tensor.data_ptr, map(held_here, tensors) if sharded else tensors))


def is_placed_otherwise(param: Any, value: Any, what: str = "a DTensor") -> bool:
    """Whether a value is a DTensor like the parameter, of other placements; not collective.

    Args:
        param: Any.
        value: Any.
        what: What it is, for the message of an error.

    Raises:
        ArgumentError: It is over another mesh.
    """
    asked = getattr(param, "placements", None)
    given = getattr(value, "placements", None)
    if asked is None or given is None:
        return False
    if value.device_mesh != param.device_mesh:
        raise ArgumentError(
            f"{what}: expected one over the mesh of its parameter, {param.device_mesh}, got one "
            f"over {value.device_mesh}. Make it whole (full_tensor), or load it through "
            "torch.distributed.checkpoint, which knows every layout."
        )
    return bool(given != asked)


def placed_like(param: Any, value: Any) -> Tensor:
    """Returns a DTensor with the placements of a parameter: a sum of ranks is added up; collective.

    Layers of tensor parallel models leave such sums. Others are returned as they are, without one.

    Raises:
        ArgumentError: It is over another mesh.
    """
    here: Tensor = value
    if is_placed_otherwise(param, value):
        here = value.redistribute(placements=param.placements)
    return here


def sharded_like(param: Any, value: Any) -> Tensor:
    """Returns a value for a parameter as the parameter is placed.

    Of a whole one each rank takes its own piece; a DTensor that is placed otherwise is
    redistributed, which is collective.

    Args:
        param: Any.
        value: Of its shape.

    Raises:
        ArgumentError: It is over another mesh.
    """
    if hasattr(param, "placements") and not hasattr(value, "placements"):
        # here, since not every build of torch has them
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = [Replicate()] * param.device_mesh.ndim
        value = DTensor.from_local(value, param.device_mesh, everywhere, run_check=False)
    return placed_like(param, value)
