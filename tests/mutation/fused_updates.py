"""Errors in fused updates: the kernel, its rules, what prepares it, and the plan."""

from mutant import mutants

_TWICE = """    bits ^= tl.load(_at(grad, start, GRAD, aligned) + offsets, volatile=True)
    x = widen(bits, GRAD)"""

_KERNEL = mutants(
    "_update_kernel.py",
    ("test_update_memory.py", "test_update_skips.py"),
    ("found_inf is ignored", "tl.load(found_inf_ptr) == 0", "tl.load(found_inf_ptr) != 12345"),
    ("found_inf is compared to 1", "tl.load(found_inf_ptr) == 0", "tl.load(found_inf_ptr) != 1"),
    ("mask one too long", "offsets < count", "offsets <= count"),
    ("mask one too short", "offsets < count", "offsets < count - 1"),
    ("every chunk counts as full", "(start + CHUNK <= size)", "(start < size)"),
    (
        "only the first round is updated",
        "range(0, count, ROUND):\n            _update",
        "range(0, ROUND, ROUND):\n            _update",
    ),
    ("the sign is forgotten", "coefficient * scalars[0]", "coefficient"),
    (
        "moments are stored in another order",
        "joined((param,), moments)",
        "joined(moments, (param,))",
    ),
    ("what is clamped is not stored", "narrow(rounded, WEIGHT)", "narrow(param, WEIGHT)"),
    ("no step count is written", "(step != 0) & (start == 0)", "(step != 0) & (start == 1)"),
    ("the scalars of another tensor", "tensor * (COLUMNS + 1)", "tensor * COLUMNS"),
    (
        "the gradient's address is taken for aligned",
        "is_aligned(grad, GRAD, tl.float32) & (start",
        "(start",
    ),
    (
        "the last moment's address is taken for aligned",
        "for i in tl.static_range(len(masters)):\n        aligned",
        "for i in tl.static_range(MOMENTS):\n        aligned",
    ),
    (
        "the weight's address is taken for aligned",
        "aligned & is_aligned(weight, WEIGHT, tl.float32)",
        "aligned",
    ),
    ("the scale moves in every program", "(tl.program_id(0) == 0) & (moves", "(moves"),
)
_EDITS = [
    *mutants(
        "_update_kernel.py",
        ("test_update_edits.py",),
        ("what is adopted is not updated", "APPLY(x, master, ", "APPLY(x, values[0], "),
        (
            "a skipped step does not adopt",
            "tl.load(found_inf_ptr) != 0",
            "tl.load(found_inf_ptr) == 2",
        ),
        ("edits are counted for the first tensor", "edits_ptr += 2 * tensor", "edits_ptr += 0"),
        (
            "edits of skipped steps are counted for the first tensor",
            "count_edits(edits_ptr + 2 * tensor, changed)",
            "count_edits(edits_ptr, changed)",
        ),
        (
            "a skipped step adopts the first round alone",
            "for at in range(0, count, ROUND):\n        held",
            "for at in range(0, ROUND, ROUND):\n        held",
        ),
        ("a skipped step stores nothing", "held, mask=changed != 0", "held, mask=changed < 0"),
        (
            "a skipped step stores past the end",
            "held, mask=changed != 0",
            "held, mask=changed >= 0",
        ),
    ),
    *mutants(
        "_counters.py",
        ("test_update_skips.py", "test_update_edits.py"),
        (
            "one of four counted neighbours is added",
            "tl.sum(tl.reshape(counts",
            "tl.max(tl.reshape(counts",
        ),
        (
            "refused elements are not counted",
            "edits_ptr + 1, counts >> 16",
            "edits_ptr + 1, counts * 0",
        ),
        ("refused ones count as adopted", "counts & (REFUSED - 1)", "counts"),
    ),
    *mutants(
        "update.py",
        ("test_update_edits.py",),
        ("autograd is not told of edits", "mark_written(edits)", "pass"),
        (
            "float32 parameters have rows",
            "[0 if part.weight is None else len(part.batch.masters)",
            "[len(part.batch.masters)",
        ),
        (
            "counters are not looked at",
            'check_state("edits", edits, ',
            'check_state("edits", edits) if 0 else (',
        ),
    ),
]
_PREPARE = mutants(
    "_prepare.py",
    ("test_update.py", "test_update_plan.py"),
    ("step counts start at 0", ".to(tl.float64) + 1.0", ".to(tl.float64)"),
    ("lr in a tensor is ignored", "tl.where(lr != 0, given.to(tl.float64), own)", "own"),
    ("all tensors are of the first group", "group * (NUMBERS + 1)", "group * 0"),
    ("the last tensors are not prepared", "-(-tensors // BLOCK)", "max(1, tensors // BLOCK)"),
    ("inspect prepares one block too late", "program - 1 - segments", "program - segments"),
)
_RULES = [
    *mutants(
        "rules/_power.py",
        ("test_update.py",),
        ("the power of one less", "((bits >> bit) & 1)", "(((bits - 1) >> bit) & 1)"),
        ("16 bits of the step count", "tl.static_range(32)", "tl.static_range(16)"),
    ),
    *mutants(
        "rules/adam.py",
        ("test_update.py",),
        ("decay is always L2", "param = param * decay", "param = param"),
        ("NaN is forgotten in the largest", " | (square != square)", ""),
        (
            "epsilon under the root",
            "tl.sqrt_rn(square), root) + eps",
            "tl.sqrt_rn(square + eps), root)",
        ),
        ("the step is divided first", "mean * step_size, tl.div", "mean, tl.div"),
    ),
    *mutants(
        "rules/sgd.py",
        ("test_update.py",),
        ("the first step is like the others", "first != 0.0", "first > 1.0"),
        ("Nesterov is ignored", "nesterov != 0.0", "nesterov > 1.0"),
    ),
    *mutants(
        "rules/lion.py",
        ("test_update.py",),
        ("zero has a direction", "tl.where(blend < 0.0, -1.0, 0.0)", "-1.0"),
        (
            "the mean moves first",
            "blend = moments[0] * beta1 + grad",
            "blend = moments[0] * beta2 + grad",
        ),
    ),
    *mutants(
        "rules/adagrad.py",
        ("test_update.py",),
        ("the rate decays one step early", "(t - 1.0) * lr_decay", "t * lr_decay"),
    ),
]
_PLAN = [
    *mutants(
        "_update_plan.py",
        ("test_update_errors.py", "test_update_plan.py", "test_update_skips.py"),
        ("tensors without elements have no program", "max(1, -(-master", "max(0, -(-master"),
        ("addresses are not looked at", "(found, tuple(dtypes))", "(len(found), tuple(dtypes))"),
        ("hyper-parameters are not looked at", "key = (bits, ", "key = (len(bits), "),
        ("shapes and strides are not looked at", "if layout == part.layout and", "if"),
        ("neighbours count as sharing memory", "right=True", "right=False"),
        ("gradients may be what is updated", "if shares.any():", "if False:"),
        ("batches may share memory", 'check_no_overlap("batches", written)', "pass"),
    ),
    *mutants(
        "update.py",
        ("test_update_plan.py", "test_update_skips.py", "test_update_memory.py"),
        ("a plan stays prepared", "plan.prepared = False", "pass"),
        ("a plan need not be prepared", "if not plan.prepared:", "if False:"),
        ("the scale moves with the first batch", "left == 0", "left == 1 - len(launches)"),
        ("the scale moves with every batch", " and left == 0", ""),
        (
            "autograd is not told of writes",
            "increment_version([*plan.written, saturated])",
            "increment_version([])",
        ),
        ("nothing to update, no move", "elif then is not None:", "elif False:"),
    ),
    *mutants(
        "inspection.py",
        ("test_update_plan.py",),
        ("inspect forgets that it prepared", "plan.prepared = True", "pass"),
    ),
]
_MACHINE_CODE = mutants(
    "_update_kernel.py",
    ("audit update adam fp16 fp16",),
    ("masked rounds as long as chunks", "ROUND = 512", "ROUND = 2048"),
    (
        "the gradient is read twice",
        "    x = widen(bits, GRAD)",
        _TWICE,
    ),
)
_WAITING = mutants(
    "_counters.py",
    ("audit update adam fp16 fp16",),
    (
        "threads wait to count",
        "return tl.sum(tl.reshape(counts, (counts.shape[0] // 4, 4)), axis=1)",
        "return tl.zeros_like(counts) + tl.sum(counts, axis=0)",
    ),
)
_CONTRACTION = mutants(
    "_update_kernel.py",
    ("test_variants.py",),
    ("rules are contracted", "enable_fp_fusion=False", "enable_fp_fusion=True"),
)
UPDATES = [
    *(*_KERNEL, *_EDITS, *_PREPARE, *_RULES, *_PLAN, *_CONTRACTION),
    *(*_MACHINE_CODE, *_WAITING),
]
