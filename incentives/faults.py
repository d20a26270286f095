"""What a provider's own signed documents prove against it: a charge that its published tariff does not give, and more.

Every fault is judged from at most four documents, all signed by the accused: the tariff and the receipt that names it
(the two-document proof of a wrong charge), two tariffs under one sequence number, two receipts of one step, or two
receipts with the tariff that promised a cache hit. `judge` needs no node, no journal and no chain. One thing it cannot
know: that the node key belongs to the provider's wallet, which the Registry says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final

from protocol.cache import underreported
from protocol.eip712 import Domain, digest
from protocol.errors import FieldOutOfRange, TallyError, TierNotOffered
from protocol.messages import Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.signing import verify
from protocol.tariff import Cost, Timing, basis_of, check_basis, cost_up
from protocol.units import Address, Digest, Wei


class Fault(StrEnum):
    """What is proved. The first seven are of one receipt under the tariff it names."""

    OVERCHARGE = "overcharge"
    UNDERCHARGE = "undercharge"
    MISPRICED = "mispriced lines"
    OUT_OF_FORCE = "tariff not in force"
    TIER_NOT_OFFERED = "tier not offered"
    BASE_OUT_OF_BOUNDS = "base multiplier out of bounds"
    IMPOSSIBLE = "impossible receipt"
    TWO_TARIFFS = "two tariffs under one sequence"
    TWO_RECEIPTS = "two receipts of one step"
    HIDDEN_HIT = "underreported cache hit"


MOST_BETWEEN: Final = 1 << 15
"""Block digests of one cache proof. The longest prompt has as many blocks; more could lead nowhere."""


@dataclass
class ProofFails(TallyError):
    """The documents do not prove the fault they are said to."""

    reason: str

    def __str__(self) -> str:
        return f"the proof does not hold: {self.reason}"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault and what shows it. `excess`: wei charged above the tariff's price, negative below, 0 where no price is
    defined."""

    fault: Fault
    detail: str
    excess: int = 0


@dataclass(frozen=True, slots=True)
class SignedTariff:
    """A price sheet and its signature."""

    tariff: Tariff
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt and its signature."""

    receipt: WorkReceipt
    signature: bytes


@dataclass(frozen=True, slots=True)
class Proof:
    """The whole evidence of one fault. `between`: block digests from the first receipt's prompt to the second's."""

    domain: Domain
    node_key: Address
    fault: Fault
    tariffs: tuple[SignedTariff, ...]
    receipts: tuple[SignedReceipt, ...] = ()
    between: tuple[Digest, ...] = ()


def charge_findings(tariff: Tariff, receipt: WorkReceipt) -> tuple[Finding, ...]:
    """What is wrong with a receipt under the tariff it names; () when it is charged as published.

    The charge is judged from what the receipt itself states, so a wrong count is no fault here (an audit of the
    leaves finds those). A charge below the tariff is one: it is a price that other payers do not get.
    """
    found = []
    accepted = receipt.received_at // 1000
    if not tariff.valid_from <= accepted < tariff.valid_until:
        window = f"from {tariff.valid_from} until {tariff.valid_until}"
        found.append(Finding(Fault.OUT_OF_FORCE, f"accepted at {accepted}, in force {window}"))
    wrong = _price_finding(tariff, receipt)
    return (*found, wrong) if wrong is not None else tuple(found)


def _price_finding(tariff: Tariff, receipt: WorkReceipt) -> Finding | None:
    """The first thing wrong with the price itself."""
    try:
        usage = Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens, receipt.reasoning_tokens)
        basis = basis_of(receipt)
    except FieldOutOfRange as exc:
        return Finding(Fault.IMPOSSIBLE, str(exc))
    try:
        check_basis(tariff, basis)
    except TierNotOffered as exc:
        return Finding(Fault.TIER_NOT_OFFERED, str(exc))
    except FieldOutOfRange:
        bounds = f"{tariff.base_min_bps} to {tariff.base_max_bps} bps, reserved discount {tariff.reserved_discount_bps}"
        return Finding(Fault.BASE_OUT_OF_BOUNDS, f"base multiplier {receipt.base_bps} bps; the tariff gives {bounds}")
    timing = Timing(receipt.received_at, receipt.first_token_at, receipt.finished_at, receipt.waited_ms)
    try:
        expected = cost_up(tariff, usage, basis, timing)
    except FieldOutOfRange as exc:
        return Finding(Fault.IMPOSSIBLE, str(exc))
    for item in fields(Cost):
        claimed, due = getattr(receipt, item.name), getattr(expected, item.name)
        if claimed != due:
            excess = receipt.total - expected.total
            fault = Fault.OVERCHARGE if excess > 0 else Fault.UNDERCHARGE if excess < 0 else Fault.MISPRICED
            return Finding(fault, f"{item.name} is {claimed}, the tariff gives {due}", excess)
    return None


def hidden_hit(
    kept: WorkReceipt, later: WorkReceipt, tariff: Tariff, between: tuple[Digest, ...] = ()
) -> Finding | None:
    """Whether `later` charges in full what `kept` promised to hold (protocol/cache.py)."""
    missing = underreported(kept, later, tariff, between)
    if missing == 0:
        return None
    gap = missing * (tariff.prompt_price - tariff.cached_price)
    return Finding(Fault.HIDDEN_HIT, f"{missing} tokens promised as cached were charged in full: {gap} wei of lines")


def two_tariffs(domain: Domain, first: Tariff, second: Tariff) -> Finding | None:
    """Whether two sheets claim one sequence number of one provider and profile."""
    same = (first.provider, first.profile_id, first.sequence) == (second.provider, second.profile_id, second.sequence)
    if not same or digest(domain, first) == digest(domain, second):
        return None
    return Finding(Fault.TWO_TARIFFS, f"sequence {first.sequence} was signed for two different sheets")


def two_receipts(domain: Domain, first: WorkReceipt, second: WorkReceipt) -> Finding | None:
    """Whether two receipts claim one step of one job."""
    same = (first.provider, first.job_id, first.step) == (second.provider, second.job_id, second.step)
    if not same or digest(domain, first) == digest(domain, second):
        return None
    return Finding(Fault.TWO_RECEIPTS, f"step {first.step} of one job was signed twice", second.total - first.total)


# --------------------------------------------------------------------------------------------------------------- judge


def judge(proof: Proof) -> Finding:
    """What the proof shows, from its documents alone.

    Raises: ProofFails when a document is not of the accused, or they do not show the fault named.
    """
    if len(proof.between) > MOST_BETWEEN:
        raise ProofFails(f"{len(proof.between)} block digests are more than any prompt has")
    _check_signatures(proof)
    found = _shown(proof)
    if found is None:
        raise ProofFails(f"the documents show no {proof.fault.value}")
    return found


def _check_signatures(proof: Proof) -> None:
    """Raises: ProofFails."""
    try:
        hashes = [verify(proof.domain, item.tariff, item.signature, proof.node_key) for item in proof.tariffs]
        for item in proof.receipts:
            verify(proof.domain, item.receipt, item.signature, proof.node_key)
    except TallyError as exc:
        raise ProofFails(str(exc)) from exc
    for item in proof.receipts:
        if hashes and item.receipt.tariff_hash not in hashes:
            raise ProofFails("the receipt names another tariff")
        if hashes and item.receipt.provider != proof.tariffs[0].tariff.provider:
            raise ProofFails("tariff and receipt are of different providers")


def _shown(proof: Proof) -> Finding | None:
    tariffs = [item.tariff for item in proof.tariffs]
    receipts = [item.receipt for item in proof.receipts]
    match proof.fault, tariffs, receipts:
        case Fault.TWO_TARIFFS, [first, second], []:
            return two_tariffs(proof.domain, first, second)
        case Fault.TWO_RECEIPTS, [], [one, other]:
            return two_receipts(proof.domain, one, other)
        case Fault.HIDDEN_HIT, [tariff], [kept, later]:
            return hidden_hit(kept, later, tariff, proof.between)
        case ((Fault.TWO_TARIFFS | Fault.TWO_RECEIPTS | Fault.HIDDEN_HIT), _, _):
            return None
        case _, [tariff], [receipt]:
            return next((item for item in charge_findings(tariff, receipt) if item.fault is proof.fault), None)
        case _:
            return None


def overcharged(findings: tuple[Finding, ...]) -> Wei:
    """Wei charged above the tariff in all. Receipts are totals of their job: pass the last of each."""
    return Wei(sum(max(0, item.excess) for item in findings))
