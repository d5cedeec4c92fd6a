"""Ranks of a process group: forks of one interpreter, which imports torch once for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

#: What marks a module of tests that start ranks.
OF_RANKS = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo"
    ),
]
#: a fresh interpreter has no threads yet, so that a fork of it is whole
PROGRAM = """
import runpy, sys
import torch._dynamo  # which an optimizer of torch imports
from torch import multiprocessing

work = runpy.run_path(sys.argv[1])["work"]
count = int(sys.argv[2])
multiprocessing.start_processes(work, tuple(sys.argv[3:]), nprocs=count, start_method="fork")
"""


def run_ranks(file: str, *arguments: object, count: int = 2) -> None:
    """Runs `work(rank, *arguments)` of a test file on `count` ranks; arguments become strings."""
    # the process must find the packages that this process tests
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROGRAM, file, str(count), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def found_on(file: str, folder: Path, count: int) -> list[Any]:
    """What each case of a file of runs found: (name, options, [of rank 0, of rank 1, ...])."""
    run_ranks(file, folder, count, count=count)
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]
    return [(*each[0][:2], [found for *_, found in each]) for each in zip(*ranks, strict=True)]


def of(world: list[Any], case: Callable[..., Any]) -> list[Any]:
    """What one case found: (options, ranks)."""
    found = [(options, ranks) for name, options, ranks in world if name == case.__name__]
    if not found:
        pytest.skip("on another number of ranks")
    return found
