"""A rank that ends: the others hear of it, nothing of the step was written, and they can go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpcore_testing import rank_faults
from mpcore_testing.rank_faults import CALLS, advance, training
from mpcore_testing.ranks import OF_RANKS, run_ranks

pytestmark = OF_RANKS
WHAT = {
    "step": "what ranks found in their gradients",
    "clip_grad_norm_": "what ranks found in their gradients",
    "accumulate": "which sums of gradients ranks have",
}


def test_the_others_are_told_and_go_on_without_it(tmp_path: Any, monkeypatch: Any) -> None:
    run_ranks(rank_faults.__file__, tmp_path, count=2 + len(CALLS))
    monkeypatch.setattr("mpcore.Ranks", lambda *_: None)  # the same in one process
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for call, (message, before, after, resumed) in zip(CALLS, found, strict=True):
            assert f"step 2, {WHAT[call]}: expected an answer of all 3 ranks" in message
            assert after == before
            params, optimizer = training(None)
            advance(optimizer, params, call)
            assert [p.tolist() for p in params] == before["weights"]
            advance(optimizer, params, call)
            masters = [optimizer.state[p]["master"].tolist() for p in params]
            assert resumed["masters"] == [pytest.approx(m, rel=1e-6) for m in masters]
            assert resumed["counters"] == (2, 0)
