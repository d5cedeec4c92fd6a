"""Measures what `import mpcore` adds to `import torch`; exits 1 if that is above the budget.

Each of several fresh interpreters times both imports, one after the other, so that a busy machine
slows both alike. Medians of wall-clock time; the CPU time beside it tells a busy machine from slow
code.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

ROUNDS = 15
BUDGET_SECONDS = 0.1
SNIPPET = """
from time import perf_counter, process_time
clocks = [(perf_counter(), process_time())]
import torch
clocks.append((perf_counter(), process_time()))
import mpcore
clocks.append((perf_counter(), process_time()))
for earlier, later in zip(clocks, clocks[1:]):
    print(*(b - a for a, b in zip(earlier, later)))
"""


def measure() -> list[float]:
    """Returns wall and CPU seconds of `import torch`, then what `import mpcore` adds to each."""
    command = [sys.executable, "-c", SNIPPET]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in run.stdout.split()]


def main() -> int:
    """Prints the medians and compares what is added with the budget."""
    measure()  # fills the file cache and writes the bytecode
    columns = zip(*(measure() for _ in range(ROUNDS)), strict=True)
    torch_wall, torch_cpu, added_wall, added_cpu = map(statistics.median, columns)
    print(f"medians of {ROUNDS} fresh interpreters")
    print(f"import torch          {torch_wall:.3f} s  (CPU {torch_cpu:.3f} s)")
    print(f"import mpcore adds    {added_wall:.3f} s  (CPU {added_cpu:.3f} s)")
    print(f"budget for the latter {BUDGET_SECONDS:.3f} s")
    return int(added_wall > BUDGET_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
