"""Checkpoint files that are whole or not there, and noticed if they are damaged.

`torch.save` writes a zip archive with a checksum for each tensor, and `torch.load` does not look at
it; a process that dies while it writes leaves half a file under the name of the last good one.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from mpcore.errors import ArgumentError

_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)


def save(state: Any, path: str | os.PathLike[str]) -> None:
    """Writes `torch.save(state)` to a file under another name, then renames it; syncs.

    Whoever reads `path` finds the old file or the new one, whole, whenever the writer dies.

    Args:
        state: Dictionaries of tensors and numbers, such as a model's and an optimizer's.
        path: Where to; its folder must exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"a": torch.ones(2)}, f"{folder}/last.pt")
        ...     load(f"{folder}/last.pt")
        {'a': tensor([1., 1.])}
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], map_location: Any = None) -> Any:
    """Reads what `save` wrote, with `weights_only=True`, after comparing all checksums.

    Args:
        path: The file.
        map_location: As for `torch.load`.

    Raises:
        ArgumentError: The file is cut off or damaged.
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ArgumentError(
                f"{path}: expected a whole checkpoint, got one that is damaged in {damaged}. Take "
                "an older one."
            )
        return torch.load(path, map_location=map_location, weights_only=True)
    except (
        *(zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError),
        *(NotImplementedError, ValueError, KeyError, OSError),
    ) as error:
        if isinstance(error, (ArgumentError, *_UNREADABLE)):
            raise
        raise ArgumentError(
            f"{path}: expected a whole checkpoint, got {type(error).__name__}: {error}. It is cut "
            "off or damaged; take an older one."
        ) from error
