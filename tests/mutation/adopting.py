"""Errors in the kernel that makes weights which somebody else wrote to masters."""

from mutant import mutants

_BOTH_NAN = "differs = (weight != expected) & (both_nan == 0)"

ADOPT = mutants(
    "adopt.py",
    ("test_adopt.py",),
    ("a NaN of other bits counts as written", _BOTH_NAN, "differs = weight != expected"),
    (
        "the weight is compared with its unclamped master",
        "expected = narrow(rounded, WEIGHT)",
        "expected = narrow(widen(bits, MASTER), WEIGHT)",
    ),
    (
        "numbers that are not finite are adopted",
        "adopted = differs & (refused == 0)",
        "adopted = differs",
    ),
    (
        "adopted and refused are counted in each other's place",
        "adopted.to(tl.int32) + refused.to(tl.int32) * REFUSED",
        "adopted.to(tl.int32) * REFUSED + refused.to(tl.int32)",
    ),
    (
        "the masked store is one too short",
        "mask=offsets < count - at)",
        "mask=offsets < count - at - 1)",
    ),
    ("counts are overwritten", "tl.atomic_add(counter, (", "tl.atomic_xchg(counter, ("),
    ("counts go to the row of another tensor", "counts_ptr + 2 * index", "counts_ptr + index"),
    (
        "masters may overlap weights",
        'check_no_overlap("masters", masters, "weights", weights)',
        "pass",
    ),
)
