"""The device that the kernels run on here, and a watch over what is launched."""

import pytest
import torch
import triton

from mpcore_audit.variants import variants
from mpcore_kernels import _update_plan
from mpcore_kernels._launch import Variant, argument_type
from mpcore_kernels.unscale import _unscale_kernel


@pytest.fixture(scope="session")
def device():
    """A GPU where there is one, else the CPU through Triton's interpreter."""
    if not isinstance(_unscale_kernel, triton.JITFunction):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail("the kernels were imported before TRITON_INTERPRET was set: tests/conftest.py")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The variants that a test launched; fails on one that the audit does not compile."""
    found = []
    launch = Variant.launch

    def watched(variant, programs, arguments):
        assert variant in variants(), f"the audit does not compile {variant}"
        assert tuple(map(argument_type, arguments)) == variant.arguments
        found.append(variant)
        launch(variant, programs, arguments)

    monkeypatch.setattr(Variant, "launch", watched)
    return found


@pytest.fixture
def capturing(monkeypatch):
    """Stands in for a capture of a CUDA graph, while its `now` is True."""

    class Capture:
        now = False

    capture = Capture()
    monkeypatch.setattr("mpcore_kernels._cache.is_capturing", lambda device: capture.now)
    monkeypatch.setattr("mpcore_kernels.update.is_capturing", lambda device: capture.now)
    return capture


@pytest.fixture
def uploads(monkeypatch):
    """The tables that plans upload, by their number of elements."""
    found = []
    upload = _update_plan.upload

    def watched(values, device):
        found.append(values.numel())
        return upload(values, device)

    monkeypatch.setattr(_update_plan, "upload", watched)
    return found
