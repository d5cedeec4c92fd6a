"""Real text to train on: the source of the running Python's standard library.

Whole files are held out for validation, so no line of a validation file is ever trained on.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpcore.errors import ArgumentError

VOCABULARY = 128  # ASCII: files that hold any other byte are left out
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
)
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as bytes below 128, and the files that each came from."""

    train: Tensor  # [characters] uint8
    validation: Tensor  # [characters] uint8
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def standard_library() -> Path:
    """Returns the folder of the running Python's standard library, without a host sync.

    Example:
        >>> (standard_library() / "json" / "decoder.py").is_file()
        True
    """
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(root: Path) -> list[Path]:
    """Lists the Python files below `root` in a fixed order, without a host sync.

    Args:
        root: Folder to walk. Tests, installed packages and the two bundled applications are left
            out: they differ between installations of the same Python.

    Example:
        >>> any(path.name == "decoder.py" for path in source_files(standard_library() / "json"))
        True
    """
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found.extend(Path(folder) / name for name in names if name.endswith(".py"))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def is_held_out(name: str) -> bool:
    """Says whether a file belongs to validation; the answer depends on its name alone.

    Args:
        name: Path relative to the library's folder, with forward slashes.

    Example:
        >>> is_held_out("json/decoder.py") == is_held_out("json/decoder.py")
        True
    """
    return zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads the corpus into memory on the CPU, about ten million characters in under a second.

    Args:
        root: Folder of Python files; the running Python's standard library if None.

    Raises:
        ArgumentError: If the folder does not hold enough source text for both parts.

    Example:
        >>> corpus = load_corpus()
        >>> set(corpus.train_files) & set(corpus.validation_files)
        set()
    """
    root = standard_library() if root is None else root
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    names: dict[bool, list[str]] = {True: [], False: []}
    for path in source_files(root):
        text = path.read_bytes()
        if not text.isascii():
            continue
        name = path.relative_to(root).as_posix()
        parts[is_held_out(name)].append(text)
        names[is_held_out(name)].append(name)
    for held_out, part in (("training", parts[False]), ("validation", parts[True])):
        if sum(map(len, part)) < 10_000:
            raise ArgumentError(
                f"root: expected a folder with at least 10,000 characters of Python source for "
                f"{held_out}, got {root}. Use a Python whose standard library is a folder of "
                f".py files."
            )
    return Corpus(
        train=_as_tensor(parts[False]),
        validation=_as_tensor(parts[True]),
        train_files=tuple(names[False]),
        validation_files=tuple(names[True]),
    )


def draw_offsets(length: int, steps: int, batch: int, context: int, seed: int) -> Tensor:
    """Draws where each window of each training batch starts, once, for every regime to share.

    Args:
        length: Characters in the text.
        steps: Number of batches.
        batch: Windows in a batch.
        context: Characters in a window, not counting the one predicted last.
        seed: Seed of the draw.

    Returns:
        Int64 `[steps, batch]` on the CPU.

    Example:
        >>> first, again = (draw_offsets(1000, 3, 2, 16, seed=0) for _ in range(2))
        >>> torch.equal(first, again)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(length - context, (steps, batch), generator=generator)


def spread_offsets(length: int, windows: int, context: int) -> Tensor:
    """Spreads validation windows evenly over a text; the same ones every time.

    Returns:
        Int64 `[windows]` on the CPU.

    Example:
        >>> spread_offsets(length=101, windows=3, context=20).tolist()
        [0, 40, 80]
    """
    return torch.linspace(0, length - context - 1, windows, dtype=torch.float64).long()


def windows_at(text: Tensor, offsets: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Cuts inputs and next-character targets out of a text, without a host sync.

    Args:
        text: `[characters]` uint8.
        offsets: Int64 `[batch]`, each below `characters - context`.
        context: Characters in a window.

    Returns:
        Two int64 tensors `[batch, context]`; the second is the first moved on by one character.

    Example:
        >>> inputs, targets = windows_at(torch.arange(9, dtype=torch.uint8), torch.tensor([2]), 3)
        >>> inputs.tolist(), targets.tolist()
        ([[2, 3, 4]], [[3, 4, 5]])
    """
    window = text[offsets[:, None] + torch.arange(context + 1)].long()
    return window[:, :-1], window[:, 1:]


def _as_tensor(parts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)
