"""Where readings and reports go."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mpcore.errors import ArgumentError
from mpcore.monitoring.findings import HIGHEST, LOWEST
from mpcore.monitoring.history import Course
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.records import Record
from mpcore.monitoring.report import OverflowReport


class JsonLines:
    """Appends each record to a file as one line of JSON, at once.

    Args:
        path: The file; it is made if it is not there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = JsonLines(os.path.join(folder, "run.jsonl"))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._goes_on = False

    def __call__(self, record: Record) -> None:
        """Writes a record."""
        line = json.dumps(record.to_dict(), allow_nan=False)
        with self._path.open("a+b") as file:
            if not self._goes_on and file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the run before was stopped in the middle of a line
                    file.write(b"\n")
            self._goes_on = True
            file.write(line.encode() + b"\n")


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> Any: ...

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any: ...


class TensorBoard:
    """Writes numbers as scalars, exponents of gradients as histograms, and reports as text.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or what has `add_scalar` and `add_text`;
            histograms need its `add_histogram_raw`, and are left out without.
        prefix: Of all tags.

    Example:
        >>> class Writer:
        ...     add_scalar = add_text = print
        >>> sink = TensorBoard(Writer(), prefix="generator")
    """

    def __init__(self, writer: _Writer, prefix: str = "mpcore") -> None:
        self._writer = writer
        self._prefix = prefix

    def __call__(self, record: Record) -> None:
        """Writes a record; of a course loss, norm, loss scale and skips of each step."""
        if isinstance(record, OverflowReport):
            self._writer.add_text(f"{self._prefix}/overflow", f"```\n{record}\n```", record.step)
            return
        for step, numbers in _by_step(record, self._prefix):
            for tag, value in numbers.items():
                self._writer.add_scalar(tag, value, step)
        add = getattr(self._writer, "add_histogram_raw", None)
        if add is not None and isinstance(record, Reading) and any(record.histogram):
            add(f"{self._prefix}/exponents", **_raw(record.histogram), global_step=record.step)


class _Wandb(Protocol):
    @property
    def Histogram(self) -> Any: ...

    @property
    def Html(self) -> Any: ...

    @property
    def run(self) -> Any: ...


class WeightsAndBiases:
    """Logs numbers, exponents as histograms, and reports to the run of Weights & Biases.

    Records come late, several steps at once, and W&B drops what goes back in its own step. So each
    has its step as `mpcore/step`, which its charts are drawn over; W&B's own step counts on with
    each. Log your own numbers without `step=`.

    Args:
        wandb: The package, after `wandb.init(...)`.
        prefix: Of all names.

    Example:
        >>> import types
        >>> run = types.SimpleNamespace(define_metric=print, log=print)
        >>> sink = WeightsAndBiases(types.SimpleNamespace(run=run, Histogram=None, Html=str))
        mpcore/step
        mpcore/* mpcore/step
    """

    def __init__(self, wandb: _Wandb, prefix: str = "mpcore") -> None:
        if wandb.run is None:
            raise ArgumentError("wandb: expected a run, got none. Call wandb.init(...) first.")
        self._wandb = wandb
        self._run = wandb.run  # that of now: another one may begin later
        self._prefix = prefix
        self._run.define_metric(f"{prefix}/step")
        self._run.define_metric(f"{prefix}/*", f"{prefix}/step")

    def __call__(self, record: Record) -> None:
        """Logs a record; of a course loss, norm, loss scale and skips of each step."""
        if isinstance(record, OverflowReport):
            text = self._wandb.Html(f"<pre>{html.escape(str(record))}</pre>")
            self._log(record.step, {f"{self._prefix}/overflow": text})
            return
        for step, numbers in _by_step(record, self._prefix):
            found: dict[str, Any] = dict(numbers)
            if isinstance(record, Reading) and any(record.histogram):
                edges = list(range(LOWEST, HIGHEST + 2))
                made = self._wandb.Histogram(np_histogram=(list(record.histogram), edges))
                found[f"{self._prefix}/exponents"] = made
            self._log(step, found)

    def _log(self, step: int, found: dict[str, Any]) -> None:
        self._run.log({f"{self._prefix}/step": step, **found})


class _MLflow(Protocol):
    def log_metrics(self, metrics: dict[str, float], step: int, *, run_id: str) -> Any: ...

    def log_text(self, text: str, artifact_file: str, run_id: str) -> Any: ...


class MLflow:
    """Logs numbers as metrics, and histograms and reports as artifacts, to a run of MLflow.

    One request for each step and each artifact: set `mlflow.config.enable_async_logging()` where
    the server is far away.

    Args:
        mlflow: The package.
        run_id: Of the run: `mlflow.start_run().info.run_id`.
        prefix: Of all names.

    Example:
        >>> import types
        >>> sink = MLflow(types.SimpleNamespace(log_metrics=print, log_text=print), "a run")
    """

    def __init__(self, mlflow: _MLflow, run_id: str, prefix: str = "mpcore") -> None:
        self._mlflow = mlflow
        self._run_id = run_id
        self._prefix = prefix

    def __call__(self, record: Record) -> None:
        """Logs a record; of a course loss, norm, loss scale and skips of each step."""
        if isinstance(record, OverflowReport):
            path = f"{self._prefix}/overflow/{record.step:08}.txt"
            self._mlflow.log_text(str(record), path, run_id=self._run_id)
            return
        for step, numbers in _by_step(record, self._prefix):
            self._mlflow.log_metrics(numbers, step, run_id=self._run_id)
        if isinstance(record, Reading) and any(record.histogram):
            lines = [f"{LOWEST + i},{count}" for i, count in enumerate(record.histogram)]
            path = f"{self._prefix}/exponents/{record.step:08}.csv"
            text = "\n".join(["exponent,values", *lines, ""])
            self._mlflow.log_text(text, path, run_id=self._run_id)


def _by_step(record: Reading | Course, prefix: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields the numbers of each step by name; what is not finite no chart can draw."""
    if isinstance(record, Reading):
        rows: list[dict[str, Any]] = [dict(record.numbers())]
    else:
        names = ("loss_scale", "skipped", "grad_norm", "loss", "seconds")
        columns = [getattr(record, name) for name in names]
        rows = [
            {f"course/{name}": value for name, value in zip(names, row, strict=True)}
            for row in zip(*columns, strict=True)
        ]
    for i, row in enumerate(rows):
        known = {name: float(value) for name, value in row.items() if value is not None}
        finite = {f"{prefix}/{name}": v for name, v in known.items() if math.isfinite(v)}
        yield record.step + i, finite


def _raw(histogram: Sequence[int]) -> dict[str, Any]:
    """Returns a histogram of exponents as TensorBoard takes it; each value counts in mid-bin."""
    mids = [LOWEST + i + 0.5 for i in range(len(histogram))]
    return {
        "min": float(LOWEST),
        "max": float(HIGHEST + 1),
        "num": sum(histogram),
        "sum": sum(n * mid for n, mid in zip(histogram, mids, strict=True)),
        "sum_squares": sum(n * mid * mid for n, mid in zip(histogram, mids, strict=True)),
        "bucket_limits": [mid + 0.5 for mid in mids],
        "bucket_counts": list(histogram),
    }
