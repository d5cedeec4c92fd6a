"""Errors in how moments lie in memory, what is drawn for them, and weights without masters."""

from mutant import engine_mutants

MOMENTS = [
    *engine_mutants(
        "masters/held_moments.py",
        ("test_compact_moments.py",),
        ("every parameter draws the same", "key_of(self.seed, n)", "key_of(self.seed, 0)"),
        ("the seed is not asked", "key_of(self.seed, n)", "key_of(0, n)"),
        (
            "second moments have a sign",
            "negative=name not in rule.never_negative",
            "negative=True",
        ),
        (
            "a backend is not told of the stores",
            "if not self.are_random(batch.store, kept):",
            "if True:",
        ),
    ),
    *engine_mutants(
        "masters/held_moments.py",
        ("test_compact_edits.py",),
        ("a moment that is there begins anew", "    if moment is None:", "    if True:"),
        ("scales are not written", "        held_here(scales).copy_(new)", "        pass"),
        (
            "codes without scales are numbers",
            "if scales is None and moment.dtype in _CODES:",
            "if False:",
        ),
        (
            "a float32 moment in the place of codes is copied",
            "    _encode(state, name, like, held_here(sharded_like(like, moment)).float(), to)",
            "    state[name] = moment.to(to.dtype)",
        ),
    ),
    *engine_mutants(
        "masters/held_moments.py",
        ("test_compact_checkpoints.py",),
        (
            "keys are saved in float32 states",
            "others = {RANDOM_KEY, *map(scales_of, state)}",
            "others = {*map(scales_of, state)}",
        ),
        (
            "scales are saved in float32 states",
            "others = {RANDOM_KEY, *map(scales_of, state)}",
            "others = {RANDOM_KEY}",
        ),
        ("keys of a state are made anew", "state.setdefault(RANDOM_KEY, key", "(key"),
    ),
    *engine_mutants(
        "masters/held_moments.py",
        ("test_compact_ranks.py",),
        ("every shard draws like the first", "start * math.prod(shape[dim + 1 :])", "0"),
    ),
    *engine_mutants(
        "masters/scales.py",
        ("test_compact_ranks.py",),
        ("columns have blocks", "place.is_replicate() or place.is_shard(0)", "True"),
    ),
    *engine_mutants(
        "masters/step_plan.py",
        ("test_compact_moments.py",),
        (
            "steps of a rule that counts none are not counted",
            "masters.moments.are_random(store, kept) or rule.counts_steps(names)",
            "rule.counts_steps(names)",
        ),
    ),
    *engine_mutants(
        "masters/packed_masters.py",
        ("test_compact_edits.py",),
        (
            "float16 weights go without masters",
            "param.dtype in SIXTEEN_BIT and param.dtype not in MASTER_STORES[store].weight_dtypes",
            "False",
        ),
        (
            "a cast to float16 goes without masters",
            "        if param.dtype not in self._codec.weight_dtypes:",
            "        if False:",
        ),
    ),
    *engine_mutants(
        "masters/weights.py",
        ("test_compact_edits.py",),
        ("exact zeroes weights", "if exact and beside is not param:", "if exact:"),
    ),
    *engine_mutants(
        "engine/fused_only.py",
        ("test_compact_moments.py",),
        ("a backend that knows float32 steps", "    if backend not in PACKING:", "    if False:"),
        ("a general group is silently kept", "        if reason is not None:", "        if False:"),
        ("the general path is silently not taken", '    if asked == "general":', "    if False:"),
    ),
    *engine_mutants(
        "checkpoint/entries.py",
        ("test_compact_checkpoints.py",),
        ("any scales are loaded", "    if not wanted:", "    if False:"),
        (
            "any key is loaded",
            "type(value) is int and 0 <= value < 2**64",
            "True",
        ),
    ),
    *engine_mutants(
        "monitoring/update_sample.py",
        ("test_compact_edits.py",),
        ("updates of weights without masters count", 'masters.held.store == "none"', "False"),
    ),
    *engine_mutants(
        "monitoring/memory.py",
        ("test_compact_edits.py",),
        ("scales take no memory", "elif name in scales:", "elif False:"),
    ),
]
