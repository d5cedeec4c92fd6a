"""Errors in what keeps gradients right between a backward pass and its step."""

from mutant import engine_mutants

_CALLBACK = "engine.queue_callback(lambda: engine.queue_callback(last))"
_FITS = "and grad.stride() == self._masters.layout_of(param).stride()"

EXPOSURE = [
    *engine_mutants(
        "engine/exposure.py",
        ("test_exposed_gradients.py",),
        (
            "the model's own gradient is not kept",
            "_Shown(param, own, dtype, None)",
            "_Shown(param, None, dtype, None)",
        ),
        ("the dtype of gradients is not put back", "param.grad_dtype = shown.own_dtype", "pass"),
        ("a dropped gradient comes back", "if fits and not shown.dropped:", "if fits:"),
        ("a backward pass is watched for ever", "self._hooks.pop().remove()", "self._hooks.pop()"),
        (
            "no backward pass is watched",
            "weakref.ref(p))) for p in some]",
            "weakref.ref(p))) for p in some[:0]]",
        ),
        ("writes to what is shown are not seen", "now == writes and fits", "fits"),
        ("a gradient of other strides is taken as it lies", _FITS, ""),
        (
            "a gradient that was put there reaches no master",
            "        master.grad = grad\n",
            "        pass\n",
        ),
        ("what older torch shows is not undone", "shown.own.data = shown.own_values", "pass"),
    ),
    *engine_mutants(
        "engine/exposure.py",
        ("test_steps_nobody_takes.py",),
        (
            "one dropped gradient throws the pass away",
            "all(param.grad is None for param in self._seen)",
            "any(param.grad is None for param in self._seen)",
        ),
    ),
    *engine_mutants(
        "engine/gradients.py",
        ("test_exposed_gradients.py",),
        ("edits are not looked at again", "findings.are_all and not edited", "findings.are_all"),
        (
            "a clip waits for the step although gradients are shown",
            "if self.exposure is not None:  # who looks",
            "if self.exposure is None:  # who looks",
        ),
    ),
    *engine_mutants(
        "engine/gradients.py",
        ("test_optimizer_clipping.py",),
        (
            "what was clipped is kept until the next step",
            "self._looked_at = self.collected = None  # which",
            "pass  # which",
        ),
    ),
    *engine_mutants(
        "engine/findings.py",
        ("test_bad_weights.py",),
        (
            "an overflow is forgotten with its gradient",
            "self._found_before, self._found = self.found_inf(), None",
            "self._found = None",
        ),
    ),
    *engine_mutants(
        "engine/drivers.py",
        ("test_exposed_gradients.py",),
        (
            "the scale of an outside scaler is not divided out",
            "External(scale.reshape(()), nothing)",
            "External(torch.ones_like(scale).reshape(()), nothing)",
        ),
    ),
    *engine_mutants(
        "engine/unscaling.py",
        ("test_optimizer_clipping_errors.py",),
        (
            "grads() are given before unscale_()",
            "if not self._stage.unscaled:",
            "if self._stage.unscaled is None:",
        ),
    ),
]
CLIP_WATCH = engine_mutants(
    "engine/clip_watch.py",
    ("test_scaled_clips.py",),
    ("averages of ranks count as clips", "found = lower & nowhere_higher", "found = lower"),
    ("a norm that is only read counts as a clip", "found = lower &", "found = lower |"),
    ("nobody compares after a write", "if grad._version != writes:", "if grad._version == writes:"),
    ("the copy is the gradient itself", "grad.detach().clone())", "grad.detach())"),
    (
        "a clip has to change every element",
        "grad.abs() <= before.abs()",
        "grad.abs() < before.abs()",
    ),
    ("it is said each time", "self._warned = True", "self._warned = False"),
    ("what hooks write at the end of a pass counts as a clip", _CALLBACK, "last()"),
    ("an empty parameter is watched", "torch.strided and p.numel()]", "torch.strided]"),
)
LEFTOVERS = engine_mutants(
    "engine/leftovers.py",
    ("test_leftovers.py",),
    (
        "what was left scaled is scaled once more",
        "scaled, scale * self._unscaled_by, backend",
        "scaled, scale, backend",
    ),
    (
        "gradients that were written to are multiplied",
        "and writes_to([now]) == [writes]",
        "",
    ),
    ("another gradient in its place is multiplied", "and grad() is now", ""),
    (
        "gradients unscaled in place count as scaled",
        "        if in_place:",
        "        if not in_place:",
    ),
    ("an expanded gradient is written to", "own_memory(param, param.grad)", "param.grad"),
    ("an exception among them is not noted", "bool(unscaled or (scaled and moves))", "False"),
)
STAGE = [
    *engine_mutants(
        "engine/stage.py",
        ("test_exposed_gradients.py",),
        (
            "a pass that the model dropped stays",
            "self.throw_away()  # by model",
            "pass  # by model",
        ),
        ("edits are not taken", "self.gradients.take_edits()", "pass"),
    ),
    *engine_mutants(
        "engine/stage.py",
        ("test_closure_errors.py",),
        ("gradients stay shown after an evaluation", "gradients.conceal()", "pass"),
    ),
    *engine_mutants(
        "engine/stage.py",
        ("test_leftovers.py",),
        ("gradients left over do not follow the scale", "moves=moves)", "moves=False)"),
        (
            "nothing is noted of what a step leaves",
            "if external is None:\n            params = self._params()",
            "if external is not None:\n            params = self._params()",
        ),
    ),
    *engine_mutants(
        "engine/stage.py",
        ("test_steps_nobody_takes.py",),
        (
            "a pass of an outside scaler counts here too",
            "gradients.counts and self._outside_scale is None",
            "gradients.counts",
        ),
        (
            "a pass that was thrown away never counts",
            "and counts and not gradients.torn",
            "and counts and gradients.torn",
        ),
        ("the floor is not told of", "        if counts:\n", "        if not counts:\n"),
    ),
    *engine_mutants(
        "engine/stage.py",
        ("test_accumulation.py",),
        (
            "an outside scaler steps sums",
            "checks.check_no_outside_scaler(caller, external)",
            "pass",
        ),
    ),
    *engine_mutants(
        "engine/fused_path.py",
        ("test_memory_that_moves.py",),
        (
            "a step takes the last plan unchecked",
            "        plan = self.plan(gradients.params)",
            "        plan = self.likely_plan(gradients.params)",
        ),
    ),
    *engine_mutants(
        "masters/step_plan.py",
        ("test_memory_that_moves.py",),
        (
            "a plan outlives the memory of parameters",
            "and addresses_of(params, sharded=written.any_dtensor) == written.addresses",
            "",
        ),
    ),
    *engine_mutants(
        "masters/held_state.py",
        ("test_memory_that_moves.py",),
        (
            "a plan outlives the memory of masters and moments",
            "addresses_of(self._tensors, sharded=self._sharded) == self._addresses",
            "True",
        ),
    ),
    *engine_mutants(
        "engine/seen_gradients.py",
        ("test_memory_that_moves.py",),
        (
            "gradients that moved after a clip are read where they were",
            "and (not seen.are_in_memory or grads.addresses == seen.addresses)",
            "",
        ),
    ),
    *engine_mutants(
        "engine/checked_parameters.py",
        ("test_memory_that_moves.py", "test_replaced_parameters.py"),
        ("kinds of parameters are not compared", "kinds[0].fit(params) and ", ""),
        (
            "another shape is not checked",
            "and have_shapes(params, known.shapes)",
            "",
        ),
        (
            "another dtype is not checked",
            "dtypes_in_order(params) == known.dtypes_in_order\n            and ",
            "",
        ),
        (
            "other memory is not checked",
            "addresses_of(params, sharded=known.any_dtensor) != known.addresses",
            "False",
        ),
    ),
    *engine_mutants(
        "engine/optimizer.py",
        ("test_state_initialisation.py",),
        (
            "zeros of a scaled loss only make the state",
            "            if self._stage.is_untouched:",
            "            if True:",
        ),
    ),
    *engine_mutants(
        "engine/zero_step.py",
        ("test_state_initialisation.py",),
        (
            "one zero gradient makes the step one over zeros",
            "not params or any(bool(torch.any(p.grad != 0))",
            "not params or all(bool(torch.any(p.grad != 0))",
        ),
    ),
]
SCALE_MOVES = [
    *engine_mutants(
        "engine/scale_moves.py",
        ("test_steps_nobody_takes.py",),
        ("all losses back off with one", "& known.logical_not()", ""),
        (
            "clean passes count and overflows do not",
            "counts = condition",
            "counts = found_inf == 0",
        ),
        ("a clean pass is counted in the totals", "([] if totals is None else [totals])", "[]"),
        (
            "a clean pass moves the scales of losses",
            "scales = [self._tensors, *(loss.tensors for loss in self._losses.each.values())]",
            "scales = [self._tensors]",
        ),
        (
            "a skip is not counted in the totals",
            "            self.count(found_inf)",
            "            pass",
        ),
        (
            "an exception leaves scales half moved",
            "counts = torch.zeros_like(",
            "counts = torch.ones_like(",
        ),
    ),
    *engine_mutants(
        "engine/scale_moves.py",
        ("test_external_scaler.py",),
        ("an outside scaler moves the own scale", "if external is None else NoLossScale()", ""),
    ),
]
CHECKS = [
    *engine_mutants(
        "engine/stage_checks.py",
        ("test_bad_weights.py",),
        (
            "a gradient that comes late is left out",
            "known.issuperset(map(id, params))",
            "bool(known)",
        ),
    ),
    *engine_mutants(
        "engine/stage_checks.py",
        ("test_accumulation.py",),
        ("a late gradient beside sums is left out", "if not summed and known", "if known"),
        ("a pass after unscale_ is lost", "if gradients is not None:", "if gradients is None:"),
    ),
    *engine_mutants(
        "engine/stage_checks.py",
        ("test_exposed_gradients.py",),
        ("sums that are shown are late gradients", "and gradients.exposure is None", ""),
    ),
    *engine_mutants(
        "engine/checked_parameters.py",
        ("test_replaced_parameters.py",),
        (
            "weights of any shape are stepped",
            "if param.shape != master.shape:",
            "if param.ndim != master.ndim:",
        ),
    ),
]
ACCUMULATION = [
    *engine_mutants(
        "engine/accumulation.py",
        ("test_interruptions_of_others.py",),
        ("half a pass in the sums is not noted", "self.torn = True", "self.torn = False"),
    ),
    *engine_mutants(
        "engine/accumulation.py",
        ("test_interruptions.py",),
        ("a gradient is not put back after an exception", "param.grad = grad\n", "pass\n"),
    ),
    *engine_mutants(
        "engine/accumulation.py",
        ("test_accumulation.py",),
        (
            "sums are in memory of somebody else",
            "param.grad.detach().clone()",
            "param.grad.detach()",
        ),
    ),
]

GRADIENTS = [*EXPOSURE, *CLIP_WATCH, *LEFTOVERS, *STAGE, *SCALE_MOVES, *CHECKS, *ACCUMULATION]
