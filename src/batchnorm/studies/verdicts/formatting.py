"""Numbers as people read them: sensible digits, a unit, and a dash where there is no number."""

from __future__ import annotations

import math
from typing import Protocol

from batchnorm.studies.settings import shown_number

from .results import Sample

MISSING = "–"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"


class Show(Protocol):
    """The text of a quantity; `like` makes it match another value's unit and decimals."""

    def __call__(self, value: float, like: float | None = None, /) -> str:
        """Returns the value in words, or a dash."""


def percent(fraction: float, _: float | None = None, /) -> str:
    """0.9512 -> "95.1 %"."""
    return f"{_fixed(100 * fraction, 1)}{SPACE}%" if math.isfinite(fraction) else MISSING


def points(fraction: float, _: float | None = None, /) -> str:
    """0.0123 -> "+1.2 points": a difference between two percentages."""
    return f"{_fixed(100 * fraction, 1, sign=True)}{SPACE}points" if math.isfinite(fraction) else MISSING


def count(value: float, _: float | None = None, /) -> str:
    """1234.4 -> "1,234"."""
    return _fixed(value, 0) if math.isfinite(value) else MISSING


def times(ratio: float, like: float | None = None, /) -> str:
    """2.914 -> "2.9", 0.1234 -> "0.12", 1234.5 -> "1,200": a ratio, to two digits."""
    return significant(ratio, 2, like)


def significant(value: float, digits: int, like: float | None = None) -> str:
    """Returns the value to a number of significant digits, in powers of ten far from 1."""
    if not math.isfinite(value):
        return MISSING
    measure = value if like is None else like
    if measure == 0:
        return "0" if value == 0 else significant(value, digits)
    exponent = math.floor(math.log10(abs(float(f"{measure:.{digits - 1}e}"))))
    if exponent < -4 or exponent > 6:
        mantissa = _fixed(value / 10.0**exponent, digits - 1)
        return f"{mantissa}{SPACE}×{SPACE}10{_superscript(exponent)}"
    rounded = round(value, digits - 1 - exponent)
    return _fixed(rounded, max(0, digits - 1 - exponent))


def power_of_ten(value: float) -> str:
    """0.001 -> "10⁻³": a label on a logarithmic axis."""
    return f"10{_superscript(round(math.log10(value)))}" if value > 0 else MISSING


def rate(value: float) -> str:
    """0.001 -> "0.001", 3e-5 -> "3e−05": a learning rate."""
    return shown_number(value).replace("-", MINUS) if math.isfinite(value) else MISSING


def duration(seconds: float, like: float | None = None, /) -> str:
    """0.00045 -> "0.450 ms": three digits, in the unit that fits."""
    if not math.isfinite(seconds):
        return MISSING
    measure = abs(seconds if like is None else like)
    size, unit = (
        (1.0, "s") if measure >= 1 or not measure else (1e-3, "ms") if measure >= 1e-4 else (1e-6, "µs")
    )
    return f"{significant(seconds / size, 3, measure / size)}{SPACE}{unit}"


def milliseconds(seconds: float, like: float | None = None, /) -> str:
    """0.00045 -> "0.450": the unit stands elsewhere, such as in the head of a table."""
    return significant(seconds * 1e3, 3, None if like is None else like * 1e3)


def megabytes(size: float, like: float | None = None, /) -> str:
    """123456 bytes -> "0.123 MB", where 1 MB is 1,000,000 bytes."""
    text = significant(size / 1e6, 3, None if like is None else like / 1e6)
    return f"{text}{SPACE}MB" if math.isfinite(size) else MISSING


def spread(sample: Sample, show: Show) -> str:
    """Returns mean ± standard deviation in one unit: "95.1 ± 0.3 %"; for one value, only that."""
    mean, std = sample.mean, sample.std
    if not (math.isfinite(mean) and math.isfinite(std)):
        return show(mean)
    return span(show(mean), show(std, mean).lstrip("+"), f"{SPACE}±{SPACE}")


def span(first: str, second: str, link: str) -> str:
    """Returns two numbers with a link between, and their unit once: "+0.4 to +1.6 points"."""
    number, _, unit = first.partition(SPACE)
    return f"{number if second.endswith(f'{SPACE}{unit}') else first}{link}{second}"


def listed(items: list[str], link: str = "and") -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return f" {link} ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def counted(number: int, noun: str) -> str:
    """(1, "seed") -> "1 seed", (3, "seed") -> "3 seeds"."""
    return f"{number:,}{SPACE}{noun}" + ("" if number == 1 else "s")


def _fixed(value: float, decimals: int, *, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    if not any(digit in text for digit in "123456789"):  # no "-0.0", no "+0.0"
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
