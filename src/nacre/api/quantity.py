"""Kubernetes quantities (apimachinery, resource.Quantity): "100m", "1.5Gi", "2e3"; parsed to whole nano-units, printed canonically."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

NANO = 10**9
PATTERN = "^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$"
_MOST = Fraction((1 << 63) - 1)  # what is more, Kubernetes takes for this
_NUMBER = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(.*)")
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]{1,3})")
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


class NotAQuantity(ValueError):
    """Carries Kubernetes' sentence."""

    def __init__(self) -> None:
        super().__init__(f"quantities must match the regular expression '{PATTERN}'")


@functools.lru_cache(maxsize=512)
def nano(text: str) -> int:
    """The quantity in nano-units, rounded up; raises NotAQuantity."""
    return _parse(text)[0]


def canonical(text: str) -> str:
    """The quantity as Kubernetes writes it back: no fraction, the largest suffix of the family used; raises NotAQuantity."""
    value, family = _parse(text)
    if value == 0:
        return "0"
    sign, value = ("-" if value < 0 else ""), abs(value)
    if family == "binary" and value % NANO == 0 and value >= 1024 * NANO:
        whole = value // NANO
        suffix, shift = max((entry for entry in _BINARY.items() if whole % (1 << entry[1]) == 0), key=_second, default=("", 0))
        return f"{sign}{whole >> shift}{suffix}"
    suffix, power = max((entry for entry in _DECIMAL.items() if value % 10 ** (entry[1] + 9) == 0), key=_second)
    if family == "exponent":
        suffix = f"e{power}" if power else ""
    return f"{sign}{value // 10 ** (power + 9)}{suffix}"


def total(*texts: str) -> str:
    """The sum, in the family of the first."""
    value, family = sum(nano(text) for text in texts), _parse(texts[0])[1]
    if family == "binary" and value % NANO == 0:
        return canonical(f"{value // NANO // 1024}Ki") if value % (1024 * NANO) == 0 else str(value // NANO)
    return canonical(f"{value}n")


def _second(entry: tuple[str, int]) -> int:
    return entry[1]


def _parse(text: str) -> tuple[int, str]:
    """(nano-units, family: "binary", "decimal" or "exponent")."""
    match = _NUMBER.fullmatch(text) if len(text) < 64 else None
    if match is None:
        raise NotAQuantity
    number, suffix = Fraction(match[1] if not match[1].endswith(".") else match[1] + "0"), match[2]
    if suffix in _BINARY:
        scaled, family = number * (1 << _BINARY[suffix]), "binary"
    elif suffix in _DECIMAL:
        scaled, family = number * Fraction(10) ** _DECIMAL[suffix], "decimal"
    elif exponent := _EXPONENT.fullmatch(suffix):
        scaled, family = number * Fraction(10) ** int(exponent[1]), "exponent"
    else:
        raise NotAQuantity
    exact = max(-_MOST, min(scaled, _MOST)) * NANO
    return -(-exact.numerator // exact.denominator) if exact > 0 else exact.numerator // exact.denominator, family
