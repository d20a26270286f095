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
from protocol.errors import FieldOutOfRange, TallyError, TariffNotInForce, TierNotOffered
from protocol.messages import Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.tariff import Basis, Cost, Timing, basis_of, check_basis, check_tariff, cost_up, worst_case_up
from protocol.units import (
    BPS,
    MAX_AMOUNT,
    MAX_PROMPT_TOKENS,
    ZERO_ADDRESS,
    ZERO_DIGEST,
    Digest,
    FinishReason,
    JobKind,
    Tier,
    Wei,
)
from tests.protocol.jobs import REQUEST, START, Job
from tests.protocol.sheets import (
    BASIS,
    ON_SLOW_CPU,
    SHEET,
    bases,
    exact_metered,
    prompt_counts,
    sales,
    tariffs,
    tiers,
    timings,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "tariff.json").read_text())
U64, U32 = (1 << 64) - 1, (1 << 32) - 1
NO_PROMISE = Timing(1, 2, 0)


RESERVED = Digest(b"\x77" * 32)
QUIET = Job(REQUEST, SHEET, 0, (), FinishReason.CANCELLED, 0, Wei(0))
_, RECEIPT = QUIET.begin().receipt(FinishReason.CANCELLED, START, Wei(0))


def refund_share(tariff: Tariff, tier: Tier) -> Fraction:
    shares = (tariff.flex_refund_bps, tariff.standard_refund_bps, tariff.priority_refund_bps)
    return Fraction(shares[tier], 10_000)


# ------------------------------------------------------------------------------------------------------- the formula


Sale = tuple[Tariff, Basis, Usage]


@ON_SLOW_CPU
@given(sales())
def test_cost_is_the_exact_fraction_rounded_up_once(sale: Sale) -> None:
    tariff, basis, usage = sale
    cost = cost_up(tariff, usage, basis, Timing(0, 0, 0))
    assert cost.total == math.ceil(exact_metered(tariff, usage, basis)) + tariff.per_request
    assert cost.refund == 0


@ON_SLOW_CPU
@given(sales(), timings())
def test_every_line_is_exact_and_the_total_is_their_sum(sale: Sale, timing: Timing) -> None:
    tariff, basis, usage = sale
    cost = cost_up(tariff, usage, basis, timing)
    lines = cost.prompt_line + cost.cached_line + cost.completion_line + cost.reasoning_line
    assert Fraction(lines * cost.multiplier, BPS**4) == exact_metered(tariff, usage, basis)
    assert cost.total == math.ceil(Fraction(lines * cost.multiplier, BPS**4)) + cost.per_request - cost.refund
    assert all(type(value) is int for value in (lines, cost.multiplier, cost.refund, cost.total))


@ON_SLOW_CPU
@given(sales(), timings())
def test_refund_is_the_tiers_share_of_the_metered_part(sale: Sale, timing: Timing) -> None:
    tariff, basis, usage = sale
    cost = cost_up(tariff, usage, basis, timing)
    metered = math.ceil(exact_metered(tariff, usage, basis))
    missed = price.promise_missed(tariff, basis.tier, timing, usage.completion)
    assert cost.refund == (math.floor(metered * refund_share(tariff, basis.tier)) if missed else 0)
    assert 0 <= cost.refund <= metered and cost.total >= tariff.per_request


@ON_SLOW_CPU
@given(sales(least_bps=BPS), st.integers(0, 500))
def test_cost_never_falls_with_a_count(sale: Sale, more: int) -> None:
    """With long-context and privacy multipliers of at least x1; a tariff may grant a long prompt a discount."""
    tariff, basis, usage = sale

    def total(counts: Usage) -> int:
        return cost_up(tariff, counts, basis, NO_PROMISE).total

    before = total(usage)
    assert total(replace(usage, prompt=usage.prompt + more)) >= before
    if basis.kind is JobKind.EMBED:
        return
    assert total(replace(usage, completion=usage.completion + more)) >= before
    assert total(replace(usage, prompt=usage.prompt + more, cached=usage.cached + more)) >= before
    assert total(replace(usage, completion=usage.completion + more, reasoning=usage.reasoning + more)) >= before


@ON_SLOW_CPU
@given(sales(), st.data())
def test_cached_tokens_are_never_dearer(sale: Sale, data: st.DataObject) -> None:
    tariff, basis, usage = sale
    fewer = data.draw(st.integers(0, usage.cached))
    hit = cost_up(tariff, usage, basis, NO_PROMISE)
    miss = cost_up(tariff, replace(usage, cached=fewer), basis, NO_PROMISE)
    assert hit.total <= miss.total


@ON_SLOW_CPU
@given(sales(), st.integers(0, 10_000))
def test_a_higher_base_multiplier_is_never_cheaper(sale: Sale, more: int) -> None:
    tariff, basis, usage = sale
    assume(basis.reservation == ZERO_DIGEST)
    dearer = replace(basis, base_bps=min(tariff.base_max_bps, basis.base_bps + more))
    assert cost_up(tariff, usage, dearer, NO_PROMISE).total >= cost_up(tariff, usage, basis, NO_PROMISE).total


@ON_SLOW_CPU
@given(sales(), timings(), st.integers(0, 100))
def test_the_worst_case_bounds_every_outcome_of_the_job(sale: Sale, timing: Timing, spare: int) -> None:
    tariff, basis, usage = sale
    spare = 0 if basis.kind is JobKind.EMBED else spare
    worst = worst_case_up(tariff, usage.prompt, usage.completion + spare, basis)
    assert cost_up(tariff, usage, basis, timing).total <= worst


@given(sales(), st.sampled_from(["cached", "completion"]), st.integers(1, 500))
def test_an_embedding_job_has_no_other_lines(sale: Sale, count: str, more: int) -> None:
    """It reads; a receipt that prices hits or output on top is no receipt of that job."""
    tariff, basis, _ = sale
    usage = replace(Usage(1_000, 0, 0, 0), **{count: more})
    with pytest.raises(FieldOutOfRange) as caught:
        cost_up(tariff, usage, replace(basis, kind=JobKind.EMBED), NO_PROMISE)
    assert (caught.value.field, caught.value.value) == (count, more)
    with pytest.raises(FieldOutOfRange):
        worst_case_up(tariff, 1_000, more, replace(basis, kind=JobKind.EMBED))


# -------------------------------------------------------------------------------------------------- what is sold at all


ALL_FREE = dict.fromkeys(price.PRICES, 0)


@given(tariffs(), st.data())
def test_a_free_tariff_is_admitted_and_costs_nothing(sheet: Tariff, data: st.DataObject) -> None:
    free = replace(sheet, **ALL_FREE)
    check_tariff(free)
    basis = data.draw(bases(free))
    prompts, completions = data.draw(prompt_counts), data.draw(prompt_counts)
    completions = 0 if basis.kind is JobKind.EMBED else completions
    usage = Usage(prompts, 0, completions, 0)
    assert cost_up(free, usage, basis, data.draw(timings())).total == 0
    assert worst_case_up(free, prompts, completions, basis) == 0


def refused(tariff: Tariff, basis: Basis) -> list[TallyError]:
    """What each way to a price says of a basis that nothing is sold on. Fails when one gives a price all the same."""
    errors: list[TallyError] = []
    ways = (
        lambda: check_basis(tariff, basis),
        lambda: cost_up(tariff, Usage(0, 0, 0, 0), basis, NO_PROMISE),
        lambda: cost_up(tariff, Usage(10, 0, 0, 0), basis, NO_PROMISE),
        lambda: worst_case_up(tariff, 10, 0, basis),
        lambda: price.multiplier_of(tariff, basis, 10),
    )
    for way in ways:
        with pytest.raises(TallyError) as caught:
            way()
        errors.append(caught.value)
    return errors


@given(sales(), tiers)
def test_a_tier_without_a_multiplier_is_not_sold_at_any_price(sale: Sale, tier: Tier) -> None:
    """Fail closed: zero is no discount."""
    tariff, basis, _ = sale
    assume(basis.kind is not JobKind.BATCH or tier is Tier.FLEX)
    sheet = replace(tariff, **{f"{tier.name.lower()}_bps": 0})
    check_tariff(sheet)
    for error in refused(sheet, replace(basis, tier=tier)):
        assert isinstance(error, TierNotOffered) and error.tier == tier.name.lower()
    for other in set(Tier) - {tier}:
        check_basis(sheet, replace(basis, kind=JobKind.GENERATE, tier=other))


def test_a_sheet_without_a_tier_is_refused() -> None:
    with pytest.raises(FieldOutOfRange):
        check_tariff(replace(SHEET, flex_bps=0, standard_bps=0, priority_bps=0))


@pytest.mark.parametrize("base_bps", [0, 1, SHEET.base_min_bps - 1, SHEET.base_max_bps + 1, 1 << 31])
@pytest.mark.parametrize("kind", [JobKind.GENERATE, JobKind.EMBED])
def test_a_base_multiplier_out_of_bounds_is_not_sold(base_bps: int, kind: JobKind) -> None:
    for error in refused(SHEET, Basis(kind, base_bps=base_bps)):
        assert isinstance(error, FieldOutOfRange) and (error.field, error.value) == ("base_bps", base_bps)


@pytest.mark.parametrize("base_bps", [0, 7_999, 8_001, 10_000, SHEET.base_max_bps])
def test_a_reservation_buys_the_reserved_price_and_no_other(base_bps: int) -> None:
    """SHEET gives 20 % off: x0.8, below its own lower bound, and only under a reservation."""
    for error in refused(SHEET, Basis(base_bps=base_bps, reservation=RESERVED)):
        assert isinstance(error, FieldOutOfRange) and error.field == "base_bps"
    check_basis(SHEET, Basis(base_bps=8_000, reservation=RESERVED))
    assert refused(SHEET, Basis(base_bps=8_000))


@pytest.mark.parametrize("tier", [Tier.STANDARD, Tier.PRIORITY])
def test_batch_work_is_sold_at_flex_alone(tier: Tier) -> None:
    """There is no other basis for it, so no way to any price."""
    with pytest.raises(FieldOutOfRange) as caught:
        Basis(JobKind.BATCH, tier)
    assert (caught.value.field, caught.value.value) == ("tier", tier)
    check_basis(SHEET, Basis(JobKind.BATCH, Tier.FLEX))


@pytest.mark.parametrize("document", [REQUEST, None], ids=["request", "receipt"])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": 3}, "kind"),
        ({"kind": 255}, "kind"),
        ({"tier": 3}, "tier"),
        ({"tier": 255}, "tier"),
        ({"kind": JobKind.BATCH, "tier": Tier.STANDARD}, "tier"),
        ({"kind": JobKind.BATCH, "tier": Tier.PRIORITY}, "tier"),
    ],
)
def test_a_basis_that_no_sheet_knows_is_refused(document: Any, changes: dict[str, int], field: str) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        basis_of(replace(document or RECEIPT, **changes))
    assert caught.value.field == field


@given(sales())
def test_a_request_and_its_receipt_name_the_same_basis(sale: Sale) -> None:
    _, basis, _ = sale
    names = {
        "kind": int(basis.kind),
        "tier": int(basis.tier),
        "is_private": basis.private,
        "base_bps": basis.base_bps,
        "reservation": basis.reservation,
    }
    assert basis_of(replace(REQUEST, **names)) == basis_of(replace(RECEIPT, **names)) == basis


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
@given(sales(), timings())
def test_an_admitted_tariff_fits_a_receipt(sale: Sale, timing: Timing) -> None:
    tariff, basis, usage = sale
    check_tariff(tariff)
    cost = cost_up(tariff, usage, basis, timing)
    types = dict(fields_of(WorkReceipt))
    for name, _ in Cost.__dataclass_fields__.items():
        assert 0 <= getattr(cost, name) < 1 << int(types[name].removeprefix("uint"))


def dearest(**changes: int) -> Tariff:
    """Every price at its bound and the multipliers' product at its own."""
    top = price.MAX_PRICE
    amounts = dict.fromkeys(price.PRICES, top)
    largest = {"priority_bps": price.MAX_MULTIPLIER_BPS, "long_context_bps": BPS, "privacy_bps": BPS}
    largest |= {"base_min_bps": BPS, "base_max_bps": BPS}
    return replace(SHEET, **(amounts | largest | changes))


@pytest.mark.parametrize(
    "multipliers",
    [
        {"priority_bps": 100 * BPS},
        {"priority_bps": BPS, "long_context_bps": 100 * BPS, "long_context_threshold": 0},
        {"priority_bps": BPS, "privacy_bps": 100 * BPS},
        {"priority_bps": BPS, "base_max_bps": 100 * BPS, "standard_bps": BPS},
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
    basis = Basis(tier=Tier.PRIORITY, private=True, base_bps=tariff.base_max_bps)
    cost = cost_up(tariff, longest, basis, NO_PROMISE)
    assert cost.multiplier == 100 * BPS**4 <= U64
    assert worst_case_up(tariff, MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS, basis) <= MAX_AMOUNT
    assert cost.total <= MAX_AMOUNT


def test_a_line_of_any_count_fits_uint96() -> None:
    """Counts are uint32, so no line of a receipt can outgrow its field whatever a client asks for."""
    assert U32 * price.MAX_PRICE <= MAX_AMOUNT < 2 * U32 * price.MAX_PRICE


def test_a_total_beyond_a_voucher_is_refused() -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        cost_up(dearest(), Usage(U32, 0, U32, 0), replace(BASIS, tier=Tier.PRIORITY), NO_PROMISE)
    assert (caught.value.document, caught.value.field) == ("WorkReceipt", "total")


PRICES = ("prompt_price", "cached_price", "completion_price", "reasoning_price", "embedding_price", "per_request")
FACTORS = (
    "flex_bps",
    "standard_bps",
    "priority_bps",
    "long_context_bps",
    "privacy_bps",
    "base_min_bps",
    "base_max_bps",
)
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
    assume(factors["base_min_bps"] <= factors["base_max_bps"])
    product = max(factors[name] for name in FACTORS[:3]) * factors["long_context_bps"] * factors["privacy_bps"]
    assume(product * factors["base_max_bps"] > 100 * BPS**4)
    with pytest.raises(FieldOutOfRange):
        check_tariff(replace(SHEET, **factors))


@pytest.mark.parametrize(
    "changes",
    [
        {"cached_price": 1_001},
        {"valid_until": SHEET.valid_from},
        {"base_min_bps": 0},
        {"base_max_bps": SHEET.base_min_bps - 1},
        {"base_min_bps": SHEET.base_max_bps + 1},
    ],
)
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
    basis = Basis(
        JobKind[pre["kind"].upper()],
        Tier[pre["tier"].upper()],
        pre["private"],
        pre["base_bps"],
        Digest(bytes.fromhex(pre["reservation"])),
    )
    usage, timing = Usage(**pre["usage"]), Timing(**pre["timing"])
    if "post" not in case:
        with pytest.raises((FieldOutOfRange, TierNotOffered)):
            cost_up(tariff, usage, basis, timing)
        return
    expected = Cost(**{name: int(value) for name, value in case["post"].items()})
    assert cost_up(tariff, usage, basis, timing) == expected
    metered = math.ceil(exact_metered(tariff, usage, basis))
    assert expected.total == metered + tariff.per_request - expected.refund


@pytest.mark.parametrize("case", VECTORS["check"], ids=lambda case: case["name"])
def test_check_vectors(case: dict[str, Any]) -> None:
    tariff = sheet_of(case["pre"])
    if "post" in case:
        check_tariff(tariff)
        return
    with pytest.raises(FieldOutOfRange):
        check_tariff(tariff)
