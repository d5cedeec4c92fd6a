"""Errors in how masters lie in memory: what is encoded, decoded, saved and let go."""

from mutant import engine_mutants

STORES = [
    *engine_mutants(
        "masters/packed_masters.py",
        ("test_split_masters.py", "test_split_edits.py"),
        (
            "what a wrapped step makes is not encoded",
            "            self._of[param].encode(param, found, count)",
            "            pass",
        ),
        (
            "values stay decoded",
            "        for param, _ in pairs:\n            self._of[param].release()",
            "        pass",
        ),
        (
            "remainders are not written",
            "torch.where(keep, beside, new.beside,",
            "torch.where(keep, beside, beside,",
        ),
    ),
    *engine_mutants(
        "masters/packed_masters.py",
        ("test_split_elsewhere.py",),
        (
            "clamped weights are not counted",
            "saturated.add_((new.clamped & keep.logical_not()).sum())",
            "pass",
        ),
    ),
    *engine_mutants(
        "masters/packed_masters.py",
        ("test_split_edits.py",),
        (
            "originals lose their digits",
            "            return self._hold(param, value.detach(), None)",
            "            pass",
        ),
        (
            "whole masters stay whole",
            "        for param, master in whole:",
            "        for param, master in ():",
        ),
        (
            "a remainder that somebody put there is not taken",
            "            self._of[param].beside = beside\n",
            "            pass\n",
        ),
        (
            "any remainder is taken",
            "                if problem is not None:",
            "                if False:",
        ),
        ("what cannot be told is compared", 'if on_weight_edit == "raise":', "if False:"),
    ),
    *engine_mutants(
        "masters/packed_masters.py",
        ("test_split_checkpoints.py",),
        (
            "a remainder is dropped by a load",
            "dtype=torch.float32), beside)",
            "dtype=torch.float32), torch.zeros_like(beside))",
        ),
    ),
    *engine_mutants(
        "masters/held_masters.py",
        ("test_replaced_parameters.py",),
        (
            "a master of another shape is moved",
            "problem_with(master, torch.float32, param) is None",
            "isinstance(master, Tensor)",
        ),
    ),
    *engine_mutants(
        "masters/snapshot.py",
        ("test_split_masters.py",),
        (
            "an undone step keeps its remainders",
            "tensors = [*params, *beside]",
            "tensors = [*params]",
        ),
    ),
    *engine_mutants(
        "masters/weights.py",
        ("test_split_edits.py",),
        ("exact leaves remainders", ".zero_()", ""),
    ),
    *engine_mutants(
        "masters/weights.py",
        ("test_split_checkpoints.py",),
        (
            "ties that went the other way do not fit",
            "changed &= split(held, weight.dtype)[0] != weight",
            "pass",
        ),
    ),
    *engine_mutants(
        "masters/weight_edits.py",
        ("test_split_checkpoints.py",),
        (
            "ties that went the other way are adopted",
            "round_ties(param, masters.of(param))",
            "pass",
        ),
    ),
    *engine_mutants(
        "masters/shared.py",
        ("test_split_edits.py",),
        ("another store is shared", "link is None or link.store != store", "link is None"),
    ),
    *engine_mutants(
        "engine/saving.py",
        ("test_split_checkpoints.py",),
        ("what is saved is compact", "if not optimizer._saves_compact:", "if False:"),
        ("nothing saved is compact", "if not optimizer._saves_compact:", "if True:"),
    ),
    *engine_mutants(
        "engine/saving.py",
        ("test_split_edits.py",),
        ("a copy is the original", "return tensor.detach().clone()", "return tensor.detach()"),
    ),
    *engine_mutants(
        "checkpoint/entries.py",
        ("test_split_checkpoints.py",),
        ("two masters are one too few", "    if len(given) > 1:", "    if len(given) > 2:"),
    ),
]
