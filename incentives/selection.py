"""Which provider a job goes to: hard limits first, then cost, wait and load. Integers only, order fixed by `salt`.

Pure and deterministic: the same candidates and salt give the same order everywhere. The salt spreads equal offers
over equal providers instead of always favouring the lowest address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from protocol.errors import FieldOutOfRange, TierNotOffered
from protocol.messages import Offer, Tariff
from protocol.metering import Usage
from protocol.packing import pack
from protocol.tariff import Basis, Timing, cost_up, worst_case_up
from protocol.units import BPS, ZERO_DIGEST, Address, Digest, JobKind, Tier, Wei

MAX_QUOTES: Final = 8
"""Providers asked for a quote per job. Unit: peers. Beyond that the best of n hardly improves and each ask costs a
stream; below 3 one slow peer decides."""

WAIT_COST_BPS_PER_S: Final = 500
"""What a second of expected wait counts for, as a share of the job's cost: 5 %. Doubling it makes clients flee load
sooner and pay more."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Hard limits of one job. `ceiling`: most wei it may cost. `only`: who may take it, anybody when empty.

    `longest`: tokens of the longest text of an embedding job, of which each has the context to itself.
    """

    profile_id: Digest | None
    prompt_tokens: int
    max_tokens: int
    tier: Tier
    private: bool
    ceiling: Wei
    kind: JobKind = JobKind.GENERATE
    reservation: Digest = ZERO_DIGEST
    only: frozenset[Address] = frozenset()
    longest: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One live, verified offer. `queue_ms`: the provider's own estimate, None before it was asked."""

    offer: Offer
    tariff: Tariff
    queue_ms: int | None = None


def basis_for(offer: Offer, tariff: Tariff, needs: Needs) -> Basis:
    """What a job is priced by under an offer: its base multiplier, or the reserved price that knows no congestion.

    Raises: FieldOutOfRange for batch work at another tier than flex.
    """
    reserved = needs.reservation != ZERO_DIGEST
    base_bps = BPS - tariff.reserved_discount_bps if reserved else offer.base_bps
    return Basis(needs.kind, needs.tier, needs.private, base_bps, needs.reservation)


def rule_out(candidate: Candidate, needs: Needs, now_s: int) -> str | None:
    """Why the candidate cannot take the job, or None when it can."""
    offer, tariff = candidate.offer, candidate.tariff
    if offer.expires_at <= now_s:
        return "its offer has expired"
    if not tariff.valid_from <= now_s < tariff.valid_until:
        return "its tariff is not in force"
    if needs.profile_id is not None and offer.profile_id != needs.profile_id:
        return "it serves another profile"
    if needs.only and offer.provider not in needs.only:
        return "another provider was asked for"
    if (needs.longest or needs.prompt_tokens + needs.max_tokens) > offer.max_context:
        return f"its context holds {offer.max_context} tokens"
    if needs.max_tokens > offer.max_output:
        return f"its output is limited to {offer.max_output} tokens"
    try:
        worst = worst_case_up(tariff, needs.prompt_tokens, needs.max_tokens, basis_for(offer, tariff, needs))
    except (TierNotOffered, FieldOutOfRange) as exc:
        return str(exc)  # what its sheet has no price for stops nobody's search for another
    if worst > needs.ceiling:
        return f"it could cost {worst} wei, above the ceiling of {needs.ceiling}"
    return None


def expected_cost(candidate: Candidate, needs: Needs) -> Wei:
    """Cost if the whole allowance is used: what offers are compared by. Wei."""
    usage = Usage(needs.prompt_tokens, 0, needs.max_tokens, 0)
    basis = basis_for(candidate.offer, candidate.tariff, needs)
    return cost_up(candidate.tariff, usage, basis, Timing(0, 0, 0)).total


def _score(candidate: Candidate, needs: Needs, penalties: Mapping[Address, int]) -> int:
    cost = expected_cost(candidate, needs) + 1
    wait_ms = candidate.queue_ms if candidate.queue_ms is not None else 0
    load = min(candidate.offer.load_bps, BPS)
    waited = cost * (BPS * 1000 + wait_ms * WAIT_COST_BPS_PER_S) // 1000
    return waited * (2 * BPS + load) * (1 + penalties.get(candidate.offer.provider, 0))


def rank(
    candidates: Iterable[Candidate], needs: Needs, salt: bytes, now_s: int, penalties: Mapping[Address, int]
) -> list[Candidate]:
    """Candidates that can take the job, best first. `penalties`: recent failures per provider wallet, >= 0."""

    def tie(candidate: Candidate) -> tuple[bytes, bytes]:
        return hashlib.sha256(salt + candidate.offer.provider).digest(), pack(candidate.offer)

    fit = [candidate for candidate in candidates if rule_out(candidate, needs, now_s) is None]
    return sorted(fit, key=lambda candidate: (_score(candidate, needs, penalties), tie(candidate)))
