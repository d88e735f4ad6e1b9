"""Just enough of Kubernetes quantities to add and compare them; what the API stores is valid and canonical."""

from __future__ import annotations

import functools
from fractions import Fraction

_SUFFIXES = {
    "Ki": Fraction(1 << 10), "Mi": Fraction(1 << 20), "Gi": Fraction(1 << 30),
    "Ti": Fraction(1 << 40), "Pi": Fraction(1 << 50), "Ei": Fraction(1 << 60),
    "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000),
    "k": Fraction(10**3), "M": Fraction(10**6), "G": Fraction(10**9), "T": Fraction(10**12), "P": Fraction(10**15), "E": Fraction(10**18),
}  # fmt: skip


@functools.lru_cache(maxsize=512)
def milli(text: str) -> int:
    """The quantity in thousandths, rounded up; ValueError for anything else."""
    for length in (2, 1):
        factor = _SUFFIXES.get(text[-length:])
        if factor is not None and len(text) > length:
            exact = Fraction(text[:-length]) * factor * 1000
            break
    else:
        exact = Fraction(text) * 1000  # "1e3" too
    return -(-exact.numerator // exact.denominator)
