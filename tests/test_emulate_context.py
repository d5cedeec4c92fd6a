"""What `emulate_tensor_cores` covers, leaves alone, and works together with."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpcore.emulate import emulate_tensor_cores
from mpcore.errors import StageError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mpcore_testing.models import Block
from mpcore_testing.products import HALF, PROBES, Recorder, integers, round16, same_bits, wide


class Bfloat16Products(TorchDispatchMode):
    """Stands in for a CPU whose FP32 products round their operands to BF16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            args = tuple(x.bfloat16().float() for x in args)
        return func(*args, **(kwargs or {}))


def block_and_input(dtype: torch.dtype) -> tuple[Block, torch.Tensor]:
    torch.manual_seed(0)
    return Block(16).to(dtype), torch.randn(2, 8, 16).to(dtype).requires_grad_()


def train_once(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x.grad = None
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", HALF)
def test_no_16_bit_product_of_a_training_step_reaches_a_cpu_kernel(dtype: torch.dtype) -> None:
    model, x = block_and_input(dtype)
    with Recorder() as native:
        train_once(model, x)
    with Recorder() as emulated, emulate_tensor_cores():
        train_once(model, x)
    # 4 linear layers and attention, each once forward and 2 (attention: 1) products backward
    assert native.count(dtype) == 4 * 3 + 2
    assert emulated.count(*HALF) == 0
    assert emulated.count(torch.float32) == native.count(dtype) + PROBES


def test_backward_outside_the_context_is_left_to_pytorch() -> None:
    model, x = block_and_input(torch.float16)
    with emulate_tensor_cores():
        y = model(x)
    with Recorder() as recorder:
        y.sum().backward()
    assert recorder.count(torch.float16) == 4 * 2 + 1


def test_fp32_and_other_devices_pass_through() -> None:
    a, d = torch.randn(8, 8), torch.randn(8, 8, dtype=torch.float64)
    # the meta device stands for every device that is not the CPU
    m = torch.empty(8, 8, dtype=torch.float16, device="meta")
    expected = a @ a, d @ d
    with Recorder() as recorder, emulate_tensor_cores():
        assert torch.equal(a @ a, expected[0])
        assert torch.equal(d @ d, expected[1])
        assert (m @ m).dtype == torch.float16
    assert [dtype for _, dtype in recorder.seen][-1] == torch.float16
    assert recorder.count(torch.float32, torch.float64) == 2 + PROBES


def test_sparse_products_are_left_to_pytorch() -> None:
    a = torch.eye(4, dtype=torch.float16)
    with Recorder() as recorder, emulate_tensor_cores():
        result = a.to_sparse() @ a
    assert torch.equal(result, a)
    assert torch.float16 in {dtype for _, dtype in recorder.seen}


def test_mixed_types_raise_as_without_the_context() -> None:
    half, single = torch.ones(4, 4, dtype=torch.float16), torch.ones(4, 4)
    for other in (single, half.bfloat16()):
        with emulate_tensor_cores(), pytest.raises(RuntimeError, match="same dtype"):
            half @ other


def test_nested_contexts_give_the_same_bits() -> None:
    model, x = block_and_input(torch.float16)
    with emulate_tensor_cores():
        once = train_once(model, x)
        with emulate_tensor_cores():
            twice = train_once(model, x)
        with Recorder() as recorder:
            model(x)
    assert all(same_bits(a, b) for a, b in zip(once, twice, strict=True))
    assert recorder.count(torch.float16) > 0  # the recorder is inside: it sees what was asked for


def test_an_exception_leaves_the_context() -> None:
    a = torch.ones(4, 4, dtype=torch.float16)
    with pytest.raises(KeyError), emulate_tensor_cores():
        raise KeyError
    with Recorder() as recorder:
        a @ a
    assert recorder.seen == [("mm", torch.float16)]


def test_the_context_decorates_functions() -> None:
    @emulate_tensor_cores()
    def square(a: torch.Tensor) -> torch.Tensor:
        return a @ a

    with Recorder() as recorder:
        for _ in range(2):
            square(torch.ones(4, 4, dtype=torch.bfloat16))
    assert recorder.count(*HALF) == 0


def test_other_threads_are_not_affected() -> None:
    a = torch.ones(4, 4, dtype=torch.float16)
    seen: list[tuple[str, torch.dtype]] = []

    def other() -> None:
        with Recorder() as recorder:
            a @ a
        seen.extend(recorder.seen)

    with emulate_tensor_cores():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [("mm", torch.float16)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    model, x = block_and_input(torch.bfloat16)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    with Recorder() as recorder, emulate_tensor_cores():
        expected = train_once(model, x)
        actual = train_once(Checkpointed(), x)
    assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True))
    assert recorder.count(*HALF) == 0


@pytest.mark.parametrize("autocast_outside", [False, True])
def test_autocast_products_are_emulated_forward_and_backward(autocast_outside: bool) -> None:
    x, w = integers(1, 8, 24, dtype=torch.float32), integers(2, 5, 24, dtype=torch.float32)
    w.requires_grad_()
    g = integers(3, 8, 5, dtype=torch.bfloat16)
    contexts = [emulate_tensor_cores(), torch.autocast("cpu", torch.bfloat16)]
    if autocast_outside:
        contexts.reverse()
    with Recorder() as recorder, contexts[0], contexts[1]:
        y = F.linear(x, w)
        y.backward(g)
    assert w.grad is not None
    assert same_bits(y.detach(), round16(wide(x) @ wide(w).T, torch.bfloat16))
    assert same_bits(w.grad.bfloat16(), round16(wide(g).T @ wide(x), torch.bfloat16))
    assert recorder.count(*HALF) == 0


def test_inference_mode_gives_the_same_bits() -> None:
    model, x = block_and_input(torch.float16)
    with Recorder() as recorder, emulate_tensor_cores():
        expected = model(x).detach()
        with torch.no_grad():
            assert same_bits(model(x), expected)
        with torch.inference_mode():
            actual = model(x)
    assert same_bits(actual.clone(), expected)
    assert recorder.count(*HALF) == 0


def test_recurrent_layers_train_without_16_bit_products() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(8, 8).half()
    with Recorder() as recorder, emulate_tensor_cores():
        layer(torch.randn(3, 2, 8).half())[0].sum().backward()
    assert recorder.count(*HALF) == 0
    assert recorder.count(torch.float32) > 0


def test_functional_transforms_see_emulated_products() -> None:
    a, w = integers(1, 3, 6, 24, dtype=torch.float16), integers(2, 24, 5, dtype=torch.float16)
    with Recorder() as recorder, emulate_tensor_cores():
        result = torch.func.vmap(lambda x: x @ w)(a)
        torch.func.grad(lambda x: (x @ w).sum())(a)
    assert same_bits(result, round16(wide(a) @ wide(w), torch.float16))
    assert recorder.count(*HALF) == 0


def test_compiled_functions_run_uncompiled_inside() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    a = integers(1, 24, 24, dtype=torch.float16)
    with emulate_tensor_cores():
        result = torch.compile(lambda a: a @ a, backend=backend)(a)
    assert same_bits(result, round16(wide(a) @ wide(a), torch.float16))
    assert not compiled
    torch.compile(lambda a: a @ a, backend=backend)(a)
    assert len(compiled) == 1


def test_fp32_products_that_round_their_operands_raise() -> None:
    context = emulate_tensor_cores()
    with Bfloat16Products(), pytest.raises(StageError, match="set_float32_matmul_precision"):
        context.__enter__()


def test_default_device_and_type_do_not_matter() -> None:
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"), emulate_tensor_cores():
            pass
    finally:
        torch.set_default_dtype(torch.float32)


def test_medium_matmul_precision_is_harmless_or_raises() -> None:
    # whether "medium" has an effect depends on the CPU; silently rounded operands never pass
    a = torch.full((64, 64), 1 + 2.0**-10, dtype=torch.float16)
    torch.set_float32_matmul_precision("medium")
    try:
        with emulate_tensor_cores():
            assert same_bits(a @ a, round16(wide(a) @ wide(a), torch.float16))
    except StageError as error:
        assert "BF16" in str(error)  # noqa: PT017
    finally:
        torch.set_float32_matmul_precision("highest")
