"""Every golden run: a case on each of its backends, and once saved and loaded on the way."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from mpcore_testing.golden.cases import CASES, Case
from mpcore_testing.golden.recording import Recording, record


class Run(NamedTuple):
    """A case on a backend.

    Attributes:
        case: Its name.
        backend: Where its steps are computed.
        resumed: Whether it is saved and loaded into new objects after every step, and in between.
    """

    case: str
    backend: str
    resumed: bool

    @property
    def how(self) -> str:
        """The backend, and that it was resumed."""
        return f"{self.backend}, resumed" if self.resumed else self.backend

    def __str__(self) -> str:
        return f"{self.case}: {self.how}"

    def record(self, steps: int | None = None) -> Recording:
        """Runs it, or its first steps only."""
        return record(self.case, self.backend, resumed=self.resumed, steps=steps)


def _runs(name: str, case: Case) -> list[Run]:
    # what is saved does not depend on who computes: one backend is enough, and not the slow one
    saving = "compiled" if "compiled" in case.backends else case.backends[0]
    resumed = [Run(name, saving, True)] if case.resumes else []
    return [*(Run(name, backend, False) for backend in case.backends), *resumed]


RUNS = [run for name, case in CASES.items() for run in _runs(name, case)]


def in_processes(runs: Sequence[Run]) -> Iterator[Recording]:
    """Yields what each run gives, computed in as many processes as there are processors, or 4."""
    workers = min(os.cpu_count() or 1, 4)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_prepare) as pool:
        yield from pool.map(Run.record, runs)


def _prepare() -> None:
    """Makes this process one that can run kernels without a GPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of the interpreter's infinities
