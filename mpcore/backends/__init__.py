"""The backends, and the only place that chooses between them.

A backend is a module, or an object, with the functions of `Backend`, same names and signatures.
`resolve` looks at a name and the tensors' devices and dtypes alone: "auto" chooses, any other name
is taken literally and raises if it cannot run.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mpcore.backends import compiled, cpu, reference
from mpcore.backends._blocks import innermost_first
from mpcore.backends._c_compiler import check_can_run, comes_built
from mpcore.backends._c_sample import MasterSample
from mpcore.backends._cast import differing
from mpcore.backends._inspection import Inspection, rounded_max_norm
from mpcore.errors import ArgumentError, BackendError
from mpcore.loss_scale import ScaleMove
from mpcore.updates import Batch, Hyper

__all__ = [
    "Backend",
    "Inspection",
    "MasterSample",
    "ScaleMove",
    "compiled",
    "cpu",
    "differing",
    "innermost_first",
    "reference",
    "resolve",
    "rounded_max_norm",
    "why_not_triton",
]

NAMES = ("auto", "cpu", "compiled", "reference", "triton")


class Backend(Protocol):
    """What a backend computes. Every argument is documented in `mpcore.backends.reference`."""

    @property
    def prepares_on_the_way(self) -> bool:
        """Whether a launch is saved where `inspect` prepares the plan of the update to come."""

    def unscale_(self, grads: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor) -> None:
        """Multiplies in place and flags."""

    def unscale_into(
        self,
        grads: Sequence[Tensor],
        outs: Sequence[Tensor],
        coefficient: Tensor,
        nonfinite: Tensor,
    ) -> None:
        """Multiplies into float32 tensors and flags."""

    def cast_into(
        self,
        masters: Sequence[Tensor],
        weights: Sequence[Tensor],
        found_inf: Tensor,
        saturated: Tensor,
    ) -> None:
        """Rounds masters into 16-bit weights unless `found_inf` is set."""

    def adopt_(self, weights: Sequence[Tensor], masters: Sequence[Tensor], counts: Tensor) -> None:
        """Makes weights that are not their rounded masters the masters, by element."""

    def inspect(
        self,
        grads: Sequence[Tensor],
        coefficient: Tensor,
        max_norm: float | None,
        *,
        inverted: bool = False,
        statistics: bool = False,
        plan: Any = None,
        hyper: Hyper | None = None,
    ) -> Inspection:
        """Finds overflow, norms and the clip; returns these attributes, whatever the class."""

    def plan_update(self, rule: str, batches: Sequence[Batch]) -> Any:
        """Returns what `update_` needs to know about its tensors, as long as none is moved."""

    def prepare_(self, plan: Any, hyper: Hyper) -> None:
        """Computes the scalars of a plan's next update."""

    def update_(
        self,
        plan: Any,
        grads: Sequence[Sequence[Tensor]],
        coefficient: Tensor,
        found_inf: Tensor,
        saturated: Tensor,
        then: ScaleMove | None = None,
        edits: Tensor | None = None,
    ) -> None:
        """Updates masters, moments and weights unless `found_inf` is set; then moves the scale."""

    def update_scale_(self, move: ScaleMove, found_inf: Tensor) -> None:
        """Moves a dynamic loss scale by one step."""


def why_not_triton(
    devices: Iterable[torch.device], dtypes: Iterable[torch.dtype] = ()
) -> str | None:
    """Returns why the Triton kernels cannot run on `devices` with `dtypes`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "mpcore[triton]")'
    if torch.float64 in set(dtypes):
        return "the kernels take 16-bit and float32 tensors, and some parameters are float64"
    kinds = {device.type for device in devices}
    if kinds == {"cuda"}:
        if not torch.cuda.is_available():
            return "no CUDA or ROCm device is usable here"
        release = importlib.import_module("triton").__version__
        return why_not_release(release, on_amd=torch.version.hip is not None)
    # Triton's own interpreter runs kernels on CPU tensors: slow, and exact enough for tests
    triton = importlib.import_module("triton")
    if kinds == {"cpu"} and triton.knobs.runtime.interpret:
        numpy = importlib.import_module("numpy").__version__
        return why_not_release(triton.__version__, beside_numpy=numpy)
    return f"the kernels run on CUDA or ROCm devices, and the parameters are on {sorted(kinds)}"


def why_not_release(
    triton: str, *, on_amd: bool = False, beside_numpy: str | None = None
) -> str | None:
    """Returns what is wrong with a release of Triton, or None if nothing is known to be.

    Args:
        triton: The release.
        on_amd: Whether kernels are compiled for an AMD GPU.
        beside_numpy: The release of NumPy that interprets the kernels; None if they are compiled.

    Example:
        >>> why_not_release("3.6.0", beside_numpy="2.4.0")
        "Triton 3.6.0's interpreter needs a NumPy before 2.4, and 2.4.0 is installed"
        >>> why_not_release("3.6.0", beside_numpy="2.3.5") is None
        True
    """
    if _number(triton) >= (3, 7):
        return None
    if on_amd:
        return f"Triton {triton} gets square roots of small numbers wrong on AMD GPUs"
    if beside_numpy is not None and _number(beside_numpy) >= (2, 4):
        return (
            f"Triton {triton}'s interpreter needs a NumPy before 2.4, and {beside_numpy} is "
            "installed"
        )
    return None


def _number(release: str) -> tuple[int, ...]:
    """Returns major and minor of a release."""
    return tuple(map(int, release.split(".")[:2]))


def resolve(
    name: str, devices: Iterable[torch.device], dtypes: Iterable[torch.dtype] = ()
) -> tuple[str, Backend]:
    """Returns the name of the backend to use, and the backend; reads no tensor.

    Args:
        name: "auto" (Triton on a GPU where it can run; on a CPU the compiled backend if it came
            with the package, else the cpu backend; otherwise plain PyTorch), "cpu", "compiled",
            "reference" or "triton".
        devices: The devices of the tensors it will work on.
        dtypes: The dtypes of those tensors.

    Raises:
        ArgumentError: There is no backend of that name.
        BackendError: The backend that was asked for by name cannot run here.

    Example:
        >>> resolve("auto", [torch.device("cpu")])[0] in ("compiled", "cpu")
        True
    """
    devices, dtypes = list(devices), list(dtypes)
    kinds = {device.type for device in devices}
    if name not in NAMES:
        raise ArgumentError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}.")
    if name == "auto":
        name = _best(kinds, devices, dtypes)
    if name == "reference":
        return name, reference
    if name in ("cpu", "compiled"):
        if not kinds <= {"cpu"}:
            raise BackendError(
                f"backend: expected one that can run here, got {name!r}: the parameters are on "
                f'{sorted(kinds)}. Pass backend="auto".'
            )
        if name == "cpu":
            return name, cpu
        check_can_run()  # raises if it cannot: better now than in the first step
        return name, compiled
    reason = why_not_triton(devices, dtypes)
    if reason is not None:
        raise BackendError(
            f'backend: expected one that can run here, got "triton": {reason}. '
            'Pass backend="auto" or backend="reference".'
        )
    # a launcher of its own: its tables live as long as the optimizer
    return name, cast(Backend, importlib.import_module("mpcore_kernels").Launcher())


def _best(kinds: set[str], devices: Iterable[torch.device], dtypes: Iterable[torch.dtype]) -> str:
    """Returns what "auto" stands for."""
    if kinds <= {"cpu"}:
        return "compiled" if comes_built() else "cpu"
    fits = kinds == {"cuda"} and why_not_triton(devices, dtypes) is None
    return "triton" if fits else "reference"
