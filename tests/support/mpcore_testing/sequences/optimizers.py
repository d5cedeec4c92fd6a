"""What the optimizers of the sequences compute, from their papers; NumPy alone, in float64.

moments    by the name that torch gives them in an optimizer's state
count      how many updates a parameter has had
"""

from __future__ import annotations

from mpcore_testing.sequences.numbers import Near

#: Learning rate of the first param group; the second one has half of it.
RATES = {"SGD": 0.05, "AdamW": 0.02, "Adagrad": 0.1, "Lion": 0.01, "RMSprop": 0.01}
DECAY = {"SGD": 0.01, "AdamW": 0.1, "Adagrad": 0.0, "Lion": 0.1, "RMSprop": 0.0}
MOMENTUM, BETAS, ALPHA, RATE_DECAY = 0.9, (0.9, 0.95), 0.9, 0.01
#: Moments of each, and which of them counts its updates for everybody to see.
MOMENTS = {
    "SGD": ("momentum_buffer",),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adagrad": ("sum",),
    "Lion": ("exp_avg",),
    "RMSprop": ("square_avg",),
}
COUNTS = {"AdamW", "Adagrad", "RMSprop"}


def update(
    name: str, weight: Near, moments: list[Near], grad: Near, rate: float, count: int
) -> tuple[Near, list[Near]]:
    """The weight and the moments after update number `count`, from 1."""
    decay = DECAY[name]
    if name == "SGD":
        grad = grad + weight * decay
        velocity = grad if count == 1 else moments[0] * MOMENTUM + grad
        return weight - velocity * rate, [velocity]
    if name == "Adagrad":
        total = moments[0] + grad * grad
        rate = rate / (1 + (count - 1) * RATE_DECAY)
        return weight - grad * rate / (total.sqrt() + 1e-10), [total]
    if name == "RMSprop":
        square = moments[0] * ALPHA + grad * grad * (1 - ALPHA)
        return weight - grad * rate / (square.sqrt() + 1e-8), [square]
    first, second = BETAS
    if name == "Lion":
        direction = (moments[0] * first + grad * (1 - first)).sign()
        mean = moments[0] * second + grad * (1 - second)
        return weight * (1 - rate * decay) - direction * rate, [mean]
    mean = moments[0] * first + grad * (1 - first)
    square = moments[1] * second + grad * grad * (1 - second)
    root = square.sqrt() * (1 / (1 - second**count) ** 0.5) + 1e-8
    step = mean * (rate / (1 - first**count)) / root
    return weight * (1 - rate * decay) - step, [mean, square]
