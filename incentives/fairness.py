"""Fairness of a provider from its signed documents: charges, completeness against settlement, sales below cost.

`charge_faults` finds every charge that a published tariff does not give, with the documents that prove it;
`channel_books` compares receipts with vouchers and with what the chain paid; `commitment_gap` compares jobs with the
Merkle-sum root of an epoch and profile; `below_cost` compares revenue with a declared cost. Differences in service
between payers are in alike.py. README.md of this folder has the equations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from incentives.faults import (
    Fault,
    Finding,
    Proof,
    SignedReceipt,
    SignedTariff,
    broken_chain,
    charge_findings,
    epoch_of,
    hidden_hit,
    two_receipts,
    two_tariffs,
)
from incentives.ledger import ChannelKey
from protocol import merkle
from protocol.bundle import Bundle, Notch
from protocol.eip712 import digest
from protocol.messages import Commitment, Tariff, WorkReceipt
from protocol.units import ZERO_DIGEST, Address, Digest, JobId, Wei

MICRO: Final = 1_000_000
"""STE are stated in millionths."""

LOOK_BACK: Final = 64
"""Kept prompts of one payer that a later receipt is compared with, the latest. Unit: receipts. Only those with the very
same head can be compared without the payer's block digests; doubling it finds breaches further back."""


@dataclass(frozen=True, slots=True)
class ChargeFault:
    """One finding, where it is, and its proof; `proof` None when the audited set lacks a signature it needs."""

    provider: Address
    job_id: JobId
    receipt: Digest
    finding: Finding
    proof: Proof | None


# ------------------------------------------------------------------------------------------------------------- charges


def charge_faults(bundles: Sequence[Bundle]) -> list[ChargeFault]:
    """Every fault that the bundles show; of one kind in one job only the last, since receipts are totals.

    A receipt is judged under the tariff its own hash names, not under the one that lies beside it. Bundles without
    that tariff are judged for two receipts of one step only.
    """
    tariffs = _tariffs(bundles)
    out: dict[tuple[JobId, Fault], ChargeFault] = {}
    for bundle in bundles:
        for notch in bundle.notches:
            held = tariffs.get((bundle.node_key, Digest(notch.receipt.tariff_hash)))
            for finding in charge_findings(held.tariff, notch.receipt) if held else ():
                proof = _proof(bundle, finding, (held,), (notch,)) if held else None
                fault = ChargeFault(Address(notch.receipt.provider), bundle.job_id, notch.digest, finding, proof)
                out[bundle.job_id, finding.fault] = fault
    pairs = [*_doubled_tariffs(bundles), *_doubled_receipts(bundles), *_broken_chains(bundles)]
    return [*out.values(), *pairs, *_hidden_hits(bundles, tariffs)]


def unjudged(bundles: Sequence[Bundle]) -> int:
    """Receipts whose tariff is in none of the bundles, so that nobody can recompute their charge from these."""
    tariffs = _tariffs(bundles)
    return sum(
        (bundle.node_key, notch.receipt.tariff_hash) not in tariffs for bundle in bundles for notch in bundle.notches
    )


def _tariffs(bundles: Iterable[Bundle]) -> dict[tuple[Address, Digest], SignedTariff]:
    """(node key, tariff hash) -> the tariff, from whichever bundle has it, rather with a signature."""
    out: dict[tuple[Address, Digest], SignedTariff] = {}
    for bundle in bundles:
        if bundle.tariff is not None:
            key = (bundle.node_key, digest(bundle.domain, bundle.tariff))
            if key not in out or not out[key].signature:
                out[key] = SignedTariff(bundle.tariff, bundle.tariff_signature)
    return out


def _proof(bundle: Bundle, finding: Finding, tariffs: Sequence[SignedTariff], notches: Sequence[Notch]) -> Proof | None:
    receipts = tuple(SignedReceipt(notch.receipt, notch.receipt_signature) for notch in notches)
    if not all([item.signature for item in tariffs] + [item.signature for item in receipts]):
        return None
    return Proof(bundle.domain, bundle.node_key, finding.fault, tuple(tariffs), receipts)


def _doubled_tariffs(bundles: Sequence[Bundle]) -> list[ChargeFault]:
    first: dict[tuple[Address, Address, Digest, int], tuple[Bundle, SignedTariff]] = {}
    out: dict[Digest, ChargeFault] = {}
    for bundle in bundles:
        if bundle.tariff is None:
            continue
        sheet = SignedTariff(bundle.tariff, bundle.tariff_signature)
        named = bundle.tariff
        key = (bundle.node_key, named.provider, named.profile_id, named.sequence)
        before = first.setdefault(key, (bundle, sheet))[1]
        finding = two_tariffs(bundle.domain, before.tariff, named)
        if finding is not None:
            proof = _proof(bundle, finding, (before, sheet), ())
            found = ChargeFault(Address(named.provider), bundle.job_id, ZERO_DIGEST, finding, proof)
            out.setdefault(digest(bundle.domain, named), found)
    return list(out.values())


def _doubled_receipts(bundles: Sequence[Bundle]) -> list[ChargeFault]:
    first: dict[tuple[Address, Digest, int], Notch] = {}
    out: dict[tuple[Digest, int], ChargeFault] = {}
    for bundle in bundles:
        for notch in bundle.notches:
            receipt = notch.receipt
            before = first.setdefault((bundle.node_key, Digest(receipt.job_id), receipt.step), notch)
            finding = two_receipts(bundle.domain, before.receipt, receipt)
            if finding is not None:
                proof = _proof(bundle, finding, (), (before, notch))
                found = ChargeFault(Address(receipt.provider), bundle.job_id, notch.digest, finding, proof)
                out.setdefault((Digest(receipt.job_id), receipt.step), found)
    return list(out.values())


def _broken_chains(bundles: Sequence[Bundle]) -> list[ChargeFault]:
    """The first break in each job's receipts, as this bundle and others of the job have them."""
    jobs: dict[tuple[Address, JobId], dict[Digest, tuple[Bundle, Notch]]] = {}
    for bundle in bundles:
        for notch in bundle.notches:
            held = jobs.setdefault((bundle.node_key, JobId(notch.receipt.job_id)), {})
            held.setdefault(notch.digest, (bundle, notch))
    out = []
    for (_, job_id), found in jobs.items():
        steps = sorted(found.values(), key=lambda pair: (pair[1].receipt.step, pair[1].digest))
        for (_, before), (bundle, notch) in pairwise(steps):
            finding = broken_chain(bundle.domain, before.receipt, notch.receipt)
            if finding is not None:
                proof = _proof(bundle, finding, (), (before, notch))
                out.append(ChargeFault(Address(notch.receipt.provider), job_id, notch.digest, finding, proof))
                break
    return out


def _hidden_hits(
    bundles: Sequence[Bundle], tariffs: Mapping[tuple[Address, Digest], SignedTariff]
) -> list[ChargeFault]:
    """Pairs of one payer whose prompts have the same head: no block digests are needed between them."""
    finals = [(bundle, notch) for bundle in bundles for notch in bundle.notches if notch.receipt.is_final]
    finals.sort(key=lambda pair: (pair[1].receipt.received_at, pair[1].receipt.job_id))
    kept: dict[tuple[Address, Digest], list[Notch]] = {}
    out = []
    for bundle, notch in finals:
        receipt = notch.receipt
        key = (Address(receipt.client), Digest(receipt.prompt_head))
        held = tariffs.get((bundle.node_key, Digest(receipt.tariff_hash)))
        for earlier in kept.get(key, [])[-LOOK_BACK:] if held is not None else []:
            assert held is not None
            finding = hidden_hit(earlier.receipt, receipt, held.tariff)
            if finding is not None:
                proof = _proof(bundle, finding, (held,), (earlier, notch))
                out.append(ChargeFault(Address(receipt.provider), bundle.job_id, notch.digest, finding, proof))
                break
        if receipt.is_kept:
            kept.setdefault(key, []).append(notch)
    return out


# -------------------------------------------------------------------------------------------------------- completeness


@dataclass(frozen=True, slots=True)
class ChannelBooks:
    """One channel as the audited receipts have it. All in wei.

    `receipted`: sum over jobs of the last acknowledged receipt. `peak`: the same of each job's highest one (a refund at
    its end lowers the last). `unacknowledged`: last receipts above the acknowledged ones. `vouched`: highest voucher.
    `claimed`: what the chain paid, None when nobody said.
    """

    key: ChannelKey
    jobs: int
    receipted: Wei
    peak: Wei
    unacknowledged: Wei
    vouched: Wei
    claimed: Wei | None

    @property
    def missing(self) -> Wei:
        """Vouched for beyond every receipt at hand: the set lacks receipts that came to at least as much."""
        return Wei(max(0, self.vouched - self.peak))

    @property
    def uncovered(self) -> Wei:
        """Acknowledged receipts that no voucher covers. An honest pair has none (README: I2)."""
        return Wei(max(0, self.receipted - self.vouched))

    @property
    def overclaimed(self) -> Wei:
        """Paid by the chain beyond every voucher at hand: the set lacks a voucher."""
        return Wei(max(0, (self.claimed or 0) - self.vouched))

    @property
    def unsettled(self) -> Wei:
        """Vouched for and not yet claimed."""
        return Wei(max(0, self.vouched - (self.claimed or 0)))


def channel_books(bundles: Sequence[Bundle], claimed: Mapping[ChannelKey, Wei]) -> list[ChannelBooks]:
    """Every channel that has a receipt, by key. `claimed`: per channel what the chain paid, as far as it is known."""
    jobs: dict[ChannelKey, dict[JobId, list[Notch]]] = {}
    for bundle in bundles:
        key = ChannelKey(Address(bundle.request.provider), Address(bundle.request.client))
        held = jobs.setdefault(key, {}).setdefault(bundle.job_id, [])
        held.extend(notch for notch in bundle.notches if notch not in held)
    return [_books(key, jobs[key], claimed.get(key)) for key in sorted(jobs, key=lambda k: (k.provider, k.client))]


def _books(key: ChannelKey, jobs: Mapping[JobId, Sequence[Notch]], claimed: Wei | None) -> ChannelBooks:
    receipted = peak = unacknowledged = vouched = 0
    for notches in jobs.values():
        ordered = sorted(notches, key=lambda notch: notch.receipt.step)
        acknowledged = [notch for notch in ordered if notch.voucher is not None]
        last = acknowledged[-1].receipt.total if acknowledged else 0
        receipted += last
        peak += max((notch.receipt.total for notch in acknowledged), default=0)
        unacknowledged += max(0, ordered[-1].receipt.total - last) if ordered else 0
        vouched = max(vouched, *(notch.voucher.cumulative for notch in acknowledged if notch.voucher), 0)
    return ChannelBooks(key, len(jobs), Wei(receipted), Wei(peak), Wei(unacknowledged), Wei(vouched), claimed)


def entry_of(receipts: Iterable[tuple[Digest, WorkReceipt, bool]]) -> merkle.Entry | None:
    """What a job is committed as: its last acknowledged receipt, else the last issued one; None without any.

    `receipts`: (digest, receipt, whether it was acknowledged by a voucher) of one job, in any order.
    """
    last = max(receipts, key=lambda item: (item[2], item[1].step), default=None)
    return None if last is None else merkle.Entry(JobId(last[1].job_id), last[0], Wei(last[1].total))


def epoch_leaves(
    bundles: Iterable[Bundle], provider: Address, profile_id: Digest, epoch: int, epoch_s: int
) -> list[merkle.Entry]:
    """Entries of a provider's tree for one epoch and profile, in order; each job once, however many bundles have it.

    The same tree as the Court's commitment when the bundles are all there are. Raises: FieldOutOfRange.
    """
    jobs: dict[JobId, dict[Digest, tuple[WorkReceipt, bool]]] = {}
    for bundle in bundles:
        if bundle.request.provider != provider or bundle.request.profile_id != profile_id:
            continue
        for notch in bundle.notches:
            if epoch_of(notch.receipt, epoch_s) == epoch:
                held = jobs.setdefault(bundle.job_id, {})
                known = held.get(notch.digest, (notch.receipt, False))[1]
                held[notch.digest] = (notch.receipt, known or notch.voucher is not None)
    found = (entry_of((key, *item) for key, item in receipts.items()) for receipts in jobs.values())
    return merkle.ordered(entry for entry in found if entry is not None)


@dataclass(frozen=True, slots=True)
class CommitmentGap:
    """A committed root beside the receipts at hand. `count` and `total` are ours less the committed ones."""

    count: int
    total: int
    same_root: bool

    @property
    def closed(self) -> bool:
        """Whether the receipts at hand are exactly those that were committed to."""
        return self.same_root and self.count == 0 and self.total == 0


def commitment_gap(commitment: Commitment, bundles: Iterable[Bundle], epoch_s: int) -> CommitmentGap:
    """How the jobs at hand differ from what their provider committed to for an epoch and profile.

    More jobs than were committed: some were left out of the root, and each is signed evidence of it. Fewer: the
    audited set is incomplete. As many and as much, but another root: one was exchanged. Raises: FieldOutOfRange.
    """
    entries = epoch_leaves(
        bundles, Address(commitment.provider), Digest(commitment.profile_id), commitment.epoch, epoch_s
    )
    root = merkle.root(entries)
    return CommitmentGap(len(entries) - commitment.count, root.total - commitment.total, root.hash == commitment.root)


# ----------------------------------------------------------------------------------------------------------- predation


@dataclass(frozen=True, slots=True)
class SoldBelow:
    """What a provider took for one profile beside its declared cost of it. Wei; `cost` rounded up once."""

    provider: Address
    profile_id: Digest
    jobs: int
    ste_micro: int
    revenue: Wei
    cost: Wei

    @property
    def flagged(self) -> bool:
        """Whether it sold below cost over the audited jobs. No fault, and a free tier is lawful: a flag to look at."""
        return self.revenue < self.cost


def below_cost(
    sold: Iterable[tuple[Tariff, WorkReceipt]], cost_per_ste: Mapping[tuple[Address, Digest], Wei]
) -> list[SoldBelow]:
    """Revenue and cost per (provider, profile) with a declared cost. `sold`: the last receipt of each job.

    cost = ceil(STE x 10^6 of all jobs * declared cost / 10^6). Assumption: the cost of work is proportional to STE.
    """
    sums: dict[tuple[Address, Digest], list[int]] = {}
    for tariff, receipt in sold:
        key = (Address(tariff.provider), Digest(tariff.profile_id))
        if key in cost_per_ste:
            row = sums.setdefault(key, [0, 0, 0])
            for index, value in enumerate((1, receipt.ste_micro, receipt.total)):
                row[index] += value
    return [
        SoldBelow(*key, jobs, ste, Wei(revenue), Wei(-(-ste * cost_per_ste[key] // MICRO)))
        for key, (jobs, ste, revenue) in sorted(sums.items())
    ]
