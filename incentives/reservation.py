"""Capacity bought ahead: what it costs, what of that is earned, and how fast a right may be used. Pure.

The equations of contracts/src/IReservations.sol, and a token bucket: a right to R micro-STE per second fills at R,
holds `BURST_S` seconds of it, and each job takes what it may come to. A job larger than the bucket waits for a full one
and is paid off afterwards, so that every job can be served and none makes the right worth more than it is:

    used in any interval of t seconds <= R * t + max(BURST_S * R, largest job)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from protocol.errors import TallyError
from protocol.units import Wei

BURST_S: Final = 60
"""How much unused right is saved up. Unit: s of its rate. Doubling it lets a holder that paused for two minutes take
twice as much at once from slots that others use; halving it makes interactive use, which comes in bursts, wait."""

HORIZON: Final = 512
"""How far ahead capacity is sold, the running period included. Unit: periods. The contract's own bound."""

MICRO: Final = 1_000_000
"""Micro-STE in an STE."""

_MILLI: Final = 1_000  # a bucket counts micro-STE x 1000, so that a millisecond at any rate is a whole number


@dataclass
class RateExceeded(TallyError):
    """The right is used up for now. `wait_ms`: until the job fits, if nothing else takes from the bucket meanwhile."""

    ste_micro: int
    rate: int
    wait_ms: int

    def __str__(self) -> str:
        return (
            f"the reservation gives {self.rate} micro-STE per second and is used up; a job of {self.ste_micro} "
            f"micro-STE fits again in {self.wait_ms} ms"
        )


def per_period_up(rate: int, period_s: int, price: int) -> Wei:
    """Wei for one period, rounded up. `rate`: micro-STE per second. `price`: wei per STE."""
    return Wei(-(-rate * period_s * price // MICRO))


def earned_down(per_period: int, seconds: int, period_s: int) -> Wei:
    """Wei that became the provider's `seconds` after the start, rounded down."""
    return Wei(per_period * seconds // period_s)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A right's use so far. `rate`: micro-STE per second, above zero. `at_ms`: when `level` was true.

    `level`: micro-STE x 1000 that may be taken at once; below zero while a job larger than the bucket is paid off.
    """

    rate: int
    level: int
    at_ms: int

    @classmethod
    def full(cls, rate: int, now_ms: int) -> Bucket:
        """The bucket of a right that was not used lately."""
        return cls(rate, rate * BURST_S * _MILLI, now_ms)

    def at(self, now_ms: int) -> Bucket:
        """Filled up to now; a clock that ran backwards fills nothing."""
        passed = max(0, now_ms - self.at_ms)
        return replace(self, level=min(self._size, self.level + self.rate * passed), at_ms=max(self.at_ms, now_ms))

    def take(self, ste_micro: int, now_ms: int) -> Bucket:
        """With a job of at most `ste_micro` running. Raises: RateExceeded."""
        now = self.at(now_ms)
        missing = min(ste_micro * _MILLI, self._size) - now.level
        if missing > 0:
            raise RateExceeded(ste_micro, self.rate, -(-missing // self.rate))
        return replace(now, level=now.level - ste_micro * _MILLI)

    def give_back(self, ste_micro: int, now_ms: int) -> Bucket:
        """With what a job took and did not use."""
        now = self.at(now_ms)
        return replace(now, level=min(self._size, now.level + ste_micro * _MILLI))

    @property
    def _size(self) -> int:
        return self.rate * BURST_S * _MILLI
