"""Are payers served alike: honest service is rarely flagged, worse service is, and the result is repeatable."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives import alike
from incentives.alike import Difference, Metric, Sample, can_flag, compare, corrected, sample_of, seed_of
from protocol.messages import WorkReceipt
from protocol.units import BPS, Address, Digest, FinishReason, JobKind
from tests.incentives.test_faults import one

SELLER = Address(b"\x51" * 20)
SEED = b"nobody chose this"


def payer(number: int) -> Address:
    return Address(number.to_bytes(20, "big"))


def market(seed: int, slower: dict[int, int] | None = None, jobs: int = 40, payers: int = 3) -> list[Sample]:
    """Heavy-tailed times in four windows of different load; `slower`: payer -> percent more time."""
    rng = random.Random(seed)
    out = []
    for number in range(payers):
        for index in range(jobs):
            window = index % 4
            value = int(rng.lognormvariate(5 + window, 0.5)) * (100 + (slower or {}).get(number, 0)) // 100
            out.append(Sample(payer(number), (window,), value))
    return out


def verdicts(samples: list[Sample], rounds: int = 199) -> list[Difference]:
    return corrected(compare(SELLER, Metric.TTFT, samples, SEED, rounds))


def test_honest_service_is_flagged_no_oftener_than_stated() -> None:
    """Alpha is 5 %: of 60 honest markets 3 are expected to be flagged, and more than 8 would be a fault (p < 0.005)."""
    flagged = sum(any(item.flagged for item in verdicts(market(seed), 99)) for seed in range(60))
    assert flagged <= 8


@pytest.mark.parametrize("victim", [0, 2])
def test_a_payer_served_worse_is_named(victim: int) -> None:
    found = {item.payer: item for item in verdicts(market(7, {victim: 60}))}
    worse = found[payer(victim)]
    assert worse.flagged and worse.statistic > 0 and worse.median > worse.others
    assert all(item.statistic < 0 for address, item in found.items() if address != payer(victim))


def test_load_that_falls_on_a_payers_windows_is_no_difference() -> None:
    """One payer asks when it is busy, another when it is quiet: slower in all, alike in each window."""
    rng = random.Random(3)
    out = []
    for number, share in ((0, 30), (1, 10)):
        for index in range(40):
            busy = index < share
            out.append(Sample(payer(number), (int(busy),), int(rng.lognormvariate(8 if busy else 5, 0.4))))
    found = verdicts(out)
    assert found and not any(item.flagged for item in found)
    merged = [replace(sample, stratum=(0,)) for sample in out]
    assert any(item.flagged for item in verdicts(merged))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 50)), max_size=60), st.randoms())
def test_the_order_of_the_jobs_makes_no_difference(rows: list[tuple[int, int, int]], rng: random.Random) -> None:
    samples = [Sample(payer(who), (stratum,), value) for who, stratum, value in rows]
    shuffled = list(samples)
    rng.shuffle(shuffled)
    assert verdicts(samples, 19) == verdicts(shuffled, 19)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 9)), max_size=60))
def test_scores_cancel_out_and_lone_strata_say_nothing(rows: list[tuple[int, int, int]]) -> None:
    samples = [Sample(payer(who), (stratum,), value) for who, stratum, value in rows]
    segments = alike._mixed_strata(samples)
    assert all(sum(alike._scores(segment)) == 0 for segment in segments)
    assert all(len({sample.payer for sample in segment}) > 1 for segment in segments)
    mixed = {s.stratum for s in samples if len({o.payer for o in samples if o.stratum == s.stratum}) > 1}
    assert {segment[0].stratum for segment in segments} == mixed


def test_equal_values_are_never_a_difference() -> None:
    samples = [Sample(payer(number % 2), (0,), 5) for number in range(40)]
    assert all(item.exceeded == item.permutations and not item.flagged for item in verdicts(samples))


def test_exchanges_are_uniform() -> None:
    """All 6 orders of three jobs come up about equally often in 1,200 rounds (5 sigma: 200 +- 65)."""
    samples = [Sample(payer(number), (0,), number) for number in range(3)]
    counts = dict.fromkeys(permutations(range(3)), 0)
    for round_ in range(1_200):
        keys = alike._keys(b"head", round_, 3)
        counts[tuple(alike._exchanged([0, 1, 2], [samples], keys))] += 1  # type: ignore[index]
    assert all(135 <= count <= 265 for count in counts.values())


def test_p_counts_the_observed_arrangement_itself() -> None:
    """8 jobs against 8, all slower: of C(16, 8) = 12,870 arrangements only two are as extreme."""
    samples = [Sample(payer(number // 8), (0,), number) for number in range(16)]
    (first, second) = compare(SELLER, Metric.TTFT, samples, SEED, 99)
    assert first.statistic == -second.statistic < 0
    assert first.exceeded == second.exceeded <= 1
    assert alike._p_bps(first, 1) >= 100


def made(exceeded: int) -> Difference:
    return Difference(SELLER, payer(1), Metric.TTFT, 9, 1, exceeded, 999, 1, 1)


def test_holms_correction() -> None:
    """p = 0.001, 0.02, 0.03, 0.5 with m = 4: 0.004, 0.06, 0.06, 0.5. Source: Holm 1979."""
    found = corrected([made(19), made(0), made(499), made(29)])
    assert [item.adjusted_bps for item in found] == [600, 40, 5_000, 600]
    assert [item.flagged for item in found] == [False, True, False, False]
    assert corrected([]) == []


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_correction_never_helps_a_flag(counts: list[int]) -> None:
    before = [made(count) for count in counts]
    for plain, after in zip(before, corrected(before), strict=True):
        assert alike._p_bps(plain, 1) <= after.adjusted_bps <= BPS


def test_too_few_permutations_are_known() -> None:
    assert can_flag(100, 1_999) and not can_flag(101, 1_999) and not can_flag(1, 18) and can_flag(1, 19)


def test_few_jobs_are_left_untested() -> None:
    samples = [Sample(payer(0), (0,), index) for index in range(20)] + [Sample(payer(1), (0,), 5)] * 7
    assert [item.payer for item in verdicts(samples)] == [payer(0)]


def receipt(**changes: object) -> WorkReceipt:
    _, honest = one()
    fields = {"first_token_at": 1_300_000, "received_at": 1_000_000, "finished_at": 2_400_000, "completion_tokens": 11}
    return replace(honest, **(fields | changes))  # type: ignore[arg-type]


def value(metric: Metric, **changes: object) -> int | None:
    sample = sample_of(receipt(**changes), metric)
    return None if sample is None else sample.value


def test_what_receipts_say_of_each_metric() -> None:
    assert value(Metric.TTFT) == 300_000
    assert value(Metric.TPOT, waited_ms=100_000) == 100_000_000
    assert value(Metric.TPOT, completion_tokens=1) is None
    assert value(Metric.TTFT, first_token_at=0) is None
    assert value(Metric.TTFT, is_final=False) is None
    assert value(Metric.PRICE) == 10_000
    assert value(Metric.PRICE, reservation=b"\x01" * 32) is None
    assert value(Metric.FAILED) == 0
    assert value(Metric.FAILED, finish_reason=FinishReason.DEADLINE) == 1
    assert value(Metric.FAILED, finish_reason=FinishReason.CANCELLED) is None
    assert value(Metric.SCORE) is None
    scored = sample_of(receipt(), Metric.SCORE, scores={bytes(receipt().job_id): 4})
    assert scored is not None and scored.value == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"tier": 2},
        {"kind": JobKind.EMBED},
        {"is_private": True},
        {"reservation": b"\x01" * 32},
        {"prompt_tokens": 1_000},
        {"received_at": 1_000_000 + alike.WINDOW_MS, "first_token_at": 1_300_000 + alike.WINDOW_MS},
    ],
)
def test_only_like_jobs_are_compared(changes: dict[str, object]) -> None:
    base, other = sample_of(receipt(), Metric.TTFT), sample_of(receipt(**changes), Metric.TTFT)
    assert base is not None and other is not None and base.stratum != other.stratum


def test_the_seed_follows_from_the_receipts() -> None:
    first, second = Digest(b"\x01" * 32), Digest(b"\x02" * 32)
    assert seed_of([first, second]) == seed_of([second, first]) != seed_of([first])
