"""The cost formula against exact fractions, its bounds at the extremes, and its vectors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol import tariff as price
from protocol.eip712 import fields_of
from protocol.errors import FieldOutOfRange, TariffNotInForce
from protocol.messages import Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.tariff import Cost, Timing, check_tariff, cost_up, worst_case_up
from protocol.units import BPS, MAX_AMOUNT, MAX_PROMPT_TOKENS, ZERO_ADDRESS, ZERO_DIGEST, Tier
from tests.protocol.sheets import ON_SLOW_CPU, SHEET, tariffs, tiers, timings, usages

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "tariff.json").read_text())
U64, U32 = (1 << 64) - 1, (1 << 32) - 1
NO_PROMISE = Timing(1, 2, 0)


def exact_metered(tariff: Tariff, usage: Usage, tier: Tier, private: bool) -> Fraction:
    """The formula of the specification, unrounded, written down a second time."""
    tier_bps = {Tier.FLEX: tariff.flex_bps, Tier.STANDARD: tariff.standard_bps, Tier.PRIORITY: tariff.priority_bps}
    factor = Fraction(tier_bps[tier], 10_000)
    if usage.prompt > tariff.long_context_threshold:
        factor *= Fraction(tariff.long_context_bps, 10_000)
    if private:
        factor *= Fraction(tariff.privacy_bps, 10_000)
    return factor * (
        (usage.prompt - usage.cached) * tariff.prompt_price
        + usage.cached * tariff.cached_price
        + (usage.completion - usage.reasoning) * tariff.completion_price
        + usage.reasoning * tariff.reasoning_price
    )


def refund_share(tariff: Tariff, tier: Tier) -> Fraction:
    shares = (tariff.flex_refund_bps, tariff.standard_refund_bps, tariff.priority_refund_bps)
    return Fraction(shares[tier], 10_000)


# ------------------------------------------------------------------------------------------------------- the formula


@ON_SLOW_CPU
@given(tariffs(), usages(), tiers, st.booleans())
def test_cost_is_the_exact_fraction_rounded_up_once(tariff: Tariff, usage: Usage, tier: Tier, private: bool) -> None:
    cost = cost_up(tariff, usage, tier, Timing(0, 0, 0), private=private)
    assert cost.total == math.ceil(exact_metered(tariff, usage, tier, private)) + tariff.per_request
    assert cost.refund == 0


@ON_SLOW_CPU
@given(tariffs(), usages(), tiers, st.booleans(), timings())
def test_every_line_is_exact_and_the_total_is_their_sum(
    tariff: Tariff, usage: Usage, tier: Tier, private: bool, timing: Timing
) -> None:
    cost = cost_up(tariff, usage, tier, timing, private=private)
    lines = cost.prompt_line + cost.cached_line + cost.completion_line + cost.reasoning_line
    assert Fraction(lines * cost.multiplier, BPS**4) == exact_metered(tariff, usage, tier, private)
    assert cost.total == math.ceil(Fraction(lines * cost.multiplier, BPS**4)) + cost.per_request - cost.refund
    assert all(type(value) is int for value in (lines, cost.multiplier, cost.refund, cost.total))


@ON_SLOW_CPU
@given(tariffs(), usages(), tiers, st.booleans(), timings())
def test_refund_is_the_tiers_share_of_the_metered_part(
    tariff: Tariff, usage: Usage, tier: Tier, private: bool, timing: Timing
) -> None:
    cost = cost_up(tariff, usage, tier, timing, private=private)
    metered = math.ceil(exact_metered(tariff, usage, tier, private))
    missed = price.promise_missed(tariff, tier, timing, usage.completion)
    assert cost.refund == (math.floor(metered * refund_share(tariff, tier)) if missed else 0)
    assert 0 <= cost.refund <= metered and cost.total >= tariff.per_request


@ON_SLOW_CPU
@given(tariffs(least_bps=BPS), usages(), tiers, st.booleans(), st.integers(0, 500))
def test_cost_never_falls_with_a_count(tariff: Tariff, usage: Usage, tier: Tier, private: bool, more: int) -> None:
    """With long-context and privacy multipliers of at least x1; a tariff may grant a long prompt a discount."""

    def total(counts: Usage) -> int:
        return cost_up(tariff, counts, tier, NO_PROMISE, private=private).total

    before = total(usage)
    assert total(replace(usage, prompt=usage.prompt + more)) >= before
    assert total(replace(usage, completion=usage.completion + more)) >= before
    assert total(replace(usage, prompt=usage.prompt + more, cached=usage.cached + more)) >= before
    assert total(replace(usage, completion=usage.completion + more, reasoning=usage.reasoning + more)) >= before


@ON_SLOW_CPU
@given(tariffs(), usages(), tiers, st.booleans(), st.data())
def test_cached_tokens_are_never_dearer(
    tariff: Tariff, usage: Usage, tier: Tier, private: bool, data: st.DataObject
) -> None:
    fewer = data.draw(st.integers(0, usage.cached))
    hit = cost_up(tariff, usage, tier, NO_PROMISE, private=private)
    miss = cost_up(tariff, replace(usage, cached=fewer), tier, NO_PROMISE, private=private)
    assert hit.total <= miss.total


@ON_SLOW_CPU
@given(tariffs(), usages(), tiers, st.booleans(), timings(), st.integers(0, 100))
def test_the_worst_case_bounds_every_outcome_of_the_job(
    tariff: Tariff, usage: Usage, tier: Tier, private: bool, timing: Timing, spare: int
) -> None:
    worst = worst_case_up(tariff, usage.prompt, usage.completion + spare, tier, private=private)
    assert cost_up(tariff, usage, tier, timing, private=private).total <= worst


# ------------------------------------------------------------------------------------------------------- the promises


@pytest.mark.parametrize(
    ("timing", "completion", "missed"),
    [
        (Timing(1_000, 2_000, 0), 5, False),  # on the millisecond
        (Timing(1_000, 2_001, 0), 5, True),  # a late first token counts from the first interim receipt on
        (Timing(1_000, 2_000, 2_400), 5, False),  # 4 gaps of 100 ms
        (Timing(1_000, 2_000, 2_401), 5, True),
        (Timing(1_000, 2_000, 9_999), 1, False),  # one token has no gap
        (Timing(1_000, 2_000, 9_000, 6_600), 5, False),  # the client let its vouchers be waited for
        (Timing(1_000, 2_000, 9_000, 6_599), 5, True),
        (Timing(1_000, 2_001, 9_000, 9_000), 5, True),  # which excuses no late first token
        (Timing(1_000, 0, 0), 0, False),  # nothing has happened yet
        (Timing(1_000, 0, 2_000), 0, False),  # ended in time, without a token
        (Timing(1_000, 0, 2_001), 0, True),  # the first token never came, and its time had passed
    ],
)
def test_when_a_promise_is_missed(timing: Timing, completion: int, missed: bool) -> None:
    assert price.promise_missed(SHEET, Tier.STANDARD, timing, completion) is missed


@given(timings(), st.integers(0, 1000))
def test_a_promise_of_zero_is_no_promise(timing: Timing, completion: int) -> None:
    assert not price.promise_missed(SHEET, Tier.FLEX, timing, completion)


@pytest.mark.parametrize("now", [SHEET.valid_from - 1, SHEET.valid_until])
def test_out_of_force(now: int) -> None:
    with pytest.raises(TariffNotInForce) as caught:
        price.check_in_force(SHEET, now)
    assert (caught.value.valid_from, caught.value.valid_until, caught.value.now) == (
        SHEET.valid_from,
        SHEET.valid_until,
        now,
    )


@pytest.mark.parametrize("now", [SHEET.valid_from, SHEET.valid_until - 1])
def test_in_force(now: int) -> None:
    price.check_in_force(SHEET, now)


# ------------------------------------------------------------------------------------------------------- the bounds


@ON_SLOW_CPU
@given(tariffs(), usages(), tiers, st.booleans(), timings())
def test_an_admitted_tariff_fits_a_receipt(
    tariff: Tariff, usage: Usage, tier: Tier, private: bool, timing: Timing
) -> None:
    check_tariff(tariff)
    cost = cost_up(tariff, usage, tier, timing, private=private)
    types = dict(fields_of(WorkReceipt))
    for name, _ in Cost.__dataclass_fields__.items():
        assert 0 <= getattr(cost, name) < 1 << int(types[name].removeprefix("uint"))


def dearest(**changes: int) -> Tariff:
    """Every price at its bound and the multipliers' product at its own."""
    top = price.MAX_PRICE
    amounts = dict.fromkeys(("prompt_price", "cached_price", "completion_price", "reasoning_price", "per_request"), top)
    largest = {"priority_bps": price.MAX_MULTIPLIER_BPS, "long_context_bps": BPS, "privacy_bps": BPS}
    return replace(SHEET, **(amounts | largest | changes))


@pytest.mark.parametrize(
    "multipliers",
    [
        {"priority_bps": 100 * BPS},
        {"priority_bps": BPS, "long_context_bps": 100 * BPS, "long_context_threshold": 0},
        {"priority_bps": BPS, "privacy_bps": 100 * BPS},
        {
            "priority_bps": 10 * BPS,
            "long_context_bps": 10 * BPS,
            "long_context_threshold": 0,
            "standard_bps": BPS,
            "privacy_bps": BPS,
        },
    ],
)
def test_the_dearest_admitted_tariff_at_the_longest_context_fits(multipliers: dict[str, int]) -> None:
    tariff = dearest(**multipliers)
    check_tariff(tariff)
    longest = Usage(MAX_PROMPT_TOKENS, 0, MAX_PROMPT_TOKENS, 0)
    cost = cost_up(tariff, longest, Tier.PRIORITY, NO_PROMISE, private=True)
    assert cost.multiplier == 100 * BPS**4 <= U64
    assert worst_case_up(tariff, MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS, Tier.PRIORITY, private=True) <= MAX_AMOUNT
    assert cost.total <= MAX_AMOUNT


def test_a_line_of_any_count_fits_uint96() -> None:
    """Counts are uint32, so no line of a receipt can outgrow its field whatever a client asks for."""
    assert U32 * price.MAX_PRICE <= MAX_AMOUNT < 2 * U32 * price.MAX_PRICE


def test_a_total_beyond_a_voucher_is_refused() -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        cost_up(dearest(), Usage(U32, 0, U32, 0), Tier.PRIORITY, NO_PROMISE, private=False)
    assert (caught.value.document, caught.value.field) == ("WorkReceipt", "total")


PRICES = ("prompt_price", "cached_price", "completion_price", "reasoning_price", "per_request")
FACTORS = ("flex_bps", "standard_bps", "priority_bps", "long_context_bps", "privacy_bps")
SHARES = ("flex_refund_bps", "standard_refund_bps", "priority_refund_bps", "reserved_discount_bps")


@pytest.mark.parametrize("field", PRICES + FACTORS + SHARES)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_a_field_beyond_its_bound_is_refused(field: str, beyond: int) -> None:
    bound = price.MAX_PRICE if field in PRICES else price.MAX_MULTIPLIER_BPS if field in FACTORS else BPS
    value = -1 if beyond < 0 else bound + 1
    with pytest.raises(FieldOutOfRange) as caught:
        check_tariff(replace(SHEET, **{field: value}))
    assert (caught.value.field, caught.value.value) == (field, value)


@given(st.data())
def test_a_product_of_multipliers_beyond_x100_is_refused(data: st.DataObject) -> None:
    factors = {name: data.draw(st.integers(BPS, price.MAX_MULTIPLIER_BPS)) for name in FACTORS}
    product = max(factors[name] for name in FACTORS[:3]) * factors["long_context_bps"] * factors["privacy_bps"]
    assume(product > 100 * BPS**3)
    with pytest.raises(FieldOutOfRange):
        check_tariff(replace(SHEET, **factors))


@pytest.mark.parametrize("changes", [{"cached_price": 1_001}, {"valid_until": SHEET.valid_from}])
def test_a_sheet_that_contradicts_itself_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(FieldOutOfRange):
        check_tariff(replace(SHEET, **changes))


# ------------------------------------------------------------------------------------------------------------ vectors


def sheet_of(changes: dict[str, str]) -> Tariff:
    return replace(SHEET, **{name: int(value) for name, value in changes.items()})


def test_vectors_start_from_the_sheet_of_these_tests() -> None:
    stated = {name: int(value) for name, value in VECTORS["sheet"].items()}
    assert Tariff(provider=ZERO_ADDRESS, profile_id=ZERO_DIGEST, **stated) == SHEET


@pytest.mark.parametrize("case", VECTORS["cost"], ids=lambda case: case["name"])
def test_cost_vectors(case: dict[str, Any]) -> None:
    pre = case["pre"]
    tariff = sheet_of(pre["tariff"])
    arguments = (Usage(**pre["usage"]), Tier[pre["tier"].upper()], Timing(**pre["timing"]))
    if "post" not in case:
        with pytest.raises(FieldOutOfRange):
            cost_up(tariff, *arguments, private=pre["private"])
        return
    expected = Cost(**{name: int(value) for name, value in case["post"].items()})
    assert cost_up(tariff, *arguments, private=pre["private"]) == expected


@pytest.mark.parametrize("case", VECTORS["check"], ids=lambda case: case["name"])
def test_check_vectors(case: dict[str, Any]) -> None:
    tariff = sheet_of(case["pre"])
    if "post" in case:
        check_tariff(tariff)
        return
    with pytest.raises(FieldOutOfRange):
        check_tariff(tariff)
