"""Tensors of several devices in one call: refused before anything is written."""

import pytest
import torch

import mpcore_kernels
from mpcore_testing.batches import Move
from mpcore_testing.kernels import flags


def scalar(dtype, device):
    return torch.ones((), dtype=dtype, device=device)


def pair(dtype, device):
    return [torch.ones(3, dtype=dtype, device=device) for _ in range(2)]


def arguments(name, device):
    """What a launcher takes, by name, all on one device."""
    half, full, one = torch.float16, torch.float32, scalar(torch.float32, device)
    if name == "unscale_":
        return {"grads": pair(half, device), "coefficient": one, "nonfinite": flags(2, device)}
    if name == "unscale_into":
        lists = {"grads": pair(half, device), "outs": pair(full, device)}
        return lists | {"coefficient": one, "nonfinite": flags(2, device)}
    if name == "cast_into":
        lists = {"masters": pair(full, device), "weights": pair(half, device)}
        counts = {"saturated": scalar(torch.int64, device)}
        return lists | {"found_inf": torch.zeros_like(flags(1, device)[0])} | counts
    if name == "adopt_":
        counts = {"counts": torch.zeros(2, 2, dtype=torch.int64, device=device)}
        return {"weights": pair(half, device), "masters": pair(full, device)} | counts
    if name == "inspect":
        return {"grads": pair(half, device), "coefficient": one}
    integers = {n: scalar(torch.int32, device) for n in ("growth_tracker", "overflows_left")}
    integers["counters"] = torch.zeros(6, dtype=torch.int64, device=device)
    return {"scale": one} | integers | {"found_inf": scalar(torch.int32, device)}


def call(function, name, given):
    """Calls it with what `arguments` returned."""
    if name == "update_scale_":
        state = {n: tensor for n, tensor in given.items() if n != "found_inf"}
        function(Move(**state), given["found_inf"])
    else:
        function(**given, **({"max_norm": None} if name == "inspect" else {}))


def cases():
    passes = ("unscale_", "unscale_into", "cast_into", "adopt_", "inspect")
    for name in (*passes, "update_scale_"):
        for argument, value in arguments(name, "cpu").items():
            if isinstance(value, list):
                yield from ((name, argument, place) for place in range(len(value)))
            else:
                yield name, argument, None


def test_every_launcher_is_tried():
    functions = {name for name in mpcore_kernels.__all__ if name[0].islower()}
    # test_update_errors.py
    of_plans = {"plan_update", "prepare_", "update_"}
    assert {name for name, _, _ in cases()} | of_plans == functions


@pytest.mark.parametrize("keep", [False, True], ids=["function", "launcher"])
@pytest.mark.parametrize(("name", "argument", "place"), list(cases()))
def test_a_tensor_on_another_device_is_refused_and_nothing_written(
    name, argument, place, keep, device
):
    given = arguments(name, device)
    if place is None:
        given[argument] = given[argument].to("meta")
    else:
        given[argument][place] = given[argument][place].to("meta")
    module = mpcore_kernels.Launcher() if keep else mpcore_kernels
    here = [
        (tensor, tensor.clone(), tensor._version)
        for value in given.values()
        for tensor in (value if isinstance(value, list) else [value])
        if tensor.device.type != "meta"
    ]
    with pytest.raises(ValueError, match=r"expected (a tensor on|a C)") as error:
        call(getattr(module, name), name, given)
    assert "meta" in str(error.value)
    for tensor, before, version in here:
        assert torch.equal(tensor, before)
        assert tensor._version == version


def test_tensors_of_one_address_on_two_devices_have_tables_of_their_own(device):
    # a call per device, as the engine makes them: the first one's table must not serve the second
    launcher, one = mpcore_kernels.Launcher(), scalar(torch.float32, device)
    launcher.inspect([torch.ones(0, device=device)], one, None)
    with pytest.raises(ValueError, match="expected a tensor on"):
        launcher.inspect([torch.ones(0, device="meta")], one, None)
