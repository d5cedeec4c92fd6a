"""What must be settled before any test module is imported."""

import gc
import importlib
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from mpcore_testing.comparisons import PROPERTY, TALLY, summary
from mpcore_testing.engines import ENGINES

# read when a kernel is decorated, so it must be set before anything imports the kernels
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from mpcore_testing.interpreter import patch_language_once  # reads the variable, too

    patch_language_once()

# Collecting makes some 100,000 objects that stay: nothing is to go through them again and again.
gc.disable()

# The same examples in every run, so that a change is judged by what it changed; `make test-random`
# looks for new ones. An example it finds is kept as an @example of its test.
# Nothing depends on how busy the machine is.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", patient, max_examples=40, derandomize=True)
settings.register_profile("random", patient, max_examples=1000, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(params=ENGINES, ids=str)
def engine(request):
    """Each way in which a step can be computed on a CPU."""
    return request.param


def pytest_collection_finish(session):
    """Spares the garbage collector what lives as long as the run: libraries, and all tests."""
    importlib.import_module("torch._dynamo")  # the largest one; any optimizer of torch imports it
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Notes how many values a test compared, in its report: workers and their host share those."""
    before = TALLY.values
    try:
        return (yield)
    finally:
        if TALLY.values > before:
            item.user_properties.append((PROPERTY, TALLY.values - before))


def pytest_terminal_summary(terminalreporter):
    """Prints how many values all tests compared, and how long those tests took."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    line = summary(report for report in reports if hasattr(report, "user_properties"))
    if line:
        terminalreporter.section("bitwise comparisons")
        terminalreporter.line(line)
