"""The stake formula against exact fractions and a simulated cheat, and the cap that follows from it."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.exposure import PHI_BPS, needed_stake, stake_for, unsettled_cap
from protocol.errors import FieldOutOfRange
from protocol.units import Wei

bps = st.integers(1, 10_000)


@given(st.integers(0, 10**24), bps, bps, st.integers(0, 10**6), st.integers(10_000, 100_000))
def test_it_is_the_formula_rounded_up_once(gain: int, rate: int, detection: int, jobs: int, phi: int) -> None:
    exact = Fraction(phi, 10_000) * gain * (Fraction(10**8, rate * detection) + jobs)
    held = needed_stake(Wei(gain), rate, detection, jobs, phi)
    assert held - 1 < exact <= held


@given(st.integers(0, 10**24), st.integers(10_000, 100_000))
def test_cap_and_stake_are_each_others_inverse(stake: int, phi: int) -> None:
    cap = unsettled_cap(Wei(stake), phi)
    assert stake_for(cap, phi) <= stake < stake_for(Wei(cap + 1), phi)


@pytest.mark.parametrize(
    ("gain", "rate", "detection", "jobs", "units"),
    [
        (100, 200, 10_000, 20, 21_000), (100, 200, 5_797, 20, 31_876), (100, 200, 2_466, 20, 66_828),
        (100, 200, 10_000, 600, 195_000), (100, 200, 2_466, 600, 240_828), (100, 10_000, 10_000, 20, 6_300),
    ],
)  # fmt: skip
def test_the_worked_table_of_the_readme(gain: int, rate: int, detection: int, jobs: int, units: int) -> None:
    assert needed_stake(Wei(gain), rate, detection, jobs) == units and PHI_BPS == 30_000


def test_a_cheat_loses_in_the_mean_and_nearly_always() -> None:
    """20,000 cheats at q = 2 %, d = 80 %, D = 20: with the formula's stake at most exp(-phi) come out ahead."""
    chance, gain, jobs = random.Random(1), 1_000, 20
    stake = needed_stake(Wei(gain), 200, 8_000, jobs)
    won = []
    for _ in range(20_000):
        served = 1
        while chance.random() >= 0.02 * 0.8:
            served += 1
        won.append(gain * (served + jobs))
    assert sum(won) / len(won) == pytest.approx(stake / 3, rel=0.03)
    assert sum(total > stake for total in won) <= 0.05 * len(won)


@pytest.mark.parametrize(
    "numbers",
    [(-1, 1, 1, 0, 10_000), (1, 0, 1, 0, 10_000), (1, 1, 0, 0, 10_000), (1, 10_001, 1, 0, 10_000),
     (1, 1, 10_001, 0, 10_000), (1, 1, 1, -1, 10_000), (1, 1, 1, 0, 9_999)],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(numbers: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(FieldOutOfRange):
        needed_stake(Wei(numbers[0]), *numbers[1:])


@pytest.mark.parametrize("rule", [unsettled_cap, stake_for])
def test_amounts_below_zero_are_refused(rule: object) -> None:
    for amount, phi in ((-1, 10_000), (1, 9_999)):
        with pytest.raises(FieldOutOfRange):
            rule(Wei(amount), phi)  # type: ignore[operator]
