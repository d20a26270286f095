"""What serving brings and costs one provider: revenue, energy, depreciation, utilisation, break-even price.

All from its own journal and its own settings, for itself: nothing here enters an offer or a receipt. With period T,
busy time B (at least one job running), idle and busy power P_i, P_b, price per kilowatt hour e, hardware price H over a
lifetime L, work S in STE, and r units of currency to one TALLY,

    energy       = ceil((P_i (T - B) + P_b B) e / 3.6e9)             times in ms, power in W: 1 kWh = 3.6e9 W ms
    depreciation = ceil(H T / L)
    cost         = energy + depreciation
    break-even   = ceil(cost / (S r (1 - fee)))                      wei per STE that a payer must be charged

Money of the currency is in units of 10^-12; amounts of TALLY in wei. Costs and prices to be reached are rounded up,
revenue and shares down. Assumptions: the machine is on for the whole period; its power has two levels; the protocol's
fee is what settlements so far paid; work that nobody paid for costs like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from protocol.units import BPS, WEI_PER_TALLY, Wei

W_MS_PER_KWH: Final = 3_600_000_000
"""Watt milliseconds in a kilowatt hour."""

MICRO: Final = 1_000_000
"""STE are stated in millionths."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The provider's own costs. Powers in W; money in 10^-12 of its currency: per kWh, whole machine, per TALLY.

    `tally_rate` 0: unknown, so that revenue and cost are not compared. `lifetime_s`: seconds, above zero.
    """

    watts_idle: int
    watts_busy: int
    price_per_kwh: int
    hardware_price: int
    lifetime_s: int
    tally_rate: int


@dataclass(frozen=True, slots=True)
class Activity:
    """What was served in a period. `busy_ms`: time with at least one job; `slot_ms`: job durations summed.

    `revenue`: wei of acknowledged receipts. `settled`, `fee`: wei that all settlements so far paid and kept back.
    `gas_wei`: what they cost in the chain's own coin.
    """

    period_ms: int
    busy_ms: int
    slot_ms: int
    slots: int
    jobs: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ste_micro: int
    revenue: Wei
    settled: Wei
    fee: Wei
    gas_wei: int


@dataclass(frozen=True, slots=True)
class Economics:
    """The result. Money in 10^-12 of the currency unless it says wei; None where it is not defined or not known.

    `profit`: revenue after fee less cost, at the stated rate. `price_bps`: break-even as a share of the price obtained.
    """

    energy: int
    depreciation: int
    energy_per_ste: int | None
    depreciation_per_ste: int | None
    revenue_per_ste_wei: Wei | None
    busy_bps: int
    slots_bps: int
    cached_bps: int
    fee_bps: int
    break_even_wei: Wei | None
    price_bps: int | None
    profit: int | None

    @property
    def cost(self) -> int:
        """Energy and depreciation."""
        return self.energy + self.depreciation


def economics(machine: Machine, activity: Activity) -> Economics:
    """Raises: ValueError for a lifetime that is not above zero, or more busy time than the period has."""
    if machine.lifetime_s <= 0 or not 0 <= activity.busy_ms <= activity.period_ms:
        raise ValueError(f"a lifetime of {machine.lifetime_s} s, {activity.busy_ms} of {activity.period_ms} ms busy")
    idle_ms = activity.period_ms - activity.busy_ms
    watt_ms = machine.watts_idle * idle_ms + machine.watts_busy * activity.busy_ms
    energy = _up(watt_ms * machine.price_per_kwh, W_MS_PER_KWH)
    depreciation = _up(machine.hardware_price * activity.period_ms, machine.lifetime_s * 1000)
    fee_bps = activity.fee * BPS // activity.settled if activity.settled else 0
    cost, ste = energy + depreciation, activity.ste_micro
    break_even = price_bps = profit = None
    if machine.tally_rate and fee_bps < BPS:
        kept = machine.tally_rate * (BPS - fee_bps)
        if ste:
            break_even = Wei(_up(cost * WEI_PER_TALLY * MICRO * BPS, ste * kept))
        if activity.revenue:
            price_bps = _up(cost * WEI_PER_TALLY * BPS * BPS, activity.revenue * kept)
        profit = activity.revenue * kept // (BPS * WEI_PER_TALLY) - cost
    return Economics(
        energy=energy,
        depreciation=depreciation,
        energy_per_ste=_up(energy * MICRO, ste) if ste else None,
        depreciation_per_ste=_up(depreciation * MICRO, ste) if ste else None,
        revenue_per_ste_wei=Wei(activity.revenue * MICRO // ste) if ste else None,
        busy_bps=_share(activity.busy_ms, activity.period_ms),
        slots_bps=_share(activity.slot_ms, activity.period_ms * activity.slots),
        cached_bps=_share(activity.cached_tokens, activity.prompt_tokens),
        fee_bps=fee_bps,
        break_even_wei=break_even,
        price_bps=price_bps,
        profit=profit,
    )


def union_ms(intervals: Iterable[tuple[int, int]], start: int, end: int) -> int:
    """Milliseconds within [start, end) that at least one interval [from, to) covers."""
    covered, reached = 0, start
    for begin, stop in sorted(intervals):
        begin, stop = max(begin, reached), min(stop, end)
        if stop > begin:
            covered += stop - begin
            reached = stop
    return covered


def _up(amount: int, divisor: int) -> int:
    return -(-amount // divisor)


def _share(part: int, whole: int) -> int:
    """In bps, rounded down; 0 of nothing."""
    return part * BPS // whole if whole else 0
