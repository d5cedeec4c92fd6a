"""Tries an installed mpcore, away from its repository: what it ships, imports and computes.

Run by check_dist.py in an environment that holds mpcore's declared dependencies only. Its argument
is the backend that has to be taken: "compiled" where the wheel has the library in C, else "cpu".
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

SHIPPED = {"mpcore", "mpcore_kernels"}


def expect(claim: str, holds: bool) -> None:
    """Ends the program with `claim` unless it holds."""
    if not holds:
        sys.exit(f"smoke test: expected {claim}")


def check_files() -> None:
    """Exactly the two packages, both typed, and nothing else at the top level."""
    files = metadata.files("mpcore") or []
    tops = {file.parts[0] for file in files} - {".."}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    expect(f"the packages {SHIPPED} and no other, got {packages}", packages == SHIPPED)
    for package in SHIPPED:
        shipped = {str(file) for file in files}
        expect(f"{package}/py.typed among the files", f"{package}/py.typed" in shipped)
    for name in ("kernels", "tests"):
        expect(f"no top-level package `{name}`", not _importable(name))


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def check_imports() -> None:
    """Importing mpcore needs neither Triton nor NumPy, and takes the installed files."""
    import mpcore

    expect("mpcore from this environment", str(mpcore.__file__).startswith(sys.prefix))
    for name in ("triton", "numpy", "typer", "rich"):
        expect(f"no {name} here, so that a hidden need would show", not _importable(name))
    expect("mpcore_kernels not imported", "mpcore_kernels" not in sys.modules)
    expect("py.typed readable", resources.files("mpcore").joinpath("py.typed").is_file())


def check_program() -> None:
    """The program is there twice, and says what it lacks without a traceback."""
    program = str(Path(sys.executable).parent / "mpcore")
    for command in ([program], [sys.executable, "-I", "-m", "mpcore"]):
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        advice = 'mpcore: the command line needs typer. Run: pip install "mpcore[demo]"'
        # before it torch warns of NumPy, which is not here
        expect(f"{advice!r}, got {said.stderr!r}", said.stderr.splitlines()[-1:] == [advice])


def check_training() -> None:
    """Ten steps of a float16 model with float32 masters lower the loss."""
    import mpcore
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05))
    model = mpcore.cast_model(model, torch.float16, optimizer)
    inputs = torch.randn(64, 8)
    targets = inputs.sum(dim=1, keepdim=True)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.mse_loss(model(inputs.half()).float(), targets)
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weight = model.weight
    backend = sys.argv[1]
    expect(f"backend {backend}, got {optimizer.backend}", optimizer.backend == backend)
    expect("float16 weights", weight.dtype is torch.float16)
    expect("a falling loss", losses[-1] < losses[0])
    master = optimizer.state[weight]["master"]
    expect("weights equal to the rounded masters", torch.equal(weight, master.half()))


if __name__ == "__main__":
    check_files()
    check_imports()
    check_program()
    check_training()
