"""What `--json` prints: results as plain objects, every number as it was measured."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mpcore.comparison.result import Comparison
from mpcore.monitoring.run_log import RunLog


def to_json(value: Any) -> str:
    """Returns JSON that every reader takes: what is not finite is null.

    Example:
        >>> print(to_json({"loss": float("inf"), "steps": (1, 2)}))
        {
          "loss": null,
          "steps": [
            1,
            2
          ]
        }
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison_facts(result: Comparison, seeds: Sequence[int], report: str) -> dict[str, Any]:
    """Returns what a comparison found.

    Args:
        result: The runs of the seeds that are complete.
        seeds: That were asked for.
        report: Where its page is.
    """
    done = [run.seed for run in result.of(result.labels[0])]
    return {
        "metric": result.metric,
        "higher_is_better": result.higher_is_better,
        "margin": result.margin,
        "seeds": done,
        "seeds_missing": [seed for seed in seeds if seed not in done],
        "policies": [_policy_facts(result, label) for label in result.labels],
        "warnings": result.warnings,
        "report": report,
    }


def _policy_facts(result: Comparison, label: str) -> dict[str, Any]:
    runs = result.of(label)
    found = result.agreements.get(label)
    times = [run.seconds for run in runs if run.seconds is not None]
    memory = next((run.memory for run in runs if run.memory is not None), None)
    return {
        "policy": label,
        "metrics": [run.metric for run in runs],
        "verdict": None if found is None else found.name,
        "difference": None if found is None else found.difference,
        "interval": None if found is None else found.interval,
        "p": None if found is None else found.p,
        "text": None if found is None else found.text,
        "skipped_steps": [len(run.log.skipped) for run in runs],
        "median_step_s": statistics.median(times) if times else None,
        "bytes_per_param": None if memory is None else memory.per_parameter,
        "activation_bytes": runs[0].activations,
    }


def run_facts(log: RunLog) -> dict[str, Any]:
    """Returns what a run comes to, as far as its monitor told."""
    losses, scales = log.losses, log.scales
    last = log.readings[-1] if log.readings else None
    asking = Counter(r.verdict.name for r in log.overflows if not r.verdict.normal)
    return {
        "run": log.name,
        "steps": len(log.steps),
        "skipped_steps": len(log.skipped),
        "last_loss": losses[-1][1] if losses else None,
        "last_loss_scale": scales[-1] if scales else None,
        "headroom_bits": None if last is None else last.headroom_bits,
        "median_step_s": statistics.median(log.seconds) if log.seconds else None,
        "not_normal": dict(asking),
    }
