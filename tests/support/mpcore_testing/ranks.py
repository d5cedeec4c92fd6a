"""Ranks of a process group: forks of one interpreter, which imports torch once for all."""

from __future__ import annotations

import os
import subprocess
import sys

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
