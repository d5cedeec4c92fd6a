"""Errors in what a monitor says, and where it says it."""

from mutant import engine_mutants

WATCHING = [
    *engine_mutants(
        "monitoring/update_sample.py",
        ("test_idle_training.py",),
        (
            "biases of 0 count as training",
            "return not usual or not max(most for most, _ in sizes) < _LOST * min(usual)",
            "return True",
        ),
        (
            "where few masters move none does",
            "return not usual or not max(most for most, _ in sizes) < _LOST * min(usual)",
            "return False",
        ),
        (
            "a weight that is not finite is not seen",
            "            not bad,\n",
            "            True,\n",
        ),
        (
            "parameters without a master say nothing of it",
            "self._moved_usual(now, moved) if self._is_of_all else None",
            "None",
        ),
    ),
    *engine_mutants(
        "monitoring/reading_warnings.py",
        ("test_idle_training.py",),
        (
            "each reading warns again",
            "                self._told.add(kind)\n",
            "",
        ),
        ("averages are not looked at", 'if "average" not in self._told:', "if False:"),
        ("weights are not looked at", "if not (moves.finite or", "if not (True or"),
    ),
    *engine_mutants(
        "monitoring/idle_training.py",
        ("test_idle_training.py",),
        (
            "a learning rate of 0 is an alarm",
            "if moved is not False or not rate or",
            "if moved is not False or",
        ),
        (
            "a loss of 0 is an alarm",
            "if loss is not None and loss != 0]",
            "if loss is not None]",
        ),
        ("two readings are enough", "READINGS = 3", "READINGS = 3\nSTEPS = 8"),
        (
            "skips of the optimizer's own scale are told twice",
            "None if own_scale else _only_skips(past[-SKIPS:])",
            "None",
        ),
    ),
    *engine_mutants(
        "monitoring/standing_averages.py",
        ("test_standing_averages.py",),
        (
            "frozen copies are averages",
            "away.isfinite() & (away * updates > _OVERDUE)",
            "away.isfinite()",
        ),
        ("an average that moves stands", "(values == copy.values)", "(values == values)"),
    ),
    *engine_mutants(
        "monitoring/sinks.py",
        ("test_trackers.py",),
        (
            "a course has one step",
            "yield record.step + i, finite",
            "yield record.step, finite",
        ),
        (
            "what is not finite is logged",
            "if math.isfinite(v)}",
            "}",
        ),
        (
            "histograms lie a bin lower",
            "[mid + 0.5 for mid in mids]",
            "[mid - 0.5 for mid in mids]",
        ),
        (
            "edges begin at 0",
            "list(range(LOWEST, HIGHEST + 2))",
            "list(range(HIGHEST - LOWEST + 2))",
        ),
        (
            "Weights & Biases has a step of its own",
            '{f"{self._prefix}/step": step, **found}',
            "found",
        ),
        ("no histogram", "if add is not None and", "if add is None and"),
    ),
    *engine_mutants(
        "monitoring/monitor.py",
        ("test_idle_training.py",),
        (
            "warnings come before records",
            "            self._emit(self.reading)  # first: a warning may be an error\n",
            "            self._warnings.look(self.reading, past, moves, own_scale=own_scale)\n"
            "            self._emit(self.reading)\n",
        ),
    ),
    *engine_mutants(
        "monitoring/rank_readings.py",
        ("test_rank_monitors.py",),
        (
            "copies count twice",
            "counted = [part for part in parts if part.counts] or parts[:1]",
            "counted = parts",
        ),
        (
            "stages are one parameter",
            "if len(counted) < 2 or values == math.prod(counted[0].finding.shape):",
            "if True:",
        ),
        (
            "pieces on several meshes are several parameters",
            "or values == math.prod(counted[0].finding.shape):",
            "or counted[0].mesh == counted[-1].mesh:",
        ),
        ("a piece counts like the whole", "held_here(param.detach()).numel()", "param.numel()"),
        ("losses are added up", "math.fsum(losses) / len(losses)", "math.fsum(losses)"),
    ),
    *engine_mutants(
        "monitoring/activation_watch.py",
        ("test_activation_watch.py",),
        ("passes that run again count", " or torch._C._current_graph_task_id() != -1", ""),
        ("evaluation counts", "not module.training or ", ""),
        ("what is handed on counts twice", "tensor is self._last or not", "not"),
        (
            "wrappers are counted",
            "and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)",
            "",
        ),
        ("hooks stay", "            hook.remove()\n", "            pass\n"),
        ("copies are watched", "return _unwatched, ()", "return _Hook, (self._see,)"),
        (
            "what is found is that of the last pass",
            "self.found = added(self.found, new)",
            "self.found = new",
        ),
    ),
    *engine_mutants(
        "monitoring/monitor.py",
        ("test_activation_watch.py",),
        (
            "the second reading has none",
            "        self._activations.arm(self._reads_now())  # the next one\n",
            "",
        ),
    ),
]
