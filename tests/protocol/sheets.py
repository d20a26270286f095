"""Hypothesis strategies for what is priced: valid tariffs, usage, timing, and one profile and price sheet to vary."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from protocol.messages import Profile, Tariff
from protocol.metering import Usage
from protocol.tariff import MAX_MULTIPLIER_BPS, MAX_PRICE, Basis, Timing
from protocol.units import BPS, MAX_PROMPT_TOKENS, ZERO_ADDRESS, ZERO_DIGEST, Digest, JobKind, Tier

ON_SLOW_CPU: Final = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
"""For properties whose examples may take long on a busy machine: no time limit per example, fewer examples."""

SHEET: Final = Tariff(
    provider=ZERO_ADDRESS,
    sequence=1,
    profile_id=ZERO_DIGEST,
    prompt_price=1_000,
    cached_price=100,
    completion_price=3_000,
    reasoning_price=4_000,
    per_request=77,
    flex_bps=5_000,
    standard_bps=10_000,
    priority_bps=20_000,
    flex_ttft_ms=0,
    standard_ttft_ms=1_000,
    priority_ttft_ms=250,
    flex_tpot_ms=0,
    standard_tpot_ms=100,
    priority_tpot_ms=20,
    flex_refund_bps=0,
    standard_refund_bps=1_000,
    priority_refund_bps=5_000,
    long_context_threshold=32_000,
    long_context_bps=15_000,
    privacy_bps=12_000,
    reserved_discount_bps=2_000,
    embedding_price=200,
    cache_ttl_s=300,
    base_min_bps=10_000,
    base_max_bps=20_000,
    valid_from=1_700_000_000,
    valid_until=1_800_000_000,
)

PROFILE: Final = Profile(
    **dict.fromkeys(
        (
            "weights_root",
            "tokenizer_hash",
            "chat_template_hash",
            "special_policy_hash",
            "dtype_hash",
            "kv_dtype_hash",
            "engine_hash",
            "sampler_hash",
        ),
        ZERO_DIGEST,
    ),
    margin_milli=100,
    logprob_micro=10000,
    projection_micro=20000,
    flag_ppm=1_000,
    active_parameters=8_000_000_000,
    total_parameters=8_000_000_000,
    body_parameters=7_000_000_000,
    head_parameters=500_000_000,
    layers=32,
    heads=32,
    head_dim=128,
    window=0,
    moe_layers=0,
    experts=0,
    experts_chosen=0,
    reasoning_start=0,
    reasoning_end=0,
)

BASIS: Final = Basis()
tiers = st.sampled_from(Tier)
prices = st.one_of(st.integers(0, 10**6), st.integers(0, MAX_PRICE), st.just(MAX_PRICE))
shares = st.integers(0, BPS)
milliseconds = st.one_of(st.just(0), st.integers(1, 10_000))
prompt_counts = st.one_of(st.integers(0, 200), st.integers(0, MAX_PROMPT_TOKENS), st.just(MAX_PROMPT_TOKENS))


def multipliers(most: int = MAX_MULTIPLIER_BPS) -> st.SearchStrategy[int]:
    """Basis points, often x1 and often the extremes."""
    return st.one_of(st.just(min(BPS, most)), st.integers(0, most), st.just(most))


@st.composite
def tariffs(draw: st.DrawFn, least_bps: int = 0) -> Tariff:
    """Any tariff that `check_tariff` admits. `least_bps`: smallest long-context and privacy multiplier."""
    context = max(least_bps, draw(multipliers()))
    privacy = max(least_bps, draw(multipliers(MAX_MULTIPLIER_BPS * BPS // max(BPS, context))))
    most = MAX_MULTIPLIER_BPS * BPS**2 // (max(BPS, context) * max(BPS, privacy))
    base_max = max(1, draw(multipliers(min(MAX_MULTIPLIER_BPS, most))))
    # at least 1: a tier at zero is not offered
    tier_bps = multipliers(most * BPS // max(BPS, base_max)).map(lambda bps: max(1, bps))
    prompt_price = draw(prices)
    valid_from = draw(st.integers(0, 2**40))
    names = [f"{tier}_{term}" for tier in ("flex", "standard", "priority") for term in ("ttft_ms", "tpot_ms")]
    return Tariff(
        provider=ZERO_ADDRESS,
        sequence=draw(st.integers(0, 2**64 - 1)),
        profile_id=ZERO_DIGEST,
        prompt_price=prompt_price,
        cached_price=draw(st.integers(0, prompt_price)),
        completion_price=draw(prices),
        reasoning_price=draw(prices),
        per_request=draw(prices),
        flex_bps=draw(tier_bps),
        standard_bps=draw(tier_bps),
        priority_bps=draw(tier_bps),
        **{name: draw(milliseconds) for name in names},
        flex_refund_bps=draw(shares),
        standard_refund_bps=draw(shares),
        priority_refund_bps=draw(shares),
        long_context_threshold=draw(prompt_counts),
        long_context_bps=context,
        privacy_bps=privacy,
        reserved_discount_bps=draw(shares),
        embedding_price=draw(prices),
        cache_ttl_s=draw(st.integers(0, 86_400)),
        base_min_bps=draw(st.integers(1, base_max)),
        base_max_bps=base_max,
        valid_from=valid_from,
        valid_until=valid_from + draw(st.integers(1, 2**32)),
    )


@st.composite
def bases(draw: st.DrawFn, tariff: Tariff) -> Basis:
    """Any basis that jobs are sold on under the tariff."""
    kind = draw(st.sampled_from(JobKind))
    tier = Tier.FLEX if kind is JobKind.BATCH else draw(tiers)
    if draw(st.booleans()):
        return Basis(kind, tier, draw(st.booleans()), BPS - tariff.reserved_discount_bps, Digest(b"\x77" * 32))
    return Basis(kind, tier, draw(st.booleans()), draw(st.integers(tariff.base_min_bps, tariff.base_max_bps)))


@st.composite
def sales(draw: st.DrawFn, least_bps: int = 0) -> tuple[Tariff, Basis, Usage]:
    """A tariff, a basis that jobs are sold on under it, and counts that a job of that kind can have."""
    tariff = draw(tariffs(least_bps))
    basis = draw(bases(tariff))
    if basis.kind is JobKind.EMBED:  # reads texts, and neither hits a cache nor writes tokens
        return tariff, basis, Usage(draw(prompt_counts), 0, 0, 0)
    return tariff, basis, draw(usages())


@st.composite
def usages(draw: st.DrawFn, prompt: st.SearchStrategy[int] = prompt_counts) -> Usage:
    """Counts of a job within the protocol's bound on a context."""
    prompts, completions = draw(prompt), draw(prompt_counts)
    return Usage(prompts, draw(st.integers(0, prompts)), completions, draw(st.integers(0, completions)))


@st.composite
def timings(draw: st.DrawFn) -> Timing:
    """Times in order; zero where it has not happened. Any wait for vouchers."""
    received = draw(st.integers(1, 2**41))
    first = draw(st.one_of(st.just(0), st.integers(received, received + 20_000)))
    start = max(received, first)
    finished = draw(st.one_of(st.just(0), st.integers(start, start + 10**6)))
    return Timing(received, first, finished, draw(st.one_of(st.just(0), st.integers(0, 10**6))))


def exact_metered(tariff: Tariff, usage: Usage, basis: Basis) -> Fraction:
    """The formula of the specification, unrounded, written down a second time."""
    tier_bps = {Tier.FLEX: tariff.flex_bps, Tier.STANDARD: tariff.standard_bps, Tier.PRIORITY: tariff.priority_bps}
    factor = Fraction(tier_bps[basis.tier], 10_000)
    if usage.prompt > tariff.long_context_threshold:
        factor *= Fraction(tariff.long_context_bps, 10_000)
    if basis.private:
        factor *= Fraction(tariff.privacy_bps, 10_000)
    if basis.reservation == ZERO_DIGEST:
        factor *= Fraction(basis.base_bps, 10_000)
    else:
        factor *= 1 - Fraction(tariff.reserved_discount_bps, 10_000)
    if basis.kind is JobKind.EMBED:
        return factor * usage.prompt * tariff.embedding_price
    return factor * (
        (usage.prompt - usage.cached) * tariff.prompt_price
        + usage.cached * tariff.cached_price
        + (usage.completion - usage.reasoning) * tariff.completion_price
        + usage.reasoning * tariff.reasoning_price
    )
