"""Errors in what scalers, monitors and trainers' plugins do to an optimizer that they drive."""

from mutant import engine_mutants

DRIVERS = [
    *engine_mutants(
        "engine/drivers.py",
        ("test_monitor_accumulation_elsewhere.py", "test_monitor_driven.py"),
        ("losses are told twice", "and not watcher.has_losses", ""),
        ("wrappers in wrappers are not opened", "_DEEPEST = 4", "_DEEPEST = 2"),
    ),
    *engine_mutants(
        "engine/drivers.py",
        ("test_trainer_monitors.py",),
        (
            "Lightning's copy is taken for the optimizer",
            "found = held if isinstance(held, MixedPrecisionOptimizer) else found",
            "found = found or (held if isinstance(held, MixedPrecisionOptimizer) else None)",
        ),
    ),
    *engine_mutants(
        "amp/scaled_losses.py",
        ("test_monitor_driven.py",),
        ("what is added up in place is told", "outputs.detach().clone()", "outputs.detach()"),
        ("losses of all iterations are told", "self._losses.clear()", "pass"),
        ("one iteration alone is told of", "self._told.clear()", "pass"),
    ),
    *engine_mutants(
        "amp/watched_steps.py",
        ("test_grad_scaler_watched.py",),
        (
            "a skip calls what was put in place",
            "type(optimizer).step(optimizer) if skipped else",
            "type(optimizer).step(optimizer) if False else",
        ),
        (
            "torch's schedulers are taken for a trainer",
            "return written_in != torch.optim.lr_scheduler.__name__ and",
            "return",
        ),
    ),
    *engine_mutants(
        "integrations/lightning.py",
        ("test_trainer_lightning.py",),
        ("the loss is not scaled", "tensor = optimizer.scale(tensor)", "pass"),
        ("hooks see scaled gradients", "_unscale(optimizer)\n        self._after", "self._after"),
        ("clips act on scaled gradients", "_unscale(_raw(optimizer))", "pass"),
    ),
]
