"""Errors in what keeps an optimizer whole: exceptions, foreign memory, state, scalers, graphs."""

from mutant import engine_mutants

INTERRUPTIONS = [
    *engine_mutants(
        "masters/writes.py",
        ("test_interruptions_of_others.py",),
        ("the first write is not noted", "        self.begun = True", "        self.begun = False"),
    ),
    *engine_mutants(
        "engine/saving.py",
        ("test_interruptions_of_others.py",),
        ("half a load goes on", "        self._writes.begin()\n", ""),
    ),
    *engine_mutants(
        "engine/optimizer.py",
        ("test_external_scaler.py",),
        ("a failed step keeps what a scaler handed over", "External.leave(self)", "pass"),
    ),
    *engine_mutants(
        "engine/stage_questions.py",
        ("test_interruptions_of_others.py",),
        (
            "half a step is clipped and added to",
            "        self._writes.check(caller)",
            "        pass",
        ),
    ),
    *engine_mutants(
        "engine/general_path.py",
        ("test_interruptions_of_others.py",),
        ("a wrapped step is no write", "if closure is None:  # with one", "if False:  # with one"),
        (
            "a wrapped step that fails has written nothing",
            "if before is not None and before == self._written():",
            "if before is not None:",
        ),
    ),
    *engine_mutants(
        "engine/general_path.py",
        ("test_state_initialisation.py",),
        (
            "a step over zeros moves masters",
            "                    target.copy_(value)",
            "                    pass",
        ),
    ),
    *engine_mutants(
        "engine/gradients.py",
        ("test_interruptions.py",),
        (
            "half unscaled gradients are whole",
            "in_place = self.applied or any(",
            "in_place = self.applied and any(",
        ),
    ),
    *engine_mutants(
        "engine/stage.py",
        ("test_interruptions.py",),
        (
            "half a move of the scale is whole",
            "        self._writes.begin()\n        self.moves.end",
            "        self.moves.end",
        ),
    ),
    *engine_mutants(
        "masters/snapshot.py",
        ("test_closure_errors.py",),
        (
            "a closure that fails leaves its masters",
            "            tensor.copy_(value)",
            "            pass",
        ),
        ("a closure that fails leaves its state", "self._inner.state.update(self._state)", "pass"),
    ),
]
INNER = [
    *engine_mutants(
        "engine/general_path.py",
        ("test_inner_methods.py",),
        (
            "the inner state_dict is open",
            'register_state_dict_pre_hook(CheckpointGuard(self, "state_dict"))',
            "state_dict",
        ),
        (
            "the inner load is open",
            'register_load_state_dict_pre_hook(CheckpointGuard(self, "load_state_dict"))',
            "state_dict",
        ),
        (
            "a method of the inner one finds no masters",
            "        adopt()\n",
            "        self.masters.create_for([])\n",
        ),
    ),
    *engine_mutants(
        "engine/stage_questions.py",
        ("test_inner_methods.py",),
        ("gradients that wait are passed by", "return waits or self", "return self"),
        (
            "sums that wait are passed by",
            "return self.gradients is not None or self._sums.exist",
            "return self.gradients is not None",
        ),
    ),
    *engine_mutants(
        "engine/inner_methods.py",
        ("test_inner_methods.py",),
        ("private methods are offered", 'or name.startswith("_")', ""),
        (
            "entries put into the state are overlooked",
            "        self._masters.take_over_edits(self.state, self.param_groups)",
            "        pass",
        ),
        ("edits are overwritten", "lambda: self._edits.adopt(began=self._began)", "lambda: None"),
    ),
    *engine_mutants(
        "masters/inner_guards.py",
        ("test_inner_methods.py",),
        (
            "a guard outlives its wrapper",
            "self._method = method",
            "self._method, self._kept = method, path",
        ),
    ),
    *engine_mutants(
        "masters/inner_guards.py",
        ("test_replaced_groups_and_state.py",),
        (
            "other groups of the wrapped one are stepped",
            "if wrappers is shared and inners is shared:",
            "if wrappers is shared:",
        ),
    ),
    *engine_mutants(
        "engine/two_steps.py",
        ("test_two_steps.py",),
        (
            "an overflow of the first pass steps",
            "if climb.found_inf:\n            gradients.findings",
            "if climb is None:\n            gradients.add",
        ),
        (
            "the first pass stays although it was skipped",
            "if climb.found_inf:\n            _drop",
            "if climb is None:\n            _drop",
        ),
        (
            "the second pass stays",
            "self._descend(climb)\n            _drop(gradients)",
            "self._descend(climb)",
        ),
    ),
    *engine_mutants(
        "engine/general_path.py",
        ("test_two_steps.py",),
        (
            "zeros of the inner one stay there",
            "own_memory(param, param.grad)).copy_",
            "here).copy_",
        ),
    ),
    *engine_mutants(
        "engine/stage.py",
        ("test_two_steps.py",),
        ("a pass without a scale never waits", "may_wait = scaled or", "may_wait = scaled and"),
    ),
    *engine_mutants(
        "engine/optimizer.py",
        ("test_two_steps.py",),
        (
            "a step between the two calls of one",
            'self._check_between_steps("step()")',
            "pass",
        ),
    ),
    *engine_mutants(
        "engine/waiting.py",
        ("test_two_steps.py",),
        ("what was clipped waits in vain", "whole if self._whole else", "not self._whole and"),
    ),
    *engine_mutants(
        "engine/waiting.py",
        ("test_closures_and_waiting_gradients.py",),
        ("nobody hears of sums that a closure drops", "self._whole or bool(", "bool("),
        ("dropping what waits is not told of", "        if waited:", "        if not waited:"),
    ),
]
MEMORY = [
    *engine_mutants(
        "engine/seen_gradients.py",
        ("test_memory_that_moves.py",),
        ("views of gradients are not seen", "grads.are_contiguous ==", "True or 0 =="),
    ),
    *engine_mutants(
        "engine/checked_parameters.py",
        ("test_memory_that_moves.py",),
        ("kinds of masters are not compared", " and kinds[1].fit(self._held)", ""),
        ("the size of a master is not checked", "and have_shapes(self._held, known.shapes)", ""),
        (
            "a plan outlives the size of a parameter",
            "self._masters.version += 1",
            "pass",
        ),
    ),
    *engine_mutants(
        "engine/paths.py",
        ("test_memory_that_moves.py",),
        ("gaps in memory are not seen", "= [version, _why_step", "= [_why_step"),
    ),
    *engine_mutants(
        "base/memory.py",
        ("test_wrapped_memory.py",),
        ("a view that negates is its memory", "if tensor.is_neg():", "if tensor.is_conj():"),
        (
            "tensors on meta have memory",
            'return "it is on the meta device" if tensor.is_meta else None',
            "return None",
        ),
        ("one plain tensor makes all plain", "return usual or all(", "return usual or any("),
    ),
    *engine_mutants(
        "masters/parameters.py",
        ("test_wrapped_memory.py",),
        (
            "a gradient of another kind is taken",
            "or wrapped != (why_no_memory(grad) is not None)",
            "",
        ),
    ),
    *engine_mutants(
        "engine/wrapper.py",
        ("test_wrapped_memory.py",),
        ("wrappers are handed to kernels", "if not all_in_memory(params):", "if not params:"),
    ),
    *engine_mutants(
        "engine/wrapped_passes.py",
        ("test_wrapped_memory.py",),
        (
            "ranks clip by parts of a norm",
            "if max_norm is not None and any(",
            "if max_norm is None and any(",
        ),
    ),
    *engine_mutants(
        "engine/paths.py",
        ("test_wrapped_memory.py",),
        (
            "wrappers take the fused path",
            'if (reason := why_no_memory(here)) and backend != "reference":',
            'if (reason := why_no_memory(here)) and backend == "reference":',
        ),
    ),
]
ANY_STATE = [
    *engine_mutants(
        "base/nested.py",
        ("test_state_of_any_kind.py",),
        ("named tuples become tuples", 'if hasattr(value, "_fields") else', "if not value else"),
        ("dictionaries lose their type", "changed = copy.copy(value)", "changed = {}"),
        ("plain values are shared", "return copy.deepcopy(value)", "return value"),
    ),
    *engine_mutants(
        "checkpoint/states.py",
        ("test_state_of_any_kind.py",),
        (
            "an option that nobody fills in is left out",
            "if name in group and name not in own",
            "if name in own and name not in group",
        ),
        (
            "older step counts stay numbers",
            "            states[param].update(values)",
            "            pass",
        ),
        (
            "tensors within are shared with the state",
            "tensor.detach().to(device, copy=True)",
            "tensor.detach().to(device)",
        ),
    ),
    *engine_mutants(
        "loss_scale/alarm.py",
        ("test_state_of_any_kind.py",),
        ("an event of the device is copied", '"_sent": None}', "}"),
    ),
]
SCALERS = [
    *engine_mutants(
        "amp/scaler_momentum.py",
        ("test_grad_scaler_momentum.py",),
        (
            "the velocity begins from +0.0",
            "torch.full_like(param.grad, -0.0)",
            "torch.zeros_like(param.grad)",
        ),
        (
            "a dampened one begins too",
            "                dampened.append(param)",
            '                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)',
        ),
        (
            "the first velocity is whatever was there",
            'if not group["fused"] or not',
            'if group["fused"] or not',
        ),
    ),
    *engine_mutants(
        "amp/grad_scaler.py",
        ("test_grad_scaler_momentum.py",),
        (
            "a dampened velocity starts anew after a step",
            "if unwritten and self._last_step.skipped:",
            "if unwritten:",
        ),
    ),
    *engine_mutants(
        "engine/external.py",
        ("test_grad_scaler_momentum.py",),
        (
            "a scaler without gradients stops the step",
            "if not isinstance(found_inf, Tensor):",
            "if found_inf is None:",
        ),
    ),
    *engine_mutants(
        "amp/arguments.py",
        ("test_grad_scaler_settings.py",),
        (
            "a scale beyond the bounds is taken",
            "used = min(max(number, low), high)",
            "used = max(number, low)",
        ),
        ("an interval of 0 grows each time", "        if number >= 1:", "        if number >= 0:"),
        ("a tracker overflows", "LARGEST_INT32 - 1)", "LARGEST_INT32)"),
    ),
]
GRAPHS = engine_mutants(
    "base/graphs.py",
    ("test_compiled_training.py",),
    ("methods are traced", "return _disable_dynamo(method)", "return method"),
    ("hooks run twice", "    step.hooked = True  # type: ignore[attr-defined]\n", ""),
    ("hooks of a step are forgotten", "if any(hooks) or", "if"),
)

STATE = [*INTERRUPTIONS, *INNER, *MEMORY, *ANY_STATE, *SCALERS, *GRAPHS]
