"""A provider's own sums: exact, rounded against itself, and never more certain than the journal is."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.economics import Activity, Machine, economics, union_ms
from protocol.units import BPS, WEI_PER_TALLY, Wei

PICO = 10**12
HOUR_MS = 3_600_000

MACHINE = Machine(100, 400, 30 * PICO // 100, 2_000 * PICO, 20_000 * 3600, PICO // 2)
DAY = Activity(
    10 * HOUR_MS, 4 * HOUR_MS, 8 * HOUR_MS, 8, 100, 1_000, 250, 5_000, 2_000 * 10**6, Wei(10 * WEI_PER_TALLY),
    Wei(100), Wei(12), 7,
)  # fmt: skip

machines = st.builds(
    Machine,
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(0, 10**13),
    st.integers(0, 10**17),
    st.integers(1, 10**9),
    st.integers(1, 10**15),
)


@st.composite
def activities(draw: st.DrawFn) -> Activity:
    period = draw(st.integers(1, 10**11))
    prompt = draw(st.integers(0, 10**9))
    settled = draw(st.integers(0, 10**24))
    return Activity(
        period,
        draw(st.integers(0, period)),
        draw(st.integers(0, 8 * period)),
        8,
        1,
        prompt,
        draw(st.integers(0, prompt)),
        0,
        draw(st.integers(1, 10**15)),
        Wei(draw(st.integers(1, 10**26))),
        Wei(settled),
        Wei(draw(st.integers(0, settled // 2))),
        0,
    )


def test_a_day_worked_out_by_hand() -> None:
    """6 h at 100 W and 4 h at 400 W are 2.2 kWh: 0.66. 2,000 over 20,000 h: 1.00 in ten. Fee 12 %, TALLY at 0.50."""
    found = economics(MACHINE, DAY)
    assert (found.energy, found.depreciation, found.cost) == (66 * PICO // 100, PICO, 166 * PICO // 100)
    assert (found.energy_per_ste, found.depreciation_per_ste) == (33 * 10**7, 5 * 10**8)
    assert (found.busy_bps, found.slots_bps, found.cached_bps, found.fee_bps) == (4_000, 1_000, 2_500, 1_200)
    assert found.revenue_per_ste_wei == WEI_PER_TALLY // 200
    # 1.66 / (2,000 STE * 0.50 * 0.88) TALLY an STE; 4.40 earned less 1.66
    assert found.break_even_wei == ceil(Fraction(166, 100) / 2_000 / Fraction(44, 100) * WEI_PER_TALLY)
    assert found.profit == 274 * PICO // 100 and found.price_bps == ceil(Fraction(166, 440) * BPS)


@given(machines, activities())
def test_the_break_even_price_covers_the_cost_and_a_wei_less_does_not(machine: Machine, done: Activity) -> None:
    found = economics(machine, done)
    assert found.break_even_wei is not None
    kept = Fraction(machine.tally_rate * (BPS - found.fee_bps), BPS * WEI_PER_TALLY)
    earned = Fraction(found.break_even_wei * done.ste_micro, 10**6) * kept
    assert earned >= found.cost
    assert found.break_even_wei == 0 or Fraction((found.break_even_wei - 1) * done.ste_micro, 10**6) * kept < found.cost
    assert found.profit == floor(done.revenue * kept) - found.cost


@given(machines, activities())
def test_costs_round_up_and_more_work_is_never_dearer_a_piece(machine: Machine, done: Activity) -> None:
    found = economics(machine, done)
    idle = done.period_ms - done.busy_ms
    watt_ms = machine.watts_idle * idle + machine.watts_busy * done.busy_ms
    assert found.energy == ceil(Fraction(watt_ms * machine.price_per_kwh, 3_600_000_000))
    assert found.depreciation == ceil(Fraction(machine.hardware_price * done.period_ms, machine.lifetime_s * 1000))
    more = economics(machine, replace(done, ste_micro=2 * done.ste_micro))
    assert (more.energy_per_ste or 0) <= (found.energy_per_ste or 0)
    assert (more.break_even_wei or 0) <= (found.break_even_wei or 0)


def test_without_a_rate_or_work_nothing_is_made_up() -> None:
    blind = economics(replace(MACHINE, tally_rate=0), DAY)
    assert blind.break_even_wei is blind.profit is blind.price_bps is None and blind.cost > 0
    idle = economics(MACHINE, replace(DAY, busy_ms=0, ste_micro=0, prompt_tokens=0, cached_tokens=0, revenue=Wei(0)))
    assert idle.energy_per_ste is idle.break_even_wei is idle.price_bps is None
    assert idle.profit == -idle.cost and idle.cached_bps == 0
    assert economics(MACHINE, replace(DAY, settled=Wei(0), fee=Wei(0))).fee_bps == 0


@pytest.mark.parametrize("changes", [{"busy_ms": 11 * HOUR_MS}, {"busy_ms": -1}])
def test_a_day_that_cannot_be(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="busy"):
        economics(MACHINE, replace(DAY, **changes))
    with pytest.raises(ValueError, match="lifetime"):
        economics(replace(MACHINE, lifetime_s=0), DAY)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8), st.integers(0, 30), st.integers(30, 60))
def test_busy_time_is_counted_once(intervals: list[tuple[int, int]], start: int, end: int) -> None:
    covered = {moment for begin, stop in intervals for moment in range(begin, stop) if start <= moment < end}
    assert union_ms(intervals, start, end) == len(covered)
