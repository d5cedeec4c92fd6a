"""Update rules: one file for each optimizer.

A rule is a sequence of elementary operations, each rounded to nearest even, in the order in which
it is written: no contraction, `tl.div_rn` and `tl.sqrt_rn` for divisions and roots of float32.

    scalars(numbers, t)                      float64 -> float32, once per tensor and step
    apply(grad, param, moments, scalars)     float32, once per element

Adding an optimizer takes a file with those two functions and a line in `RULES`.
"""

from __future__ import annotations

from mpcore_kernels.rules._rule import Rule as Rule
from mpcore_kernels.rules.adagrad import ADAGRAD
from mpcore_kernels.rules.adam import ADAM
from mpcore_kernels.rules.lion import LION
from mpcore_kernels.rules.sgd import SGD

#: every rule by its name, in the order in which the audit shows them
RULES = {rule.name: rule for rule in (ADAM, SGD, ADAGRAD, LION)}
