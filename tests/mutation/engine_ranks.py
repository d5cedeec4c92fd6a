"""Errors in what ranks agree on: the collective, what counts, and what they are told."""

from mutant import engine_mutants

_TESTS = ("test_ranks.py",)
_SHARDED = ("test_sharded_ranks.py",)
_JOINED = ("test_joined_ranks.py",)

RANKS = [
    *engine_mutants(
        "ranks/agreement.py",
        _TESTS,
        (
            "the largest stands for the sum",
            "reduced(numbers, group, distributed.ReduceOp.SUM,",
            "reduced(numbers, group, distributed.ReduceOp.MAX,",
        ),
        ("ranks drift apart unseen", "self._check(torch.cat(", "bool(torch.cat("),
        ("sums are not divided", ".div_(distributed.get_world_size(group))", ""),
        (
            "squares of counters are not compared",
            "squares * self._sizes(home) != sums",
            "sums != sums",
        ),
        ("gradients that nobody scaled pass", "(flags[1] != 0) & (flags[2] == 0)", "flags[1] < 0"),
    ),
    *engine_mutants(
        "ranks/collective.py",
        _TESTS,
        ("nobody is asked", "distributed.all_reduce(shared, operation, group)", "pass"),
    ),
    *engine_mutants(
        "ranks/shares.py",
        _TESTS,
        (
            "copies count on each rank",
            "self._counts[id(param)] = distributed.get_rank(group) == 0",
            "self._counts[id(param)] = True",
        ),
        ("copies are not compared", "if len(set(found)) > 1:", "if False:"),
        ("experts are taken for copies", "if p in groups]", "if groups.setdefault(p) or True]"),
    ),
    *engine_mutants(
        "ranks/shares.py",
        _SHARDED,
        (
            "copies beyond a mesh count again",
            "if first != distributed.get_rank(self._group):",
            "if False:",
        ),
    ),
    *engine_mutants(
        "ranks/spread.py",
        _SHARDED,
        ("pieces are taken for copies", "if p.place == piece.place}", "}"),
        ("stages are taken for copies", "if listed == lists[here]]", "if True]"),
    ),
    *engine_mutants(
        "base/dtensors.py",
        _SHARDED,
        (
            "sums that ranks have yet to add up are taken as they are",
            "value.redistribute(placements=param.placements)",
            "value",
        ),
    ),
    *engine_mutants(
        "base/bulk.py",
        _SHARDED,
        ("writes to a piece do not count", "else count + here._version", "else count"),
    ),
    *engine_mutants(
        "masters/fitted.py",
        _SHARDED,
        (
            "an edited master is overwritten by its weight",
            "(known[0] is not master or known[1] != count)",
            "False",
        ),
    ),
    *engine_mutants(
        "ranks/choice.py",
        _SHARDED,
        ("a group may be too small", "if outside:", "if False:"),
    ),
    *engine_mutants(
        "checkpoint/states.py",
        _SHARDED,
        (
            "a step count becomes a DTensor",
            'value\n        if key == "step"\n',
            "value\n        if False\n",
        ),
    ),
    *engine_mutants(
        "engine/findings.py",
        _SHARDED,
        ("ranks clip to another limit", "limit = rounded_max_norm(max_norm)", "limit = max_norm"),
    ),
    *engine_mutants(
        "ranks/collective.py",
        ("test_rank_faults.py",),
        ("a rank that ends has no name", "raise RankError(", "raise RuntimeError("),
    ),
    *engine_mutants(
        "ranks/exact_sum.py",
        ("properties/test_exact_sum.py",),
        ("a digit is lost", "(low >> 32) + (high & _MASK)", "(high & _MASK)"),
        ("digits are one place off", "- 53 - _LOWEST", "- 52 - _LOWEST"),
    ),
    *engine_mutants(
        "engine/findings.py",
        _TESTS,
        (
            "a rank clips by its own norm",
            "torch.where(agreed.found_inf, torch.inf, agreed.square_sum)",
            "torch.where(agreed.found_inf, torch.inf, total)",
        ),
        ("what ranks found is forgotten", "        self.add(agreed.found_inf)\n", ""),
        (
            "ranks compute scales of their own gradients",
            "self.largest = self._agreement.largest_of_ranks(self.largest)",
            "pass",
        ),
    ),
    *engine_mutants(
        "engine/gradients.py",
        _TESTS,
        (
            "ranks are asked once more after a clip",
            "self.has_ranks and (self.findings.agreed is None or",
            "self.has_ranks and (True or",
        ),
    ),
    *engine_mutants(
        "engine/scale_moves.py",
        _TESTS,
        (
            "a step that no rank takes is one",
            "self.advance_if(gradients, agreed.any_gradient)",
            "self.advance_if(gradients, agreed.any_gradient | True)",
        ),
    ),
    *engine_mutants(
        "engine/gradients.py",
        ("test_accumulation.py",),
        ("sums stay after the step", "accumulated._replace(sums={})", "accumulated"),
    ),
    *engine_mutants(
        "ranks/agreement.py",
        _JOINED,
        (
            "a rank without batches counts copies",
            "if self._present and self._shares",
            "if () and self._shares",
        ),
        (
            "a rank without batches has copies",
            "[*sizes, len(self._present)]",
            "[*sizes, self._size]",
        ),
    ),
    *engine_mutants(
        "engine/joins.py",
        _JOINED,
        ("masters stay those of the last batch", "self.load_state_dict(found[0])", "pass"),
        ("later steps are asked as in a Join", "self._stage.ranks.end_join()", "pass"),
    ),
    *engine_mutants(
        "ranks/module_joins.py",
        _JOINED,
        ("a join that has ended is an error", "if _is_joining(module):", "if True:"),
    ),
]
