"""What is kept of a golden run: a hash of each kind of value after each step, and small values.

A hash is the start of the SHA-256 of dtypes, shapes and bits, little-endian. All NaNs count as one:
their payloads are not specified. Loss scales and counters are kept as they are.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcore_testing.bits import bits
from mpcore_testing.golden.cases import CASES
from mpcore_testing.golden.training import Snapshot, Training

#: In the order in which a step makes them: what moves first is nearest to the cause.
KINDS = ("norm", "moments", "masters", "weights", "scale", "counters")
HASHED = ("norm", "moments", "masters", "weights")
#: Kinds whose values are kept, float32 all of them. Weights follow from masters.
VALUED = ("norm", "moments", "masters")
FOLDER = Path(__file__).resolve().parents[3] / "golden"
_HASHES, _VALUES = "hashes.jsonl", "values.jsonl"
_SAME = "="  # values are those of the step before


@dataclass(frozen=True)
class Recording:
    """A golden run.

    Attributes:
        case: Its name.
        after: By kind, for each step a hash, or the numbers themselves.
        values: By kind, for each step the bytes of all its float32 values; None: not kept.
    """

    case: str
    after: dict[str, list[Any]]
    values: dict[str, list[bytes]] | None

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.after["counters"])


def record(
    case: str, backend: str, *, resumed: bool = False, steps: int | None = None
) -> Recording:
    """Runs a case on a backend, or its first steps only."""
    chosen = CASES[case]
    return recording_of(case, islice(Training(chosen, backend, resumed=resumed).run(), steps))


def recording_of(case: str, snapshots: Iterable[Snapshot]) -> Recording:
    """Returns what is kept of a run of a case."""
    after: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    values: dict[str, list[bytes]] = {kind: [] for kind in VALUED}
    for snapshot in snapshots:
        for kind in KINDS:
            held = getattr(snapshot, kind)
            after[kind].append(hash_of(held) if kind in HASHED else list(held))
            if kind in VALUED:
                values[kind].append(b"".join(map(_content, held)))
    return Recording(case, after, values if CASES[case].keeps_values else None)


def hash_of(tensors: Sequence[Tensor]) -> str:
    """Returns 12 hexadecimal digits, or "-" for no tensors.

    Example:
        >>> hash_of([torch.zeros(2)]) == hash_of([torch.tensor([0.0, -0.0])])
        False
        >>> hash_of([torch.tensor(-torch.nan)]) == hash_of([torch.tensor(torch.nan)])
        True
    """
    if not tensors:
        return "-"
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()[:12]


def _content(tensor: Tensor) -> bytes:
    plain = tensor.masked_fill(tensor.isnan(), torch.nan).contiguous()
    array = bits(plain).numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def load(folder: Path = FOLDER) -> dict[str, Recording]:
    """Returns the recordings of a folder by case; none if there are no files."""
    if not (folder / _HASHES).exists():
        return {}
    values = {row.pop("case"): _decoded(row) for row in _rows(folder / _VALUES)}
    return {
        row["case"]: Recording(
            row["case"], {kind: row[kind] for kind in KINDS}, values.get(row["case"])
        )
        for row in _rows(folder / _HASHES)
    }


def save(recordings: Iterable[Recording], folder: Path = FOLDER) -> None:
    """Writes both files, a line for each case."""
    kept = list(recordings)
    _write(
        folder / _HASHES,
        [{"case": r.case, "backends": CASES[r.case].backends, **r.after} for r in kept],
    )
    _write(
        folder / _VALUES,
        [{"case": r.case, **_encoded(r.values)} for r in kept if r.values is not None],
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _encoded(values: dict[str, list[bytes]]) -> dict[str, str]:
    encoded = {}
    for kind, each in values.items():
        words = [base64.b64encode(content).decode() for content in each]
        before = [None, *words]
        same = [_SAME if word == last else word for word, last in zip(words, before, strict=False)]
        encoded[kind] = " ".join(same)
    return encoded


def _decoded(row: dict[str, str]) -> dict[str, list[bytes]]:
    decoded = {}
    for kind, text in row.items():
        each: list[bytes] = []
        for word in text.split(" "):
            each.append(each[-1] if word == _SAME else base64.b64decode(word))
        decoded[kind] = each
    return decoded
