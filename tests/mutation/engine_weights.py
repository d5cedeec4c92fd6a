"""Errors in what keeps masters, weights and state one: edits, sharing, replaced parameters."""

from mutant import engine_mutants

_LOADED = "if loaded and not set(link.loaded) - {sharing}:"
_LATE_STEP = """collected = self._stage.collect("step()", External.of(self))
        self._edits.adopt(began=self._began, later=self._paths.in_update(collected))"""
_CLOSURE = """self._edits.check("step(closure)")
        self._edits.adopt(began=self._began, later=self._paths.in_update())"""
_EVALUATION = """gradients = self._stage.collect_pass("step(closure)", external)
            self._edits.adopt(began=self._began, later=self._paths.in_update(gradients))"""

ADOPT = [
    *engine_mutants(
        "base/kinds.py",
        ("test_kinds.py",),
        ("all kinds are the same", "known: bool = self._guards.check(*tensors)", "known = True"),
        ("fewer tensors fit", " or len(tensors) != self._count", ""),
    ),
    *engine_mutants(
        "backends/_cast.py",
        ("test_weight_edits_refused.py",),
        (
            "numbers that are not finite are adopted",
            "adopted = differs & finite",
            "adopted = differs",
        ),
        ("a NaN over a number is no edit", "rounded.isnan() & weight.isnan()", "weight.isnan()"),
        (
            "refused elements are counted as adopted",
            "torch.stack([adopted.sum(), (",
            "torch.stack([differs.sum(), (",
        ),
    ),
    *engine_mutants(
        "backends/_cast.py",
        ("test_weight_edits.py",),
        (
            "all masters become their weights",
            "torch.where(adopted, weight.to(master.dtype)",
            "torch.where(finite, weight.to(master.dtype)",
        ),
        (
            "clamped masters are edits",
            "cast_into([master], [rounded], zero, zero.clone())",
            "rounded.copy_(master)",
        ),
    ),
    *engine_mutants(
        "backends/_cast.py",
        ("test_external_edits.py",),
        (
            "a NaN of other bits is an edit",
            "& (rounded.isnan() & weight.isnan()).logical_not()",
            "",
        ),
    ),
]
EDITS = [
    *engine_mutants(
        "masters/weight_edits.py",
        ("test_wrapped_memory.py",),
        (
            "what is loaded into shards is not seen",
            '(self._rule == "adopt" and self._masters.any_sharded)',
            "False",
        ),
    ),
    *engine_mutants(
        "masters/weight_edits.py",
        ("test_weight_edits_in_updates.py",),
        (
            "an update looks at no weight",
            "if not self._looks_at_all:\n            return None",
            "if self._rule:\n            return None",
        ),
        ("a pass looks at what an update reads", "set(map(id, later))", "set[int]()"),
        ("what old plans counted is forgotten", "if not c.is_over]", "if c is None]"),
        (
            "what was overwritten is told as if it were there",
            "stale_weights(self._masters, refused) if refused else []",
            "list(refused)",
        ),
    ),
    *engine_mutants(
        "masters/weight_edits.py",
        ("test_weight_edits_refused.py",),
        (
            '"always" looks as seldom as "adopt"',
            "if not self._looks_at_all:\n            return self._masters.written()",
            "if self._rule:\n            return self._masters.written()",
        ),
        ("what was refused counts as fitting", "self._masters.suspect(left)", "pass"),
        ("counts are told again", "        self._known = now\n", ""),
        (
            "ranks may start from different masters",
            "if not began and several_ranks():",
            "if began and several_ranks():",
        ),
        (
            "refused elements are not told of",
            "                if kept_out:",
            "                if took and kept_out:",
        ),
    ),
    *engine_mutants(
        "masters/weight_edits.py",
        ("test_external_edits.py",),
        ('"raise" lets edits pass', 'if self._rule == "raise" else', "if not self._rule else"),
    ),
    *engine_mutants(
        "masters/weight_edits.py",
        ("test_weight_edits.py",),
        ("it is said in every step", "self._warned.update(adopted)", "pass"),
        (
            "counts are of no parameter in particular",
            "found = counts.found if whole",
            "found = counts.found if places",
        ),
    ),
    *engine_mutants(
        "engine/optimizer.py",
        ("test_weight_edits.py",),
        ("a step adopts nothing", _LATE_STEP, _LATE_STEP.splitlines()[0]),
    ),
    *engine_mutants(
        "engine/optimizer.py",
        ("test_weight_edits_refused.py",),
        ("a step with a closure adopts nothing before it", _CLOSURE, _CLOSURE.splitlines()[0]),
        ("what a closure writes is not adopted", _EVALUATION, _EVALUATION.splitlines()[0]),
    ),
    *engine_mutants(
        "engine/optimizer.py",
        ("test_weight_edits_in_updates.py",),
        ("what an update refused is told in a later step", "self._edits.hear()", "pass"),
    ),
    *engine_mutants(
        "engine/paths.py",
        ("test_weight_edits_in_updates.py",),
        (
            "a closure is preceded by a pass",
            """params = [param for group""",
            """params = [param for group in [] for group""",
        ),
    ),
    *engine_mutants(
        "engine/optimizer.py",
        ("test_external_edits.py",),
        ("a step with a closure goes on from a foreign state", _CLOSURE.splitlines()[0], "pass"),
    ),
]
SHARED = [
    *engine_mutants(
        "masters/shared.py",
        ("test_shared_masters.py",),
        (
            "two holders share nothing",
            "if len(link.holders) > 1:\n            for",
            "if len(link.holders) > 2:\n            for",
        ),
        (
            "a later optimizer makes its own master",
            "master = None if link is None else link.master",
            "master = None",
        ),
        ("a master of another shape is shared", "master.shape == param.shape and", ""),
        (
            "whoever wrote, it fits",
            "link is not None and [link.fits_since] == writes_to([param])",
            "link is not None",
        ),
        ("a load is never complete", "link.loaded.clear()  # all have", "pass  # all have"),
        (
            "the first state of two is refused",
            "if loaded and not set(link.loaded) - {sharing}:",
            "if False:",
        ),
        ("the second state of two replaces the first", _LOADED, "if loaded:"),
        ("a pickle needs mpcore", "return OrderedDict, ()", "return MasterLink, (torch.zeros(0),)"),
        ("a load is not told to the other one", "link.fits_since = NEVER", "pass"),
    ),
    *engine_mutants(
        "masters/masters.py",
        ("test_shared_masters.py",),
        (
            "a master that others hold counts as fitting",
            "writes_to([param]) if is_new else [SUSPECT]",
            "writes_to([param])",
        ),
        (
            "a shared master that was replaced is two",
            "            self._master_of[param] = shared",
            "            pass",
        ),
        (
            "its new value stays here",
            '            self.held.overwrite(param, shared, {"master": new})',
            "            pass",
        ),
        ("a load is the load of one", "self.sharing.note_loaded(param)", "pass"),
        (
            "a load gives each its own master",
            "if self.sharing.others(param) is None:",
            "if True:",
        ),
    ),
    *engine_mutants(
        "masters/kept_masters.py",
        ("test_shared_masters.py",),
        (
            "steps of the other one are compared",
            "if self.sharing.links:\n            self.sharing.note()",
            "if False:\n            self.sharing.note()",
        ),
        (
            "masters from elsewhere fit for the other one",
            "self.sharing.suspects(NEVER) if self.sharing.links else []",
            "[]",
        ),
        ("a doubt is told to nobody", "            self.sharing.doubt(param)", "            pass"),
    ),
]
REPLACED = [
    *engine_mutants(
        "masters/masters.py",
        ("test_replaced_parameters.py",),
        (
            "a moved master stays a moment",
            "upcast(self.held.without_parts(state))\n        shown",
            "upcast(state)\n        shown",
        ),
        (
            "a moved master is left behind",
            "moved if value is None else {}",
            "{} if value is None else moved",
        ),
        ("masters are never let go", "        if not gone:\n", "        if gone or not gone:\n"),
        (
            "places move without what was seen",
            "self._seen = [seen[param] for param in self._master_of]",
            "del self._seen[len(self._master_of) :]",
        ),
    ),
    *engine_mutants(
        "masters/masters.py",
        ("test_state_edits.py",),
        (
            "masters go with their state",
            "{*shown, *(p for group",
            "{*shown, *(p for group in () for group",
        ),
    ),
    *engine_mutants(
        "masters/masters.py",
        ("test_external_edits.py",),
        (
            "a loaded master needs no weight of its own",
            "self._seen = [NEVER] *",
            "self._seen = [SUSPECT] *",
        ),
    ),
    *engine_mutants(
        "masters/weights.py",
        ("test_weight_edits_refused.py",),
        (
            "masters lose their digits to weights",
            "value if exact else torch.where(",
            "value if not exact else torch.where(",
        ),
    ),
    *engine_mutants(
        "engine/saving.py",
        ("test_replaced_parameters.py",),
        (
            "a state left behind is saved as if it were known",
            "isinstance(key, Tensor) and id(key) not in known",
            "isinstance(key, Tensor) and not known",
        ),
    ),
    *engine_mutants(
        "masters/shown_state.py",
        ("test_state_of_any_kind.py",),
        (
            "a state that changed its parameter is not seen",
            "are_same(shown, self._owners)",
            "len(shown) == len(self._owners)",
        ),
        (
            "a value that changed its name is not seen",
            "list(chain.from_iterable(states)) == self._names",
            "len(list(chain.from_iterable(states))) == len(self._names)",
        ),
    ),
    *engine_mutants(
        "masters/held_moments.py",
        ("test_replaced_parameters.py",),
        (
            "kernels read behind a moment",
            "if moment.shape != like.shape:",
            "if moment.ndim != like.ndim:",
        ),
    ),
    *engine_mutants(
        "engine/fused_path.py",
        ("test_state_edits.py",),
        (
            "a clip plans over edits of the state",
            "        self._masters.take_over_values()  # making",
            "        # making",
        ),
    ),
]
TABLES = engine_mutants(
    "precision/islands.py",
    ("test_cast_model_keep.py",),
    (
        "bags of embeddings are cast",
        "tables = (nn.Embedding, nn.EmbeddingBag)",
        "tables = nn.Embedding",
    ),
    (
        "tables without a bound are kept",
        "isinstance(module, tables) and module.max_norm is not None",
        "isinstance(module, tables)",
    ),
    ("tables with a bound are cast", "module.max_norm is not None", "module.max_norm is None"),
)

WEIGHTS = [*ADOPT, *EDITS, *SHARED, *REPLACED, *TABLES]
