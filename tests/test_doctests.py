"""Runs the examples of every docstring of what ships, and of the audit."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import mpcore
import pytest

import mpcore_audit
import mpcore_kernels


def module_names(package):
    prefix = f"{package.__name__}."
    found = [info.name for info in pkgutil.walk_packages(package.__path__, prefix)]
    return [package.__name__, *(name for name in found if not name.endswith("__main__"))]


NAMES = [n for each in (mpcore, mpcore_kernels, mpcore_audit) for n in module_names(each)]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples_print_what_they_show(name, tmp_path, monkeypatch):
    if name.startswith("mpcore.integrations."):  # Keras: with torch, where it has that
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        pytest.importorskip(name.rpartition(".")[2])
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("package", [mpcore, mpcore_kernels], ids=lambda package: package.__name__)
def test_every_public_class_and_function_shows_an_example(package):
    named = {name: getattr(package, name) for name in dir(package) if not name.startswith("_")}
    ours = {
        name: value
        for name, value in named.items()
        if callable(value) and value.__module__.split(".")[0] == package.__name__
    }
    is_error = {n for n, v in ours.items() if isinstance(v, type) and issubclass(v, Exception)}
    without = [n for n, v in ours.items() if n not in is_error and ">>>" not in full_text(v)]
    assert ours
    assert without == []


def full_text(value):
    """The docstring, and for a class those of its methods too."""
    texts = [value.__doc__ or ""]
    if isinstance(value, type):
        texts += [getattr(attribute, "__doc__", None) or "" for attribute in vars(value).values()]
    return "\n".join(texts)
