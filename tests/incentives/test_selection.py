"""Which provider a job goes to: hard limits hold, the order is total and fair, and everything is an integer."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from incentives.selection import Candidate, Needs, basis_for, expected_cost, rank, rule_out
from protocol.errors import TallyError
from protocol.tariff import PRICES, Basis, check_basis, worst_case_up
from protocol.units import BPS, ZERO_DIGEST, Address, Digest, JobKind, Tier, Wei
from tests.incentives.samples import NEEDS, NOW, address, candidate
from tests.protocol.sheets import BASIS, ON_SLOW_CPU, SHEET

SALT = b"\x07" * 32
RIGHT = Digest(b"\x44" * 32)
CHEAP, DEAR = {"completion_price": 1_000}, {"completion_price": 9_000}


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    """Few different values, so that ties, second offers of one provider and misfits are common."""
    pick = st.sampled_from
    return candidate(
        draw(st.integers(0, 5)),
        queue_ms=draw(pick([None, 0, 1, 999, 5_000])),
        tariff={
            "completion_price": draw(pick([0, 1_000, 3_000])),
            "valid_until": draw(pick([NOW, NOW + 1, NOW + 10**6])),
            "standard_bps": draw(pick([BPS, BPS, BPS, 0])),
            "embedding_price": draw(pick([0, 200])),
        },
        base_bps=draw(pick([BPS, BPS, BPS, 12_500, 20_000, 20_001, 0])),
        sequence=draw(st.integers(1, 3)),
        load_bps=draw(pick([0, 1, 5_000, BPS])),
        max_context=draw(pick([1_499, 1_500, 10_000])),
        max_output=draw(pick([499, 500, 4_000])),
        expires_at=draw(pick([NOW, NOW + 1, NOW + 1_800])),
        profile_id=Digest(draw(pick([b"\1", b"\2"])) * 32),  # type: ignore[arg-type]
    )


@st.composite
def needs(draw: st.DrawFn) -> Needs:
    pick = st.sampled_from
    profile = draw(pick([None, Digest(b"\1" * 32)]))
    ceiling = draw(pick([0, 1_600_000, 2_600_000, 10**24]))
    kind = draw(pick([JobKind.GENERATE, JobKind.GENERATE, JobKind.EMBED, JobKind.BATCH]))
    wanted = replace(
        NEEDS, profile_id=profile, ceiling=Wei(ceiling), tier=draw(pick(Tier)), private=draw(st.booleans())
    )
    if kind is JobKind.EMBED:
        wanted = replace(wanted, max_tokens=0, longest=draw(pick([1_000, 1_499, 1_500, 10_001])))
    if kind is JobKind.BATCH:
        wanted = replace(wanted, tier=draw(pick([Tier.FLEX, Tier.FLEX, Tier.STANDARD])))
    return replace(
        wanted,
        kind=kind,
        reservation=draw(pick([ZERO_DIGEST, ZERO_DIGEST, RIGHT])),
        only=draw(pick([frozenset(), frozenset(), frozenset({address(1), address(3)})])),
    )


FREE = dict.fromkeys(PRICES, 0)
pools = st.lists(candidates(), max_size=10)
penalties = st.dictionaries(st.integers(0, 5).map(address), st.integers(0, 3))


# ------------------------------------------------------------------------------------------------------- the order


@ON_SLOW_CPU
@given(pools, needs(), penalties, st.binary(max_size=32), st.randoms(use_true_random=False))
def test_the_order_of_the_input_makes_no_difference(
    pool: list[Candidate], wanted: Needs, failed: dict[Address, int], salt: bytes, random: Any
) -> None:
    """Also with two offers of one provider that score alike."""
    shuffled = list(pool)
    random.shuffle(shuffled)
    assert rank(shuffled, wanted, salt, NOW, failed) == rank(pool, wanted, salt, NOW, failed)


@ON_SLOW_CPU
@given(pools, needs(), penalties)
def test_exactly_those_that_fit_are_ranked(pool: list[Candidate], wanted: Needs, failed: dict[Address, int]) -> None:
    chosen = rank(pool, wanted, SALT, NOW, failed)
    for one in chosen:
        offer, tariff = one.offer, one.tariff
        assert offer.expires_at > NOW and tariff.valid_from <= NOW < tariff.valid_until
        assert wanted.profile_id in (None, offer.profile_id)
        assert offer.max_context >= (wanted.longest or wanted.prompt_tokens + wanted.max_tokens)
        assert offer.max_output >= wanted.max_tokens and (not wanted.only or offer.provider in wanted.only)
        basis = basis_for(offer, tariff, wanted)
        check_basis(tariff, basis)
        assert worst_case_up(tariff, wanted.prompt_tokens, wanted.max_tokens, basis) <= wanted.ceiling
    assert len(chosen) == sum(rule_out(one, wanted, NOW) is None for one in pool)


def test_two_offers_of_one_provider_have_one_order() -> None:
    pool = [candidate(1, sequence=number) for number in (1, 2, 3)]
    orders = [rank(order, NEEDS, SALT, NOW, {}) for order in itertools.permutations(pool)]
    assert all(order == orders[0] for order in orders)


@ON_SLOW_CPU
@given(pools, needs(), penalties, st.data())
def test_who_is_before_whom_does_not_depend_on_the_others(
    pool: list[Candidate], wanted: Needs, failed: dict[Address, int], data: st.DataObject
) -> None:
    """So the order is total: ranking any part gives that part of the ranking."""
    pool = [replace(one, offer=replace(one.offer, sequence=number)) for number, one in enumerate(pool)]
    part = [one for one in pool if data.draw(st.booleans())]
    whole = rank(pool, wanted, SALT, NOW, failed)
    assert rank(part, wanted, SALT, NOW, failed) == [one for one in whole if one in part]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (candidate(1, tariff=CHEAP), candidate(2, tariff=DEAR)),
        (candidate(1, queue_ms=100), candidate(2, queue_ms=200)),
        (candidate(1, queue_ms=None), candidate(2, queue_ms=200)),
        (candidate(1, load_bps=100), candidate(2, load_bps=200)),
        (candidate(1, base_bps=10_000), candidate(2, base_bps=10_001)),  # the same sheet in a busier epoch
        (candidate(1, tariff=FREE), candidate(2)),
        (candidate(1, tariff=CHEAP, load_bps=BPS), candidate(2, tariff=DEAR)),  # busy, and still worth it
        (candidate(1, tariff=CHEAP, queue_ms=20_000), candidate(2, tariff=DEAR, queue_ms=0)),
        (candidate(1, tariff=DEAR), candidate(2, tariff=CHEAP, queue_ms=120_000)),  # cheap, and not worth the wait
        (
            candidate(1, tariff=FREE),
            candidate(2, tariff=FREE, queue_ms=1_000),
        ),  # both free: who is quicker
    ],
)
def test_better_comes_first_under_any_salt(better: Candidate, worse: Candidate) -> None:
    for salt in range(20):
        assert rank([worse, better], NEEDS, bytes([salt]), NOW, {}) == [better, worse]


rivals = st.builds(
    lambda provider, queue, load, price: candidate(
        provider, queue_ms=queue, load_bps=load, tariff={"completion_price": price}
    ),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(0, 60_000)),
    st.integers(0, BPS),
    st.integers(0, 5_000),
)


@ON_SLOW_CPU
@given(rivals, rivals, penalties, st.integers(1, 10_000))
def test_more_load_queue_or_failures_never_help(
    one: Candidate, other: Candidate, failed: dict[Address, int], more: int
) -> None:
    assume(one.offer.provider != other.offer.provider)
    first, last = rank([one, other], NEEDS, SALT, NOW, failed)
    loser = last.offer.provider
    slower = replace(last, queue_ms=(last.queue_ms or 0) + more)
    busier = replace(last, offer=replace(last.offer, load_bps=min(BPS, last.offer.load_bps + more)))
    dearer = replace(last, tariff=replace(last.tariff, completion_price=last.tariff.completion_price + more))
    for worse in (slower, busier, dearer):
        assert rank([worse, first], NEEDS, SALT, NOW, failed) == [first, worse]
    assert rank([one, other], NEEDS, SALT, NOW, failed | {loser: failed.get(loser, 0) + more}) == [first, last]


def test_a_failure_weighs_as_much_as_the_price() -> None:
    """One recent failure doubles the score, so a provider at less than half the price still goes first."""
    base = {"prompt_price": 0, "cached_price": 0, "per_request": 0}
    failed = candidate(1, tariff={**base, "completion_price": 1_000})
    assert (
        rank([failed, candidate(2, tariff={**base, "completion_price": 2_100})], NEEDS, SALT, NOW, {address(1): 1})[0]
        == failed
    )
    twin = candidate(2, tariff={**base, "completion_price": 1_900})
    assert rank([failed, twin], NEEDS, SALT, NOW, {address(1): 1})[0] == twin


# ------------------------------------------------------------------------------------------------------------ fairness


@pytest.mark.parametrize("providers", [2, 3, 8])
def test_equal_offers_are_spread_evenly_by_the_salt(providers: int) -> None:
    """400 jobs over n equal providers: no share leaves four standard deviations. The salts are fixed."""
    pool = [candidate(number) for number in range(providers)]
    jobs = 400
    first = Counter(rank(pool, NEEDS, n.to_bytes(4, "big"), NOW, {})[0].offer.provider for n in range(jobs))
    share = jobs / providers
    deviation = (share * (1 - 1 / providers)) ** 0.5
    assert len(first) == providers and all(abs(count - share) <= 4 * deviation for count in first.values())


def test_a_lower_address_is_no_advantage() -> None:
    assert {
        rank([candidate(1), candidate(2)], NEEDS, bytes([salt]), NOW, {})[0].offer.provider for salt in range(20)
    } == {
        address(1),
        address(2),
    }


# ------------------------------------------------------------------------------------------------------- hard limits


WORST = worst_case_up(candidate(1).tariff, NEEDS.prompt_tokens, NEEDS.max_tokens, BASIS)
RESERVED = replace(NEEDS, reservation=RIGHT)
EMBED = replace(NEEDS, kind=JobKind.EMBED, max_tokens=0, longest=400)


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (candidate(1, expires_at=NOW), NEEDS),
        (candidate(1, tariff={"valid_until": NOW}), NEEDS),
        (candidate(1, tariff={"valid_from": NOW + 1}), NEEDS),
        (candidate(1), replace(NEEDS, profile_id=Digest(b"\1" * 32))),
        (candidate(1, max_context=1_499), NEEDS),
        (candidate(1, max_output=499), NEEDS),
        (candidate(1), replace(NEEDS, ceiling=Wei(WORST - 1))),
        (candidate(1), replace(NEEDS, only=frozenset({address(2)}))),
        (candidate(1, base_bps=10_001), replace(NEEDS, ceiling=WORST)),  # the epoch's multiplier counts
        (candidate(1, tariff={"standard_bps": 0}), NEEDS),
        (candidate(1, tariff={"flex_bps": 0}), replace(NEEDS, tier=Tier.FLEX)),
        (candidate(1, tariff={"priority_bps": 0}), replace(NEEDS, tier=Tier.PRIORITY)),
        (candidate(1, tariff={"standard_bps": 0} | FREE), NEEDS),  # free, and still not offered
        (candidate(1, tariff={"standard_bps": 0}), RESERVED),
        (candidate(1, base_bps=SHEET.base_min_bps - 1), NEEDS),
        (candidate(1, base_bps=SHEET.base_max_bps + 1), NEEDS),
        (candidate(1, base_bps=0), NEEDS),
        (candidate(1), replace(NEEDS, kind=JobKind.BATCH)),  # sold at the flex tier alone
        (candidate(1), replace(NEEDS, kind=JobKind.BATCH, tier=Tier.PRIORITY)),
        (candidate(1, max_context=399), EMBED),
        (candidate(1), replace(EMBED, max_tokens=1)),
    ],
)
def test_what_rules_a_candidate_out(one: Candidate, wanted: Needs) -> None:
    assert rule_out(one, wanted, NOW)
    assert rank([one], wanted, SALT, NOW, {}) == []


def test_a_candidate_at_every_limit_fits() -> None:
    dates = {"valid_from": NOW, "valid_until": NOW + 1}
    one = candidate(1, expires_at=NOW + 1, max_context=1_500, max_output=500, tariff=dates)
    assert rule_out(one, replace(NEEDS, ceiling=WORST), NOW) is None


@pytest.mark.parametrize(
    "wanted", [replace(EMBED, prompt_tokens=50_000, longest=10_000), replace(EMBED, ceiling=Wei(200_077))]
)
def test_texts_of_an_embedding_job_have_the_context_to_themselves(wanted: Needs) -> None:
    """A context of 10 000 tokens reads any number of texts that each fit it."""
    assert rule_out(candidate(1), wanted, NOW) is None


def test_batch_work_is_taken_at_the_flex_tier() -> None:
    assert rule_out(candidate(1), replace(NEEDS, kind=JobKind.BATCH, tier=Tier.FLEX), NOW) is None


def test_only_who_was_asked_for_is_ranked() -> None:
    pool = [candidate(number) for number in range(5)]
    wanted = replace(NEEDS, only=frozenset({address(1), address(4)}))
    assert {one.offer.provider for one in rank(pool, wanted, SALT, NOW, {})} == wanted.only


@ON_SLOW_CPU
@given(candidates(), needs())
def test_the_basis_is_the_offers_or_the_reservations(one: Candidate, wanted: Needs) -> None:
    """A reserved price knows no congestion; any other follows the offer."""
    if wanted.kind is JobKind.BATCH:
        wanted = replace(wanted, tier=Tier.FLEX)
    basis = basis_for(one.offer, one.tariff, wanted)
    reserved = wanted.reservation != ZERO_DIGEST
    base_bps = BPS - one.tariff.reserved_discount_bps if reserved else one.offer.base_bps
    assert basis == Basis(wanted.kind, wanted.tier, wanted.private, base_bps, wanted.reservation)


def test_a_reservation_is_not_dearer_in_a_busy_epoch() -> None:
    idle, busy = candidate(1), candidate(2, base_bps=20_000)
    assert expected_cost(idle, RESERVED) == expected_cost(busy, RESERVED) < expected_cost(idle, NEEDS)
    assert expected_cost(busy, NEEDS) > expected_cost(idle, NEEDS)


@ON_SLOW_CPU
@given(candidates(), needs())
def test_what_is_not_sold_is_ruled_out_and_never_an_error(one: Candidate, wanted: Needs) -> None:
    """One offer that nothing is sold on must not stop the search for another."""
    try:
        check_basis(one.tariff, basis_for(one.offer, one.tariff, wanted))
    except TallyError:
        assert rule_out(one, wanted, NOW) is not None
        assert rank([one], wanted, SALT, NOW, {}) == []


@ON_SLOW_CPU
@given(st.integers(SHEET.base_min_bps, SHEET.base_max_bps), st.integers(0, 5_000), needs())
def test_costs_are_integers(base_bps: int, completion_price: int, wanted: Needs) -> None:
    one = candidate(1, base_bps=base_bps, tariff={"completion_price": completion_price})
    tier = Tier.FLEX if wanted.kind is JobKind.BATCH else wanted.tier
    wanted = replace(wanted, profile_id=None, only=frozenset(), ceiling=Wei(10**24), tier=tier, longest=0)
    assert rule_out(one, wanted, NOW) is None
    cost = expected_cost(one, wanted)
    assert type(cost) is int and cost > 0
    basis = basis_for(one.offer, one.tariff, wanted)
    assert cost <= worst_case_up(one.tariff, wanted.prompt_tokens, wanted.max_tokens, basis)
