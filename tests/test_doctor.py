"""What `mpcore doctor` concludes from what it finds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mpcore import doctor
from mpcore.backends import why_not_triton
from mpcore.base import machine
from mpcore.base.machine import Cpu, Gpu
from mpcore.doctor import choose_backend, choose_format, choose_loss_scale

CPU_DEVICE = torch.device("cpu")


def cpu(float32, float16, bfloat16):
    seconds = {"float32": float32, "float16": float16, "bfloat16": bfloat16}
    return Cpu("a CPU", threads=2, flags=(), product_seconds=seconds)


def gpu(name, major, minor):
    return Gpu(name, "cuda", f"{major}.{minor}", f"sm_{major}{minor}", 16.0, major >= 7, major >= 8)


H100, T4, P100 = gpu("H100", 9, 0), gpu("T4", 7, 5), gpu("P100", 6, 0)


@pytest.mark.parametrize(
    ("gpus", "choice", "named"),
    [
        ([H100], "bfloat16", "float32"),
        ([T4], "float16", "T4"),
        ([H100, T4], "float16", "T4"),
        ([H100, T4, P100], "float32", "P100"),
    ],
)
def test_format_suits_the_weakest_gpu(gpus, choice, named):
    advice = choose_format(gpus, cpu(1.0, 1.0, 1.0))
    assert advice.choice == choice
    assert named in advice.reason


@pytest.mark.parametrize(
    ("measured", "choice"),
    [
        ((1.0, 1.0, 0.25), "bfloat16"),
        ((1.0, 20.0, 20.0), "float32"),
        ((1.0, 1.0, 0.9), "float32"),  # too little gain to pay for the casts
        ((1.0, 0.1, 0.5), "float32"),  # float16 alone: no such advice on a CPU
    ],
)
def test_format_on_a_cpu_follows_the_measured_products(measured, choice):
    assert choose_format([], cpu(*measured)).choice == choice


@pytest.mark.parametrize(
    ("number_format", "choice"),
    [
        ("float16", "DynamicLossScale()"),
        ("bfloat16", "NoLossScale()"),
        ("float32", "NoLossScale()"),
    ],
)
def test_loss_scale_goes_with_the_format(number_format, choice):
    assert choose_loss_scale(number_format).choice == choice


def test_backend_on_the_cpu_is_the_one_that_auto_resolves_to():
    assert choose_backend(CPU_DEVICE, None).choice == doctor.resolve("auto", [CPU_DEVICE])[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_backend_names_why_triton_cannot_run():
    cuda = torch.device("cuda")
    advice = choose_backend(cuda, why_not_triton([cuda]))
    assert advice.choice == "reference"
    assert advice.reason.startswith(why_not_triton([cuda]))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("model name\t: X\nflags\t\t: fpu amx_bf16 avx2 sse\n", ("avx2", "amx_bf16")),
        ("Features\t: fp asimdhp bf16\n", ("asimdhp", "bf16")),
        ("flags : fpu sse\n", ()),
        ("processor : 0\n", None),
        ("", None),
    ],
)
def test_cpu_flags_are_read_from_what_linux_prints(text, flags):
    assert machine.cpu_flags(text) == flags


@pytest.mark.parametrize(
    ("kind", "version", "architecture", "in_hardware"),
    [
        ("cuda", (9, 0), "sm_90", (True, True)),
        ("cuda", (7, 5), "sm_75", (True, False)),
        ("cuda", (6, 1), "sm_61", (False, False)),
        ("rocm", (9, 4), "gfx942", (True, True)),
    ],
)
def test_gpu_is_described_by_its_properties(kind, version, architecture, in_hardware, monkeypatch):
    properties = SimpleNamespace(
        name="a GPU",
        major=version[0],
        minor=version[1],
        total_memory=80 * 2**30,
        gcnArchName="gfx942:sramecc+:xnack-",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4" if kind == "rocm" else None)
    (found,) = machine.find_gpus()
    assert (found.kind, found.architecture, found.memory_gib) == (kind, architecture, 80.0)
    assert found.capability == f"{version[0]}.{version[1]}"
    assert (found.float16_products, found.bfloat16_products) == in_hardware


def test_a_product_is_timed_in_turn_with_the_others_and_its_best_time_counts(monkeypatch):
    asked, times = [], iter([9.0, 1.0, 2.0, 3.0, 8.0, 7.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(machine, "time_product", lambda dtype: asked.append(dtype) or next(times))
    best = machine.time_products({"float32": torch.float32, "float16": torch.float16})
    assert best == {"float32": 2.0, "float16": 1.0}
    assert asked == [torch.float32, torch.float16] * 6


def test_diagnosis_reports_the_versions_that_run():
    diagnosis = doctor.diagnose()
    assert diagnosis.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert diagnosis.cpu.threads == torch.get_num_threads()
    assert all(seconds > 0 for seconds in diagnosis.cpu.product_seconds.values())


def test_versions_of_missing_packages_are_none():
    assert machine.find_versions(["no-such-package"])["no-such-package"] is None
