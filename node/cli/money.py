"""Amounts as people read them: exact TALLY, trailing zeros trimmed, never through a float; rounded only by name."""

from __future__ import annotations

from protocol.units import WEI_PER_TALLY

_DECIMALS = len(str(WEI_PER_TALLY)) - 1


def tally(wei: int) -> str:
    """`1500000000000000000` -> `1.5`. Exact, with at most 18 decimals."""
    whole, rest = divmod(abs(wei), WEI_PER_TALLY)
    decimals = f"{rest:0{_DECIMALS}d}".rstrip("0")
    return f"{'-' if wei < 0 else ''}{whole}{'.' + decimals if decimals else ''}"


def amount(wei: int) -> str:
    """`1.5 TALLY`."""
    return f"{tally(wei)} TALLY"


def rounded_up(wei: int, digits: int = 6) -> str:
    """For columns to compare by: at most so many significant digits, rounded up. `94753466872110940` -> `0.0947535`."""
    step = 10 ** max(0, len(str(wei)) - digits)
    return tally(-(-wei // step) * step)


def per_million(wei_per_token: int) -> str:
    """A price per token as TALLY per million tokens: `400000000000` -> `0.4`."""
    return tally(wei_per_token * 1_000_000)
