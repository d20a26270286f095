"""What a provider's own signed documents prove against it: a charge that its published tariff does not give, and more.

Every fault is judged from at most four documents, all signed by the accused: the tariff and the receipt that names it
(the two-document proof of a wrong charge), two tariffs under one sequence number, two receipts of one job that
contradict each other, two receipts with the tariff that promised a cache hit, or a commitment with entries of its tree.
`judge` needs no node, no journal and no chain. What it cannot know, the chain says: that the node key is the provider's
(the Registry), how long an epoch is, and for UNCOMMITTED that no commitment was made in time (the Court).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import pairwise
from typing import Final

from incentives.audit_draw import case_key
from protocol.cache import underreported
from protocol.eip712 import Domain, digest
from protocol.errors import FieldOutOfRange, TallyError, TierNotOffered
from protocol.merkle import Entry, SumNode, prove
from protocol.merkle import verify as verify_entry
from protocol.messages import Commitment, Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.signing import verify
from protocol.tariff import Cost, Timing, basis_of, check_basis, cost_up
from protocol.units import Address, Digest, JobId, Wei


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
    BROKEN_CHAIN = "broken chain of receipts"
    MISSING = "job missing from the commitment"
    UNSORTED = "commitment out of order"
    UNCOMMITTED = "no commitment for a job's epoch"


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
class SignedRoot:
    """A commitment and its signature."""

    commitment: Commitment
    signature: bytes


@dataclass(frozen=True, slots=True)
class Placed:
    """An entry of a commitment's tree, where it stands, and the siblings that prove it (merkle.py)."""

    entry: Entry
    index: int
    siblings: tuple[SumNode, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """The whole evidence of one fault. `between`: block digests from the first receipt's prompt to the second's.

    `roots`, `placed`: a commitment and entries of its tree, by index. `epoch_s`: seconds of one epoch, which the Court
    states; 0 where no epoch matters.
    """

    domain: Domain
    node_key: Address
    fault: Fault
    tariffs: tuple[SignedTariff, ...]
    receipts: tuple[SignedReceipt, ...] = ()
    between: tuple[Digest, ...] = ()
    roots: tuple[SignedRoot, ...] = ()
    placed: tuple[Placed, ...] = ()
    epoch_s: int = 0


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


def broken_chain(domain: Domain, earlier: WorkReceipt, later: WorkReceipt) -> Finding | None:
    """Whether two receipts of one job, the later of a higher step, cannot both be of one honest chain.

    Receipts are totals: each names the one before it, none follows a final one, and no count falls; nor does the
    total, at one multiplier and without a refund.
    """
    if (earlier.provider, earlier.job_id) != (later.provider, later.job_id) or later.step <= earlier.step:
        return None
    steps = f"steps {earlier.step} and {later.step} of one job"
    if later.step == earlier.step + 1 and later.previous != digest(domain, earlier):
        return Finding(Fault.BROKEN_CHAIN, f"{steps}: the later one names another receipt as the one before it")
    if earlier.is_final:
        return Finding(Fault.BROKEN_CHAIN, f"{steps}: the earlier one was final")
    for name in ("prompt_tokens", "completion_tokens", "reasoning_tokens", "ste_micro"):
        before, after = getattr(earlier, name), getattr(later, name)
        if after < before:
            return Finding(Fault.BROKEN_CHAIN, f"{steps}: {name} fell from {before} to {after}")
    if later.total < earlier.total and later.refund == 0 and later.multiplier == earlier.multiplier:
        return Finding(Fault.BROKEN_CHAIN, f"{steps}: the total fell from {earlier.total} to {later.total} wei")
    return None


# -------------------------------------------------------------------------------------------------------- commitments


def epoch_of(receipt: WorkReceipt, epoch_s: int) -> int:
    """The epoch that a job belongs to: when its provider received it, whenever it ended."""
    return receipt.received_at // 1000 // epoch_s


def neighbours(entries: Sequence[Entry], job_id: JobId) -> tuple[Placed, ...] | None:
    """What shows that a job is not among `entries`, a tree in order: the entries it would stand between.

    None when it is there. () for an empty tree, one entry at either end.
    """
    after = bisect_left(entries, job_id, key=lambda entry: entry.job_id)
    if after < len(entries) and entries[after].job_id == job_id:
        return None
    return tuple(_placed(entries, index) for index in (after - 1, after) if 0 <= index < len(entries))


def out_of_order(entries: Sequence[Entry]) -> tuple[Placed, Placed] | None:
    """The first two neighbours of a committed tree that are not in ascending order; None in an honest one."""
    for index, (left, right) in enumerate(pairwise(entries)):
        if left.job_id >= right.job_id:
            return _placed(entries, index), _placed(entries, index + 1)
    return None


def _placed(entries: Sequence[Entry], index: int) -> Placed:
    return Placed(entries[index], index, prove(entries, index))


def _owed_to(tariff: Tariff, receipt: WorkReceipt, epoch_s: int) -> tuple[Address, Digest, int] | None:
    """(provider, profile, epoch) of the commitment that has to hold the receipt's job; None without an epoch."""
    if epoch_s <= 0:
        return None
    return Address(receipt.provider), Digest(tariff.profile_id), epoch_of(receipt, epoch_s)


def missing(
    tariff: Tariff, receipt: WorkReceipt, root: Commitment, around: tuple[Placed, ...], epoch_s: int
) -> Finding | None:
    """Whether the job of a signed receipt is absent from the commitment it belongs in.

    `tariff`: the one the receipt names, which says the profile. `around`: as `neighbours` gives it.
    """
    if _owed_to(tariff, receipt, epoch_s) != (root.provider, root.profile_id, root.epoch):
        return None
    if not all(_stands(root, item) for item in around):
        return None
    match around:
        case []:
            absent = root.count == 0
        case [only] if only.index == 0 and receipt.job_id < only.entry.job_id:
            absent = True
        case [only]:
            absent = only.index == root.count - 1 and only.entry.job_id < receipt.job_id
        case [left, right]:
            between = left.entry.job_id < receipt.job_id < right.entry.job_id
            absent = between and right.index == left.index + 1
        case _:
            absent = False
    detail = f"job {receipt.job_id.hex()[:12]} is none of the {root.count} committed for epoch {root.epoch}"
    return Finding(Fault.MISSING, detail) if absent else None


def unsorted(root: Commitment, left: Placed, right: Placed) -> Finding | None:
    """Whether two neighbours of a commitment's tree are not in ascending order of job id."""
    if not (_stands(root, left) and _stands(root, right) and right.index == left.index + 1):
        return None
    if left.entry.job_id < right.entry.job_id:
        return None
    return Finding(Fault.UNSORTED, f"entries {left.index} and {right.index} of epoch {root.epoch} are out of order")


def uncommitted(tariff: Tariff, receipt: WorkReceipt, epoch_s: int) -> Finding | None:
    """That a job makes a commitment due for its epoch and profile. Whether one was made in time, the Court says."""
    owed = _owed_to(tariff, receipt, epoch_s)
    if owed is None:
        return None
    key = case_key(*owed).hex()[:12]
    return Finding(Fault.UNCOMMITTED, f"a job of epoch {owed[2]} is signed, so commitment {key} was due")


def _stands(root: Commitment, item: Placed) -> bool:
    top = SumNode(Digest(root.root), Wei(root.total))
    return verify_entry(item.entry, item.index, root.count, item.siblings, top)


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
        for root in proof.roots:
            verify(proof.domain, root.commitment, root.signature, proof.node_key)
    except TallyError as exc:
        raise ProofFails(str(exc)) from exc
    for item in proof.receipts:
        if hashes and item.receipt.tariff_hash not in hashes:
            raise ProofFails("the receipt names another tariff")
        if hashes and item.receipt.provider != proof.tariffs[0].tariff.provider:
            raise ProofFails("tariff and receipt are of different providers")


_PAIRS: Final = frozenset({Fault.TWO_TARIFFS, Fault.TWO_RECEIPTS, Fault.HIDDEN_HIT, Fault.BROKEN_CHAIN})
_OF_TREES: Final = frozenset({Fault.MISSING, Fault.UNSORTED, Fault.UNCOMMITTED})


def _shown(proof: Proof) -> Finding | None:
    tariffs = [item.tariff for item in proof.tariffs]
    receipts = [item.receipt for item in proof.receipts]
    if proof.fault in _OF_TREES:
        return _shown_by_tree(proof, tariffs, receipts)
    match proof.fault, tariffs, receipts:
        case Fault.TWO_TARIFFS, [first, second], []:
            return two_tariffs(proof.domain, first, second)
        case Fault.TWO_RECEIPTS, [], [one, other]:
            return two_receipts(proof.domain, one, other)
        case Fault.BROKEN_CHAIN, [], [earlier, later]:
            return broken_chain(proof.domain, earlier, later)
        case Fault.HIDDEN_HIT, [tariff], [kept, later]:
            return hidden_hit(kept, later, tariff, proof.between)
        case _, [tariff], [receipt] if proof.fault not in _PAIRS:
            return next((item for item in charge_findings(tariff, receipt) if item.fault is proof.fault), None)
        case _:
            return None


def _shown_by_tree(proof: Proof, tariffs: list[Tariff], receipts: list[WorkReceipt]) -> Finding | None:
    roots = [item.commitment for item in proof.roots]
    match proof.fault, tariffs, receipts, roots:
        case Fault.MISSING, [tariff], [receipt], [root]:
            return missing(tariff, receipt, root, proof.placed, proof.epoch_s)
        case Fault.UNSORTED, [], [], [root] if len(proof.placed) == 2:
            return unsorted(root, *proof.placed)
        case Fault.UNCOMMITTED, [tariff], [receipt], []:
            return uncommitted(tariff, receipt, proof.epoch_s)
        case _:
            return None


def overcharged(findings: tuple[Finding, ...]) -> Wei:
    """Wei charged above the tariff in all. Receipts are totals of their job: pass the last of each."""
    return Wei(sum(max(0, item.excess) for item in findings))
