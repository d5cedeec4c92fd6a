"""Errors in steps of both paths at once, and in several optimizers as one."""

from mutant import engine_mutants

_TESTS = ("test_mixed_paths.py",)
_CHAINS = ("test_chained_optimizer.py",)

MIXED = [
    *engine_mutants(
        "engine/mixed_path.py",
        _TESTS,
        (
            "fused groups are stepped a second time",
            "gradients.found_inf(), split.numbers)",
            "gradients.found_inf(), None)",
        ),
        ("what a general group does not know stays", "path.hand_over_of(params)", "pass"),
        (
            "shown gradients are unscaled twice",
            "copied = [] if gradients.applied else split.general",
            "copied = split.general",
        ),
        ("a clip of sums is forgotten", "gradients.apply()", "pass"),
    ),
    *engine_mutants(
        "engine/mixed_path.py",
        _CHAINS,
        ("each optimizer moves the scale", "move if last else None", "move"),
    ),
    *engine_mutants(
        "engine/unscaled_copies.py",
        _TESTS,
        ("copies stay in `p.grad`", "holder.grad = grad", "pass"),
        ("float32 gradients are unscaled in place", "holder.grad = copy", "pass"),
    ),
    *engine_mutants(
        "engine/general_path.py",
        _TESTS,
        (
            "weights of all groups are rounded",
            "some = self._with_master(numbers)",
            "some = self._with_master(None)",
        ),
    ),
    *engine_mutants(
        "masters/masters.py",
        _TESTS,
        (
            "other groups keep their parameters",
            "in numbers else []\n",
            'in numbers else [*g["params"]]\n',
        ),
    ),
    *engine_mutants(
        "engine/paths.py",
        _TESTS,
        (
            "an old split is kept",
            "self._signature, self._last = signature, None",
            "self._signature = signature",
        ),
    ),
    *engine_mutants(
        "optim/chained_optimizer.py",
        _CHAINS,
        ("each has a state of its own", "part.state = self.state", "pass"),
        (
            "a load replaces the optimizers",
            "self.optimizers = parts\n        self.linked",
            "self.linked",
        ),
        (
            "groups that were added are not noticed",
            "if list(map(id, owned)) !=",
            "if 0 and list(map(id, owned)) !=",
        ),
    ),
    *engine_mutants(
        "engine/general_path.py",
        ("test_mixed_path_errors.py",),
        (
            "optimizers in a chain may be stepped",
            "dict.fromkeys([self.inner, *parts_of(self.inner)])",
            "[self.inner]",
        ),
    ),
]
