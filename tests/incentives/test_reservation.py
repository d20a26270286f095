"""A right is worth its rate and no more, every job can be served, and money adds up as on the chain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.reservation import BURST_S, Bucket, RateExceeded, earned_down, per_period_up

rates = st.integers(1, 10_000_000)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A rate, and jobs as (ms since the one before, micro-STE): tiny ones, bucketfuls, and ten times as much."""
    rate = draw(rates)
    sizes = st.one_of(st.integers(0, rate), st.integers(0, 10 * BURST_S * rate))
    pauses = st.one_of(st.integers(0, 100), st.integers(0, 1000 * BURST_S))
    return rate, draw(st.lists(st.tuples(pauses, sizes), max_size=30))


@given(histories())
def test_no_interval_gets_more_than_its_rate_and_a_bucketful(history: tuple[int, list[tuple[int, int]]]) -> None:
    rate, jobs = history
    bucket, now, served = Bucket.full(rate, 0), 0, []
    for pause, size in jobs:
        now += pause
        try:
            bucket = bucket.take(size, now)
        except RateExceeded:
            continue
        served.append((now, size))
    for i, (start, _) in enumerate(served):
        used = 0
        for end, size in served[i:]:
            used += size
            largest = max(size for _, size in served)
            assert used * 1000 <= rate * (end - start) + 1000 * max(BURST_S * rate, largest)


@given(histories(), st.integers(1, 1000 * BURST_S))
def test_what_is_refused_fits_when_it_is_said_to(history: tuple[int, list[tuple[int, int]]], early: int) -> None:
    rate, jobs = history
    bucket, now = Bucket.full(rate, 0), 0
    for pause, size in jobs:
        now += pause
        try:
            bucket = bucket.take(size, now)
        except RateExceeded as refused:
            assert refused.wait_ms > 0
            with pytest.raises(RateExceeded):
                bucket.take(size, now + max(0, refused.wait_ms - early))
            bucket.take(size, now + refused.wait_ms)


def test_a_job_above_the_bucket_waits_for_a_full_one_and_is_paid_off() -> None:
    bucket = Bucket.full(1_000_000, 0).take(120_000_000, 0)
    with pytest.raises(RateExceeded) as refused:
        bucket.take(1, 0)
    assert refused.value.wait_ms == 60_001
    with pytest.raises(RateExceeded) as refused:
        bucket.take(120_000_000, 60_000)
    assert refused.value.wait_ms == 60_000
    bucket.take(120_000_000, 120_000)


def test_what_was_not_used_comes_back_up_to_a_bucketful() -> None:
    bucket = Bucket.full(1_000_000, 0).take(60_000_000, 0).give_back(20_000_000, 0)
    assert bucket.take(20_000_000, 0).level == 0
    assert bucket.give_back(10**12, 0) == Bucket.full(1_000_000, 0)


def test_a_clock_set_back_fills_nothing() -> None:
    bucket = Bucket.full(1_000, 1_000).take(60_000, 1_000)
    assert bucket.at(0) == bucket
    with pytest.raises(RateExceeded):
        bucket.take(1, 0)
    assert bucket.take(1, 1_001).level == 0


@given(rates, st.integers(1, 10**5), st.integers(0, 10**18), st.lists(st.integers(0, 10**6), max_size=5))
def test_nothing_is_left_over_at_the_end(rate: int, period_s: int, price: int, cuts: list[int]) -> None:
    """Earned in pieces or at once comes to the same, and never to more than was paid."""
    per_period = per_period_up(rate, period_s, price)
    assert per_period * 10**6 - rate * period_s * price in range(10**6)
    term = 7 * period_s
    earned = 0
    for cut in sorted(min(c, term) for c in cuts):
        before, earned = earned, earned_down(per_period, cut, period_s)
        assert before <= earned <= 7 * per_period
    assert earned_down(per_period, term, period_s) == 7 * per_period
