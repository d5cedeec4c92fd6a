"""TensorBoard, Weights & Biases, MLflow, the real packages: they keep what was measured."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.findings import LOWEST
from mpcore.monitoring.history import Course
from mpcore.monitoring.reading import Reading
from torch import nn

PREFIXES = ["mpcore", "run/generator"]
pytestmark = [
    pytest.mark.trainers,  # run where these packages are installed
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of theirs
]


def trained(sink: Any) -> list[Any]:
    """Records of six steps of which the third overflows, told to a sink as well."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4).half()
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-2), mpcore.DynamicLossScale(2.0**8)
    )
    records: list[Any] = []
    with mpcore.Monitor(optimizer, model, every=4, sinks=[records.append, sink]):
        for step in range(6):
            loss = model(torch.randn(8, 4).half()).float().square().mean()
            optimizer.backward(loss * (1e6 if step == 2 else 1.0))
            optimizer.step()
            optimizer.zero_grad()
    assert sorted({type(record).__name__ for record in records}) == [
        *("Course", "OverflowReport", "Reading")
    ]
    return records


def expected(records: list[Any], prefix: str) -> dict[tuple[str, int], float]:
    """Every finite number, written down record by record."""
    found: dict[tuple[str, int], float] = {}
    for record in records:
        if isinstance(record, Reading):
            for name, value in record.numbers().items():
                found[f"{prefix}/{name}", record.step] = value
        if isinstance(record, Course):
            for i in range(len(record.skipped)):
                for name in ("loss_scale", "skipped", "grad_norm", "loss", "seconds"):
                    value = getattr(record, name)[i]
                    if value is not None and abs(value) < float("inf"):  # nor NaN
                        found[f"{prefix}/course/{name}", record.step + i] = float(value)
    norms = [step for name, step in found if name == f"{prefix}/course/grad_norm"]
    assert norms == [0, 1, 3, 4, 5]  # that of the skipped step is not finite
    assert len([name for name, _ in found if name == f"{prefix}/course/loss"]) == 6
    return found


@pytest.mark.parametrize("prefix", PREFIXES)
def test_tensorboard_keeps_every_number_histogram_and_report(tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    records = trained(mpcore.TensorBoard(writer, prefix))
    writer.close()
    kept = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    tags = kept.Tags()
    numbers = {(tag, e.step): e.value for tag in tags["scalars"] for e in kept.Scalars(tag)}
    assert numbers == pytest.approx(expected(records, prefix), rel=1e-6)  # kept as float32
    (reading,) = [record for record in records if isinstance(record, Reading)]
    (event,) = kept.Histograms(f"{prefix}/exponents")
    held = event.histogram_value
    counts = dict(zip(held.bucket_limit, held.bucket, strict=True))
    assert event.step == reading.step == 3
    # TensorBoard puts empty bins together; a bin is named by its upper end
    there = {limit: count for limit, count in counts.items() if count}
    assert there == {LOWEST + i + 1: n for i, n in enumerate(reading.histogram) if n}
    assert held.num == sum(reading.histogram) == 20
    (text,) = kept.Tensors(f"{prefix}/overflow/text_summary")
    assert text.step == 2
    assert b"Step 2 was skipped" in text.tensor_proto.string_val[0]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the history of a run from the log that W&B keeps offline, as LevelDB writes logs."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""  # behind a head of 7 bytes
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part = (part if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(part)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items
            }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_and_biases_keeps_every_number_histogram_and_report(
    tmp_path: Path, prefix: str
) -> None:
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="watched", settings=settings)
    records = trained(mpcore.WeightsAndBiases(wandb, prefix))
    run.finish()
    wandb.teardown()  # which waits until all is written
    (log,) = tmp_path.rglob("*.wandb")
    rows = list(rows_of(log))
    step = f"{prefix}/step"
    numbers = {
        (name, row[step]): value
        for row in rows
        for name, value in row.items()
        if name.startswith(prefix)
        and name != step
        and isinstance(value, (int, float))
        and name.partition(".")[0] == name
    }
    assert numbers == pytest.approx(expected(records, prefix), rel=1e-12)
    (reading,) = [record for record in records if isinstance(record, Reading)]
    (with_counts,) = [row for row in rows if f"{prefix}/exponents.values" in row]
    assert with_counts[f"{prefix}/exponents.values"] == list(reading.histogram)
    assert with_counts[f"{prefix}/exponents.bins"][0] == LOWEST
    assert with_counts[step] == 3
    (told,) = [row for row in rows if f"{prefix}/overflow.path" in row]
    assert told[step] == 2
    (page,) = tmp_path.rglob("*.html")
    assert "Step 2 was skipped" in page.read_text()


def test_weights_and_biases_without_a_run_is_an_error() -> None:
    wandb = pytest.importorskip("wandb")
    with pytest.raises(mpcore.ArgumentError, match=r"Call wandb\.init"):
        mpcore.WeightsAndBiases(wandb)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_mlflow_keeps_every_number_histogram_and_report(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("watched")
    with mlflow.start_run() as run:
        records = trained(mpcore.MLflow(mlflow, run.info.run_id, prefix))
    client = mlflow.MlflowClient()
    names = client.get_run(run.info.run_id).data.metrics
    kept = {
        (name, one.step): one.value
        for name in names
        for one in client.get_metric_history(run.info.run_id, name)
    }
    assert kept == expected(records, prefix)
    (reading,) = [record for record in records if isinstance(record, Reading)]
    (counts,) = tmp_path.rglob(os.path.join("exponents", "*.csv"))
    lines = counts.read_text().split()[1:]
    assert counts.name == "00000003.csv"
    assert [int(line.split(",")[1]) for line in lines] == list(reading.histogram)
    assert lines[0].split(",")[0] == str(LOWEST)
    (report,) = tmp_path.rglob(os.path.join("overflow", "*.txt"))
    assert report.name == "00000002.txt"
    assert "Step 2 was skipped" in report.read_text()
