"""Puts the audit's table into docs/kernel-audit.md.

python tests/kernels/write_audit_page.py
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernel-audit.md"
MARKS = ("<!-- the audit's table -->\n\n", "\n\n<!-- end of the audit's table -->")

if __name__ == "__main__":
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "mpcore_audit"],
        env=environment | {"PYTHONPATH": str(ROOT / "kernels")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    head, rest = PAGE.read_text().split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    PAGE.write_text(head + MARKS[0] + run.stdout.strip() + MARKS[1] + tail)
    sys.exit(run.returncode)
