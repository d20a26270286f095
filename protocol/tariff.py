"""The price sheet and the one cost formula, in integers, rounded once (up) per receipt.

    total = ceil(m_tier * m_context * m_privacy * m_base * (prompt_line + cached_line + completion_line
            + reasoning_line) / 10**16) + per_request - refund

An embedding job's prompt line is at the embedding price and its other lines are zero.

Lines are exact; the four multipliers are basis points, so their product has scale 10**16. The refund is a share
(rounded down, in the provider's favour by less than one wei) of the metered part when the tier's promise is missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.errors import FieldOutOfRange, TariffNotInForce, TierNotOffered
from protocol.messages import JobRequest, Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.units import BPS, MAX_AMOUNT, ZERO_DIGEST, Digest, JobKind, Tier, Wei

MULTIPLIER_ONE: Final = BPS**4
"""x1 as the product of four basis-point multipliers."""

MAX_MULTIPLIER_BPS: Final = 100 * BPS
"""Largest single multiplier a tariff may carry. Unit: bps (x100). Four of them at this bound would overflow the
receipt's uint64, so `check_tariff` bounds the product of the tariff's own four as well."""

PRICES: Final = (
    "prompt_price",
    "cached_price",
    "completion_price",
    "reasoning_price",
    "embedding_price",
    "per_request",
)
"""The fields of a tariff that are prices in wei. All may be zero: a free tier is legal."""

MAX_PRICE: Final = 10**19
"""Largest price per token or request. Unit: wei (10 TALLY). A line of 2**32 - 1 tokens at it still fits uint96, which
it would not at the double, and so does a total over 2**21 tokens at x100."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When the job came in, gave its first token, and ended. Unix milliseconds; 0 where it has not happened yet.

    `waited_ms`: how long the provider waited for the client's vouchers on the way.
    """

    received_at: int
    first_token_at: int
    finished_at: int
    waited_ms: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """The lines of a receipt, in wei; `multiplier` has scale 10**16."""

    prompt_line: Wei
    cached_line: Wei
    completion_line: Wei
    reasoning_line: Wei
    multiplier: int
    per_request: Wei
    refund: Wei
    total: Wei


@dataclass(frozen=True, slots=True)
class Basis:
    """What a job is priced by besides its counts. `base_bps`: base multiplier; `reservation`: zero for none.

    Raises: FieldOutOfRange for batch work at another tier than flex, at whose price alone it is sold.
    """

    kind: JobKind = JobKind.GENERATE
    tier: Tier = Tier.STANDARD
    private: bool = False
    base_bps: int = BPS
    reservation: Digest = ZERO_DIGEST

    def __post_init__(self) -> None:
        if self.kind == JobKind.BATCH and self.tier != Tier.FLEX:
            raise FieldOutOfRange("JobRequest", "tier", self.tier)


def basis_of(document: JobRequest | WorkReceipt) -> Basis:
    """The pricing basis a request signs, or a receipt repeats.

    Raises: FieldOutOfRange for a kind or tier that is unknown, or that do not go together.
    """
    name = type(document).__name__
    if document.kind not in tuple(JobKind):
        raise FieldOutOfRange(name, "kind", document.kind)
    if document.tier not in tuple(Tier):
        raise FieldOutOfRange(name, "tier", document.tier)
    return Basis(
        JobKind(document.kind),
        Tier(document.tier),
        document.is_private,
        document.base_bps,
        Digest(document.reservation),
    )


def check_basis(tariff: Tariff, basis: Basis) -> None:
    """Whether anything may be sold on this basis under the tariff.

    Raises: TierNotOffered; FieldOutOfRange when the base multiplier is outside the published bounds, or is not the
    reserved price that a reservation gives.
    """
    # SPEC 5.6: A tier whose multiplier is zero is not offered
    if tier_terms(tariff, basis.tier)[0] == 0:
        raise TierNotOffered(basis.tier.name.lower())
    if basis.reservation != ZERO_DIGEST:
        if basis.base_bps != BPS - tariff.reserved_discount_bps:
            raise FieldOutOfRange("JobRequest", "base_bps", basis.base_bps)
    elif not tariff.base_min_bps <= basis.base_bps <= tariff.base_max_bps:
        raise FieldOutOfRange("JobRequest", "base_bps", basis.base_bps)


def tier_terms(tariff: Tariff, tier: Tier) -> tuple[int, int, int, int]:
    """(multiplier bps, promised TTFT ms, promised TPOT ms, refund bps) of a tier. A promise of 0 ms is no promise."""
    match tier:
        case Tier.FLEX:
            return tariff.flex_bps, tariff.flex_ttft_ms, tariff.flex_tpot_ms, tariff.flex_refund_bps
        case Tier.STANDARD:
            return tariff.standard_bps, tariff.standard_ttft_ms, tariff.standard_tpot_ms, tariff.standard_refund_bps
        case Tier.PRIORITY:
            return tariff.priority_bps, tariff.priority_ttft_ms, tariff.priority_tpot_ms, tariff.priority_refund_bps


def check_tariff(tariff: Tariff) -> None:
    """Refuse a sheet whose numbers could overflow a receipt or refund more than was charged.

    Raises: FieldOutOfRange naming the field.
    """
    for name in PRICES:
        if not 0 <= getattr(tariff, name) <= MAX_PRICE:
            raise FieldOutOfRange("Tariff", name, getattr(tariff, name))
    multipliers = ("flex_bps", "standard_bps", "priority_bps", "long_context_bps", "privacy_bps")
    for name in (*multipliers, "base_min_bps", "base_max_bps"):
        if not 0 <= getattr(tariff, name) <= MAX_MULTIPLIER_BPS:
            raise FieldOutOfRange("Tariff", name, getattr(tariff, name))
    for name in ("flex_refund_bps", "standard_refund_bps", "priority_refund_bps", "reserved_discount_bps"):
        if not 0 <= getattr(tariff, name) <= BPS:
            raise FieldOutOfRange("Tariff", name, getattr(tariff, name))
    if tariff.cached_price > tariff.prompt_price:
        raise FieldOutOfRange("Tariff", "cached_price", tariff.cached_price)
    if tariff.base_min_bps == 0:  # from which the rule could hardly rise, and everything would be free meanwhile
        raise FieldOutOfRange("Tariff", "base_min_bps", 0)
    if not tariff.base_min_bps <= tariff.base_max_bps:
        raise FieldOutOfRange("Tariff", "base_max_bps", tariff.base_max_bps)
    largest = max(tariff.flex_bps, tariff.standard_bps, tariff.priority_bps)
    if largest == 0:
        raise FieldOutOfRange("Tariff", "standard_bps", 0)  # a sheet that offers no tier sells nothing
    raised = max(BPS, tariff.long_context_bps) * max(BPS, tariff.privacy_bps) * max(BPS, tariff.base_max_bps)
    if largest * raised > 100 * BPS**4:
        raise FieldOutOfRange("Tariff", "multipliers", largest)
    if tariff.valid_until <= tariff.valid_from:
        raise FieldOutOfRange("Tariff", "valid_until", tariff.valid_until)


def check_in_force(tariff: Tariff, now: int) -> None:
    """`now`: Unix seconds. Raises: TariffNotInForce."""
    if not tariff.valid_from <= now < tariff.valid_until:
        raise TariffNotInForce(tariff.valid_from, tariff.valid_until, now)


def multiplier_of(tariff: Tariff, basis: Basis, prompt_tokens: int) -> int:
    """Product of the tier, context, privacy and base multipliers; scale 10**16. Raises: as check_basis."""
    check_basis(tariff, basis)
    context = tariff.long_context_bps if prompt_tokens > tariff.long_context_threshold else BPS
    privacy = tariff.privacy_bps if basis.private else BPS
    return tier_terms(tariff, basis.tier)[0] * context * privacy * basis.base_bps


def promise_missed(tariff: Tariff, tier: Tier, timing: Timing, completion_tokens: int) -> bool:
    """Whether the first token came later than promised or not at all, or at the end the average token was slower.

    The time a provider waits for vouchers is the client's own. A deadline the client chose is no promise: one that
    leaves the promised times room can be missed only by missing them.
    """
    # SPEC 5.2: A first token that has not come when the job ends is late once its time has passed
    _, ttft_ms, tpot_ms, _ = tier_terms(tariff, tier)
    waited_until = timing.first_token_at or timing.finished_at
    if waited_until and ttft_ms and waited_until - timing.received_at > ttft_ms:
        return True
    if not (timing.finished_at and tpot_ms and completion_tokens > 1):
        return False
    return timing.finished_at - timing.first_token_at - timing.waited_ms > tpot_ms * (completion_tokens - 1)


def cost_up(tariff: Tariff, usage: Usage, basis: Basis, timing: Timing) -> Cost:
    """What `usage` costs, all lines, rounded up once.

    Raises: FieldOutOfRange when the total does not fit a voucher, the basis is none of the tariff's, or an embedding
    job counts cached tokens or output; TierNotOffered.
    """
    embeds = basis.kind is JobKind.EMBED
    if embeds and usage.cached:
        raise FieldOutOfRange("Usage", "cached", usage.cached)
    if embeds and usage.completion:
        raise FieldOutOfRange("Usage", "completion", usage.completion)
    prompt_line = (usage.prompt - usage.cached) * (tariff.embedding_price if embeds else tariff.prompt_price)
    cached_line = usage.cached * tariff.cached_price
    completion_line = (usage.completion - usage.reasoning) * tariff.completion_price
    reasoning_line = usage.reasoning * tariff.reasoning_price
    multiplier = multiplier_of(tariff, basis, usage.prompt)
    lines = prompt_line + cached_line + completion_line + reasoning_line
    # SPEC 5.1: there is one rounding, up, per receipt
    metered = -(-multiplier * lines // MULTIPLIER_ONE)
    missed = promise_missed(tariff, basis.tier, timing, usage.completion)
    refund = metered * tier_terms(tariff, basis.tier)[3] // BPS if missed else 0
    total = metered + tariff.per_request - refund
    if total > MAX_AMOUNT:
        raise FieldOutOfRange("WorkReceipt", "total", total)
    return Cost(
        Wei(prompt_line),
        Wei(cached_line),
        Wei(completion_line),
        Wei(reasoning_line),
        multiplier,
        Wei(tariff.per_request),
        Wei(refund),
        Wei(total),
    )


def worst_case_up(tariff: Tariff, prompt_tokens: int, completion_tokens: int, basis: Basis) -> Wei:
    """The most such a job can cost: nothing cached, no refund, reasoning at whichever price is higher.

    Raises: FieldOutOfRange, TierNotOffered.
    """
    if basis.kind is JobKind.EMBED and completion_tokens:
        raise FieldOutOfRange("Usage", "completion", completion_tokens)
    read = tariff.embedding_price if basis.kind is JobKind.EMBED else tariff.prompt_price
    dearer = max(tariff.completion_price, tariff.reasoning_price)
    lengths = [prompt_tokens]
    if basis.kind is JobKind.EMBED:  # may end after any text, before it was long enough for a long-context discount
        lengths.append(min(prompt_tokens, tariff.long_context_threshold))
    metered = max(multiplier_of(tariff, basis, n) * (n * read + completion_tokens * dearer) for n in lengths)
    return Wei(-(-metered // MULTIPLIER_ONE) + tariff.per_request)
