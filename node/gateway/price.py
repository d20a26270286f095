"""What a job may cost at most under the offers known now, before it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from node.gateway.errors import ApiError, in_tally, invalid
from node.ports import JobSpec, MarketEntry
from protocol.tariff import Basis, tier_terms, worst_case_up
from protocol.units import BPS, ZERO_DIGEST, Digest, JobKind, Tier, Wei


@dataclass(frozen=True, slots=True)
class Price:
    """The worst case under the cheapest and under the dearest offer that can take the job. `offers`: how many can.

    `objection`: what to say if nobody takes it, where the offers known now show why: 400 when none sells the tier, 402
    when all could cost more than the ceiling. It is no verdict: the marketplace may know another way.
    """

    offers: int = 0
    least: Wei = field(default=Wei(0))
    most: Wei = field(default=Wei(0))
    objection: ApiError | None = None


def price_up(entries: Sequence[MarketEntry], spec: JobSpec, profile: Digest) -> Price:
    """Worst cases, in wei; of no offers when none can take the job."""
    tier = Tier(spec.tier)
    if entries and not any(tier_terms(entry.tariff, tier)[0] for entry in entries):
        said = (
            f"Nobody sells {spec.model!r} at the {tier.name.lower()} tier. Nothing was sent or paid. Ask for another."
        )
        return Price(objection=invalid("service_tier", said, "tier_not_offered"))
    costs = [_worst(entry, spec) for entry in entries if _fits(entry, spec, profile)]
    if not costs:
        return Price()
    ceiling = spec.price_ceiling
    if ceiling is not None and min(costs) > ceiling:
        said = f"The job could cost {in_tally(min(costs))}, above the limit of {in_tally(ceiling)}."
        said = f"{said} Nothing was sent or paid. Ask for fewer tokens, or allow more."
        return Price(objection=ApiError(402, "insufficient_quota", "price_ceiling", said))
    return Price(len(costs), Wei(min(costs)), Wei(max(cost for cost in costs if ceiling is None or cost <= ceiling)))


def price_json(spec: JobSpec, price: Price) -> dict[str, Any]:
    """The answer to a dry run. Amounts are wei as decimal strings, None where no offer can take the job now.

    Raises: ApiError, the price's objection.
    """
    if price.objection is not None:
        raise price.objection
    return {
        "object": "tally.price",
        "model": spec.model,
        "prompt_tokens": len(spec.prompt),
        "max_tokens": spec.max_tokens,
        "offers": price.offers,
        "least_wei": str(price.least) if price.offers else None,
        "most_wei": str(price.most) if price.offers else None,
    }


def _fits(entry: MarketEntry, spec: JobSpec, profile: Digest) -> bool:
    longest = max(spec.options.inputs, default=len(spec.prompt) + spec.max_tokens)
    return (
        entry.profile == profile
        and longest <= entry.max_context
        and spec.max_tokens <= entry.max_output
        and (not spec.only or entry.provider in spec.only)
        and tier_terms(entry.tariff, Tier(spec.tier))[0] > 0
    )


def _worst(entry: MarketEntry, spec: JobSpec) -> int:
    reserved = spec.reservation != ZERO_DIGEST
    base_bps = BPS - entry.tariff.reserved_discount_bps if reserved else entry.base_bps
    basis = Basis(JobKind(spec.kind), Tier(spec.tier), spec.private, base_bps, spec.reservation)
    return worst_case_up(entry.tariff, len(spec.prompt), spec.max_tokens, basis)
