"""The demo's text: which files, which part of them, which windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpcore.demo import data
from mpcore.errors import ArgumentError


@pytest.fixture(scope="module")
def corpus():
    return data.load_corpus()


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def read(names):
    root = data.standard_library()
    return b"\n".join((root / name).read_bytes() for name in names)


def test_source_files_leave_out_tests_and_installed_packages(tmp_path):
    for name in ("b.py", "a/c.py", "test/t.py", "site-packages/p.py", "a/tests/t.py", "note.txt"):
        write(tmp_path, name, b"pass\n")
    names = [path.relative_to(tmp_path).as_posix() for path in data.source_files(tmp_path)]
    assert names == ["a/c.py", "b.py"]


def test_corpus_shares_no_file_between_training_and_validation(corpus):
    assert set(corpus.train_files).isdisjoint(corpus.validation_files)
    assert len(corpus.validation_files) >= 10
    assert all(map(data.is_held_out, corpus.validation_files))


def test_corpus_text_is_that_of_the_files_it_names(corpus):
    assert corpus.train.numpy().tobytes() == read(corpus.train_files)
    assert corpus.validation.numpy().tobytes() == read(corpus.validation_files)


def test_corpus_leaves_out_files_that_are_not_ascii(tmp_path):
    for index in range(100):
        write(tmp_path, f"m{index}.py", b"x = 1\n" * 300)
    write(tmp_path, "accent.py", "# é\n".encode() * 300)
    corpus = data.load_corpus(tmp_path)
    assert "accent.py" not in corpus.train_files + corpus.validation_files
    assert len(corpus.train_files) + len(corpus.validation_files) == 100
    assert int(corpus.train.max()) < data.VOCABULARY


def test_corpus_of_an_empty_folder_raises(tmp_path):
    with pytest.raises(ArgumentError, match="root: expected a folder"):
        data.load_corpus(tmp_path)


def test_windows_are_slices_of_the_text_with_targets_one_further():
    text = np.random.default_rng(0).integers(0, 128, 500).astype(np.uint8)
    offsets = [0, 7, 435]
    inputs, targets = data.windows_at(torch.from_numpy(text), torch.tensor(offsets), 64)
    assert inputs.tolist() == [text[o : o + 64].tolist() for o in offsets]
    assert targets.tolist() == [text[o + 1 : o + 65].tolist() for o in offsets]


def test_drawn_offsets_depend_on_the_seed_alone_and_stay_inside():
    torch.manual_seed(1)
    first = data.draw_offsets(70, 50, 8, 64, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, data.draw_offsets(70, 50, 8, 64, seed=3))
    assert not torch.equal(first, data.draw_offsets(70, 50, 8, 64, seed=4))
    assert first.min() == 0
    # the last window ends with the last character as its last target
    assert first.max() == 70 - 64 - 1


def test_validation_windows_reach_from_the_first_to_the_last_character():
    offsets = data.spread_offsets(1000, 5, 64)
    assert offsets[0] == 0
    assert offsets[-1] + 64 == 999
    assert torch.all(offsets.diff() > 64)
