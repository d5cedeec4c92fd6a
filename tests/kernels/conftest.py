"""The device that the kernels run on here."""

import pytest
import torch
import triton

from mpcore_kernels.unscale import _unscale_kernel


@pytest.fixture(scope="session")
def device():
    """A GPU where there is one, else the CPU through Triton's interpreter."""
    if not isinstance(_unscale_kernel, triton.JITFunction):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail("the kernels were imported before TRITON_INTERPRET was set: tests/conftest.py")
    return torch.device("cuda")
