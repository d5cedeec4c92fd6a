"""What `mpcore.GradScaler` is made of: torch's protocol over the rules of `mpcore.loss_scale`.

Start with `grad_scaler.py`. Its face is what is imported here.
"""

from __future__ import annotations

from mpcore.amp.grad_scaler import GradScaler

__all__ = [
    "GradScaler",
]
