"""Tails against exact binomials, the e-process against Ville's bound, and how fast a cheat is condemned."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.evidence import (
    BETS,
    HARD_FAIL,
    MAX_CASE_TOKENS,
    MAX_FLAG_PPM,
    MAX_TOKENS,
    MOST_WEALTH,
    SLASH_AT,
    TAIL_ONE,
    WAD,
    Evidence,
    far_above,
    hard_fail,
    tail_up,
)
from protocol.errors import FieldOutOfRange
from tests.protocol.sheets import ON_SLOW_CPU

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "evidence.json").read_text())
P0_PPM = 1_000


def mass(n: int, k: int, ppm: int) -> Fraction:
    p = Fraction(ppm, 10**6)
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def exact(n: int, k: int, ppm: int) -> Fraction:
    """P(X >= k), exactly."""
    return 1 - sum((mass(n, i, ppm) for i in range(k)), Fraction(0))


# --------------------------------------------------------------------------------------------------------------- tail


@pytest.mark.parametrize("ppm", [1, 120, 1_000, 20_000])
@pytest.mark.parametrize("n", [1, 2, 31, 64, 256, 1_024])
def test_a_tail_is_never_below_the_exact_one_and_close_above_it(n: int, ppm: int) -> None:
    mode = (n + 1) * ppm // 10**6
    for k in range(min(n, mode + 25) + 1):
        held, true = tail_up(n, k, ppm), exact(n, k, ppm) * TAIL_ONE
        assert held >= true
        if k > mode:
            assert held <= true * Fraction(100_001, 100_000) + 1


@ON_SLOW_CPU
@given(st.integers(0, 400), st.integers(0, 400), st.integers(1, MAX_FLAG_PPM))
def test_tails_bound_the_exact_ones_everywhere(n: int, k: int, ppm: int) -> None:
    k = min(n, k)
    assert exact(n, k, ppm) * TAIL_ONE <= tail_up(n, k, ppm) <= TAIL_ONE


@ON_SLOW_CPU
@given(st.integers(1, MAX_TOKENS), st.integers(0, 3_000), st.integers(1, MAX_FLAG_PPM - 1))
def test_more_flags_are_less_likely_and_a_higher_rate_excuses_more(n: int, k: int, ppm: int) -> None:
    k = min(k, n - 1)
    assert tail_up(n, k + 1, ppm) <= tail_up(n, k, ppm) <= tail_up(n, k, ppm + 1) * (1 + Fraction(1, 10**5)) + 1


@pytest.mark.parametrize(("tokens", "flags"), [(64, 6), (256, 8), (1_024, 13)])
def test_the_design_says_how_many_flags_condemn(tokens: int, flags: int) -> None:
    """Exactly so many, at p0 = 1e-3: one fewer is not enough."""
    assert hard_fail(tokens, flags, 0, P0_PPM) and not hard_fail(tokens, flags - 1, 0, P0_PPM)
    assert exact(tokens, flags, P0_PPM) < Fraction(1, 10**9) <= exact(tokens, flags - 1, P0_PPM)


@pytest.mark.parametrize(("tokens", "voids"), [(32, 2), (64, 3), (1_024, 3), (4_096, 4)])
def test_so_many_void_tokens_condemn(tokens: int, voids: int) -> None:
    assert hard_fail(tokens, voids, voids, MAX_FLAG_PPM) and not hard_fail(tokens, voids - 1, voids - 1, MAX_FLAG_PPM)


def test_the_threshold_is_one_in_a_billion() -> None:
    assert Fraction(HARD_FAIL, TAIL_ONE) == Fraction(1, 10**9)


@pytest.mark.parametrize(
    "numbers", [(5, 6, 1), (-1, -1, 1), (5, -1, 1), (MAX_TOKENS + 1, 1, 1), (5, 1, 0), (5, 1, MAX_FLAG_PPM + 1)]
)
def test_impossible_counts_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(FieldOutOfRange):
        tail_up(*numbers)


# ----------------------------------------------------------------------------------------------------------- evidence


def test_evidence_starts_at_one_and_is_mirrored_in_the_vectors() -> None:
    assert Evidence().value == WAD
    for past in VECTORS["process"]:
        evidence = Evidence()
        for case, step in zip(past["cases"], past.get("post", []), strict=False):
            evidence = evidence.after(*case)
            assert [str(wealth) for wealth in evidence.sums] == step["sums"] and str(evidence.value) == step["value"]


pasts = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 12), st.integers(0, 2), st.sampled_from([120, 1_000, 20_000])),
    max_size=6,
)


def after(past: list[tuple[int, int, int, int]]) -> Evidence:
    evidence = Evidence()
    for n, flags, voids, ppm in past:
        evidence = evidence.after(n, min(n, flags), min(n, voids), ppm)
    return evidence


@ON_SLOW_CPU
@given(pasts, st.integers(0, 60), st.sampled_from([1, 120, 1_000, 20_000]))
def test_honest_work_is_never_expected_to_raise_it(past: list[tuple[int, int, int, int]], n: int, ppm: int) -> None:
    """The supermartingale, exactly: over all outcomes of the next case, flags at p0, E does not rise in the mean.

    Flags and voids are taken independent here; each bet stands on one of the two alone, so their dependence is no
    matter. The rounding of 1 / (k (k + 1)) can be worth one unit in 1e18.
    """
    evidence = after(past)
    mean = sum((mass(n, x, ppm) * evidence.after(n, x, 0, ppm).value for x in range(n + 1)), Fraction(0))
    quiet = evidence.after(n, 0, 0, ppm)
    mean += sum((mass(n, x, 1) * (evidence.after(n, 0, x, ppm).value - quiet.value) for x in range(n + 1)), Fraction(0))
    assert mean <= evidence.value + 1


@ON_SLOW_CPU
@given(pasts, st.integers(1, 400), st.integers(0, 12))
def test_a_flag_more_never_lowers_it(past: list[tuple[int, int, int, int]], n: int, flags: int) -> None:
    evidence, flags = after(past), min(n - 1, flags)
    assert evidence.after(n, flags, 0, P0_PPM).value <= evidence.after(n, flags + 1, 0, P0_PPM).value + BETS


@ON_SLOW_CPU
@given(pasts)
def test_wealth_stays_within_what_a_contract_slot_holds(past: list[tuple[int, int, int, int]]) -> None:
    evidence = after([*past, (MAX_CASE_TOKENS, MAX_CASE_TOKENS, MAX_CASE_TOKENS, 1)] * 2)
    assert all(0 <= wealth <= MOST_WEALTH < 1 << 120 for wealth in evidence.sums)
    assert evidence.value >= SLASH_AT


def test_a_large_case_neither_underflows_nor_overflows_its_bets() -> None:
    """40 flags in 10,000 tokens: (1 - lambda)^n alone is below 1e-18 for the winning bet, the product is not."""
    evidence = Evidence().after(10_000, 40, 0, P0_PPM)
    true = Fraction(1) / 2 * (1 + 5 - Fraction(5, 1000)) ** 40 * Fraction(995, 1000) ** 9_960 * WAD
    assert evidence.sums[0] == pytest.approx(int(true), rel=1e-12) and evidence.value > SLASH_AT


@pytest.mark.parametrize(
    "case", [(5, 6, 0, 1), (5, 0, 6, 1), (-1, 0, 0, 1), (MAX_CASE_TOKENS + 1, 0, 0, 1), (5, 0, 0, 0), (5, -1, 0, 1)]
)
def test_impossible_cases_are_refused(case: tuple[int, int, int, int]) -> None:
    with pytest.raises(FieldOutOfRange):
        Evidence().after(*case)


# ------------------------------------------------------------------------------------------------- over long streams


def drawn(chance: random.Random, n: int, rate: Fraction) -> int:
    """How many of `n` tokens are flagged, by the gaps between them."""
    return sum(chance.randrange(rate.denominator) < rate.numerator for _ in range(n))


@pytest.mark.parametrize(("past", "most"), [(0, 600), (100, 700), (10_000, 900)])
def test_a_long_honest_past_does_not_pay_for_a_cheat(past: int, most: int) -> None:
    """2.3 % flags at p0 = 1e-3 (int4) in cases of 100 tokens: tokens until it is condemned, the median of 15."""
    chance, evidence, spent = random.Random(4), Evidence(), []
    for _ in range(past):
        evidence = evidence.after(100, drawn(chance, 100, Fraction(1, 1_000)), 0, P0_PPM)
    assert evidence.value <= WAD
    for _ in range(15):
        cheat, tokens = evidence, 0
        while cheat.value < SLASH_AT:
            cheat = cheat.after(100, drawn(chance, 100, Fraction(23, 1_000)), 0, P0_PPM)
            tokens += 100
        spent.append(tokens)
    assert sorted(spent)[7] <= most


@pytest.mark.slow
def test_honest_streams_stay_below_villes_bound() -> None:
    """400 seeded providers, 500 cases of 200 tokens each, flags at exactly p0: the worst that honesty may be."""
    reached: dict[int, int] = {10: 0, 100: 0}
    highest = 0
    for seed in range(400):
        chance, evidence, peak = random.Random(seed), Evidence(), 0
        for _ in range(500):
            evidence = evidence.after(200, drawn(chance, 200, Fraction(1, 1_000)), 0, P0_PPM)
            peak = max(peak, evidence.value)
        highest = max(highest, peak)
        for level in reached:
            reached[level] += peak >= level * WAD
    assert highest < SLASH_AT
    assert reached[10] <= 40 and reached[100] <= 4


def test_vectors_hold_for_the_python() -> None:
    def given_(case: dict[str, Any]) -> tuple[int, int, int]:
        return case["n"], case["k"], case["ppm"]

    for case in VECTORS["tail"]:
        if "post" in case:
            assert str(tail_up(*given_(case))) == case["post"]
    for case in VECTORS["hard_fail"]:
        assert hard_fail(*case["input"]) is case["post"]


@pytest.mark.parametrize("ppm", [1, 10, 120, 1_000, 5_000, MAX_FLAG_PPM])
def test_a_count_far_above_the_mean_is_always_rare(ppm: int) -> None:
    """So judging a higher count as that one, which bounds what a verdict costs on chain, changes no verdict."""
    for n in (70, 100, 1_000, 3_200, 5_000, 50_000, 1 << 18, MAX_TOKENS):
        far = far_above(n, ppm)
        if far > n:
            continue
        assert tail_up(n, far, ppm) * 1_000 < HARD_FAIL
        assert hard_fail(n, n, 0, ppm) and hard_fail(n, far, 0, ppm)
