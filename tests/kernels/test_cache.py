"""Tables kept from call to call: found again when nothing changed, never stale, never too many."""

import contextlib
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcore_kernels import Launcher, _cache, inspect, unscale_
from mpcore_kernels._cache import TableCache, cached, key_of
from mpcore_kernels._table import CHUNK
from mpcore_testing.kernels import flags

CPU = torch.device("cpu")


class Builder:
    """Stands in for what checks tensors and builds their tables; counts its calls."""

    def __init__(self):
        self.built = 0

    def __call__(self):
        self.built += 1
        return self.built


def look_up(cache, build, tensors, name="unscale_"):
    return cached(cache, name, [tensors], CPU, build)


class Devices:
    """Stands in for `torch.cuda` where there are two GPUs, each with a current stream."""

    def __init__(self, capturing):
        self.current = 0
        self.capturing = capturing

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    def is_current_stream_capturing(self):
        return self.current in self.capturing


@pytest.mark.parametrize("captured", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
def test_a_capture_is_looked_for_on_the_device_of_the_tensors(monkeypatch, captured, current):
    devices = Devices(capturing={captured})
    devices.current = current
    for name in ("device", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, getattr(devices, name))
    found = [_cache.is_capturing(torch.device("cuda", index)) for index in (0, 1)]
    assert found == [captured == 0, captured == 1]
    assert devices.current == current
    assert not _cache.is_capturing(CPU)


@pytest.fixture
def capturing(monkeypatch):
    """Stands in for a capture of a CUDA graph, while its `now` is True."""

    class Capture:
        now = False

    monkeypatch.setattr(_cache, "is_capturing", lambda device: Capture.now)
    return Capture


def test_cache_builds_once_for_the_same_tensors():
    cache, build = TableCache(), Builder()
    tensors = [torch.zeros(3), torch.nn.Parameter(torch.zeros(2, 2).half()), torch.zeros(0)]
    assert [look_up(cache, build, list(tensors)) for _ in range(5)] == [1] * 5


def test_cache_finds_views_that_are_new_objects_at_the_same_place():
    cache, build = TableCache(), Builder()
    buffer = torch.zeros(10)
    assert [look_up(cache, build, [buffer[2:6]]) for _ in range(3)] == [1] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda b: [b[1:5], b[5:9]],  # another address
        lambda b: [b[0:3], b[5:9]],  # another size
        lambda b: [b[0:4].view(2, 2), b[5:9]],  # another shape
        lambda b: [b[0:8:2], b[5:9]],  # other strides
        lambda b: [b[0:2].view(torch.float16), b[5:9]],  # another dtype
        lambda b: [b[5:9], b[0:4]],  # another order
        lambda b: [b[0:4]],  # one less
        lambda b: [b[0:4], b[5:9], b[0:0]],  # one more
        lambda b: [torch._neg_view(b[0:4]), b[5:9]],  # lazily negated
        lambda b: [b[0:4].to("meta"), b[5:9]],  # another device
    ],
)
def test_cache_builds_anew_when_anything_changed(change):
    cache, build = TableCache(), Builder()
    buffer = torch.zeros(10)
    look_up(cache, build, [buffer[0:4], buffer[5:9]])
    assert look_up(cache, build, change(buffer)) == 2
    assert look_up(cache, build, [buffer[0:4], buffer[5:9]]) == 1


def test_cache_keeps_what_launchers_checked_apart():
    cache, build, tensors = TableCache(), Builder(), [torch.zeros(3)]
    assert [look_up(cache, build, tensors, name) for name in ("a", "b", "a", "b")] == [1, 2, 1, 2]


def test_cache_keeps_lists_apart():
    a, b = torch.zeros(3), torch.zeros(3)
    keys = {key_of("x", lists) for lists in ([[a, b], []], [[a], [b]], [[], [a, b]], [[b], [a]])}
    assert len(keys) == 4


def test_cache_keeps_devices_apart_where_addresses_are_equal():
    here, there = torch.zeros(0), torch.zeros(0, device="meta")
    assert here.data_ptr() == there.data_ptr()
    assert key_of("x", [[here]]) != key_of("x", [[there]])


@given(order=st.lists(st.integers(0, 5), max_size=40))
def test_cache_holds_the_most_recently_used_tables_up_to_its_capacity(order):
    tensors = [torch.zeros(3) for _ in range(6)]
    cache, recent = TableCache(capacity=3), []
    for i in order:
        build = Builder()
        look_up(cache, build, [tensors[i]])
        assert build.built == (0 if i in recent[-3:] else 1)
        recent = [j for j in recent if j != i] + [i]
        assert len(cache) == min(len(recent), 3)


def test_cache_forgets_what_failed_to_build():
    cache, build, tensors = TableCache(), Builder(), [torch.zeros(3)]

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        look_up(cache, fail, tensors)
    assert len(cache) == 0
    assert look_up(cache, build, tensors) == 1


class Wrapper(torch.Tensor):
    """A subclass: what its address and strides say need not be what a kernel sees."""


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(3).as_subclass(Wrapper), torch.zeros(3).to_sparse(), 3.0, None],
    ids=["subclass", "sparse", "number", "none"],
)
def test_cache_never_keeps_what_is_no_plain_tensor(odd):
    cache, build = TableCache(), Builder()
    assert [look_up(cache, build, [torch.zeros(3), odd]) for _ in range(2)] == [1, 2]
    assert len(cache) == 0


def test_cache_builds_anew_on_another_stream(monkeypatch):
    cache, build, tensors = TableCache(), Builder(), [torch.zeros(3)]
    stream = 7
    monkeypatch.setattr(_cache, "current_stream", lambda device: stream)
    look_up(cache, build, tensors)
    assert look_up(cache, build, tensors) == 1
    stream = 8
    assert look_up(cache, build, tensors) == 2
    assert len(cache) == 1


def test_capture_of_a_graph_reads_the_table_that_was_there_before(capturing):
    cache, build, tensors = TableCache(capacity=1), Builder(), [torch.zeros(3)]
    look_up(cache, build, tensors)
    capturing.now = True
    assert look_up(cache, build, tensors) == 1


@pytest.mark.parametrize("cache", [None, TableCache()])
def test_capture_of_a_graph_never_builds_a_table(cache, capturing):
    build = Builder()
    capturing.now = True
    with pytest.raises(RuntimeError, match="expected a table built before the capture"):
        look_up(cache, build, [torch.zeros(3)])
    assert build.built == 0


def test_a_table_that_a_graph_reads_outlives_the_capacity(capturing):
    class Table:
        living = 0

        def __init__(self):
            Table.living += 1

        def __del__(self):
            Table.living -= 1

    cache, others = TableCache(capacity=2), [torch.zeros(3) for _ in range(8)]
    tensors = [torch.zeros(3)]
    look_up(cache, Table, tensors)
    capturing.now = True
    held = id(look_up(cache, Table, tensors))
    assert id(look_up(cache, Table, tensors)) == held
    capturing.now = False
    for other in others:
        look_up(cache, Table, [other])
    gc.collect()
    assert Table.living == 2 + 1
    del cache
    gc.collect()
    assert Table.living == 0


def test_launchers_raise_in_a_capture_without_a_cache(capturing, device):
    capturing.now = True
    grads, one = [torch.ones(3, device=device)], torch.tensor(1.0, device=device)
    with pytest.raises(RuntimeError, match="unscale_: expected a table built before"):
        unscale_(grads, one, flags(1, device))
    with pytest.raises(RuntimeError, match="inspect: expected a table built before"):
        inspect(grads, one, None)
    assert grads[0].tolist() == [1.0] * 3


def test_launcher_writes_what_the_functions_write_call_after_call(device):
    launcher, coefficient = Launcher(), torch.tensor(0.5, device=device)
    half = torch.full((CHUNK + 3,), 8.0, dtype=torch.float16, device=device)
    master, found_inf = torch.empty_like(half, dtype=torch.float32), flags(1, device)[0]
    saturated = torch.zeros((), dtype=torch.int64, device=device)
    for i in range(3):
        nonfinite = flags(1, device)
        launcher.unscale_([half], coefficient, nonfinite)
        assert half.eq(8.0 / 2 ** (i + 1)).all()
        launcher.unscale_into([half], [master], coefficient, nonfinite)
        assert master.eq(half.float() / 2).all()
        launcher.cast_into([half.float() * 2], [half.clone()], found_inf, saturated)
        found = launcher.inspect([half], coefficient, None, statistics=True)
        assert found.largest.item() == half[0].item() / 2
        half[-1] = torch.inf if i == 1 else half[0]
        found = launcher.inspect([half], coefficient, None)
        assert found.first_bad.item() == (CHUNK + 2 if i == 1 else -1)
        half[-1] = half[0]


def test_launcher_reads_tensors_that_took_the_place_of_others(device):
    launcher, one = Launcher(), torch.tensor(1.0, device=device)
    buffer = torch.ones(2 * CHUNK, device=device)
    for value in (1.0, 2.0, 3.0):
        buffer.fill_(value)
        assert launcher.inspect([buffer[:CHUNK]], one, None).largest.item() == value
        first, second = buffer[:CHUNK], buffer[CHUNK:]
        second[0] = value * 10
        assert launcher.inspect([first, second], one, None).largest.tolist() == [value, value * 10]
        assert launcher.inspect([second, first], one, None).largest.tolist() == [value * 10, value]


def test_launcher_checks_tensors_that_differ_from_those_before(device):
    launcher, one, nonfinite = Launcher(), torch.tensor(1.0, device=device), flags(1, device)
    buffer = torch.ones(8, device=device)
    launcher.unscale_([buffer[:4]], one, nonfinite)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected a dense tensor"):
        launcher.unscale_([buffer[::2]], one, nonfinite)
    with pytest.raises(ValueError, match="nonfinite: expected"):
        launcher.unscale_([buffer[:4]], one, flags(2, device))
    with pytest.raises(ValueError, match=r"outs\[0\]: expected the layout of grads\[0\]"):
        launcher.unscale_into([buffer[:4]], [buffer[4:].view(2, 2)], one, nonfinite)
    with pytest.raises(TypeError, match=r"grads\[0\]: expected a torch.Tensor"):
        launcher.unscale_([3.0], one, nonfinite)
