"""Marks for tests that need what not every machine has."""

from __future__ import annotations

import pytest

from mpcore_testing.gpu import ON_A_GPU

needs_a_gpu = pytest.mark.skipif(not ON_A_GPU, reason="no CUDA or ROCm device")
