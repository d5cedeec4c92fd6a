"""Seeded errors in the course of a step: what may follow what."""

from mutant import engine_mutants

COURSE = [
    *engine_mutants(
        "engine/stage_questions.py",
        ("test_leftovers.py",),
        (
            "torn leftovers are none",
            "if collected or self._leftovers.torn or",
            "if collected or",
        ),
        (
            "a step that failed is over",
            "            or self._leftovers.has_failed\n",
            "",
        ),
    ),
    *engine_mutants(
        "engine/stage_questions.py",
        ("test_interruptions_of_others.py",),
        ("half a step is over", "            or self._writes.begun\n", ""),
    ),
    *engine_mutants(
        "engine/stage_questions.py",
        ("test_closures_and_waiting_gradients.py",),
        ("gradients that wait are nobody's", "            or self.waiting.exist\n", ""),
    ),
]
