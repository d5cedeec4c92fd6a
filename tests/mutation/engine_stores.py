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
            "            return self._hold(param, value.detach(), None, is_whole=True)",
            "            pass",
        ),
        (
            "whole masters stay whole",
            "        for param, master in whole:",
            "        for param, master in ():",
        ),
        (
            "a remainder that somebody put there is not taken",
            "            held.beside, held.is_whole = beside, False\n",
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
            "return self._begin(param, self._part_beside(parts))",
            "return self._begin(param, torch.zeros_like(self._part_beside(parts)))",
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
        ("exact leaves remainders", "held_here(beside).zero_()", "pass"),
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
    *engine_mutants(
        "stores/rounding.py",
        ("test_random_rounding.py",),
        (
            "a bit of the draw is lost",
            "bits.to(torch.int32)) >> 16",
            "(bits.to(torch.int32) & ~1)) >> 16",
        ),
        ("a carry makes an infinity", "magnitude.clamp(max=_LARGEST)", "magnitude"),
        ("a NaN of low bits becomes an infinity", "(magnitude >> 16) | quiet", "magnitude >> 16"),
    ),
    *engine_mutants(
        "backends/_stores.h",
        ("test_random_rounding.py",),
        (
            "a carry makes an infinity in C",
            "mask_of((int32_t)(bits & 0x7fffffffu) < 0x7f7f0000)",
            "mask_of((int32_t)(bits & 0x7fffffffu) < INFINITE)",
        ),
    ),
    *engine_mutants(
        "stores/random_bits.py",
        ("test_random_bits.py",),
        ("both words are one", " + (site // 2) * _GOLDEN", ""),
        ("steps shift one sequence", "+ a) & _MASK, b)", "+ a) & _MASK)"),
        (
            "shards begin at 0",
            "torch.arange(first, first + like.numel(), out=flat)",
            "torch.arange(like.numel(), out=flat)",
        ),
    ),
    *engine_mutants(
        "stores/blocks.py",
        ("test_moment_blocks.py",),
        (
            "draws are the lower ends of their parts",
            "_in_blocks(bits.float()) + 0.5",
            "_in_blocks(bits.float())",
        ),
        (
            "codes are chosen by roots",
            "(t - lower) * (t + lower)",
            "(t - lower) * (lower + lower + 1)",
        ),
        ("a number that roots divide by becomes 0", "codes.clamp(min=1)", "codes"),
        (
            "an infinity is a number of its block",
            "torch.where(finite, scales, torch.nan)",
            "scales",
        ),
        (
            "the scale is that of a square",
            "scales = roots.amax(dim=2)",
            "scales = blocks.abs().amax(dim=2)",
        ),
    ),
    *engine_mutants(
        "backends/_stores.h",
        ("test_moment_blocks.py",),
        ("draws are the lower ends of their parts in C", " + 0.5f) * 0x1p-16f", ") * 0x1p-16f"),
        (
            "a block that is not finite is none of NaN in C",
            "        return NAN;",
            "        return 0;",
        ),
    ),
    *engine_mutants(
        "stores/store.py",
        ("test_moment_blocks.py",),
        ("short rows share blocks", "row >= SHORTEST_ROW and ", ""),
        ("rows may lie in any order", " and (shape[0] < 2 or stride[0] == row)", ""),
    ),
    *engine_mutants(
        "backends/_stores.h",
        ("test_moments_that_move.py",),
        ("moments are truncated in C", "((words[i] >> shift) & 0xffffu & below)", "(0 & below)"),
    ),
]
