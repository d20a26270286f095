"""An audit of jobs at hand, from documents alone: what is found, as values and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from incentives.alike import Difference, Metric, can_flag, compare, corrected, sample_of, seed_of
from incentives.fairness import (
    ChannelBooks,
    ChargeFault,
    CommitmentGap,
    SoldBelow,
    below_cost,
    channel_books,
    charge_faults,
    commitment_gap,
    unjudged,
)
from incentives.fault_json import SignedCommitment
from incentives.ledger import ChannelKey
from node.cli import money
from node.cli.tables import short, table
from protocol.bundle import Bundle, Notch
from protocol.errors import TallyError
from protocol.messages import Tariff, WorkReceipt
from protocol.signing import verify
from protocol.units import Address, Digest, JobId, Wei

METRICS: Final = (Metric.TTFT, Metric.TPOT, Metric.PRICE, Metric.FAILED, Metric.SCORE)


@dataclass(frozen=True, slots=True)
class Question:
    """What an audit is asked. `costs`: declared wei per STE. `scores`: an auditor's number per job id, higher is worse.

    `claimed`: what the chain paid per channel, as far as it is known.
    """

    permutations: int
    window_ms: int
    claimed: Mapping[ChannelKey, Wei]
    roots: Sequence[SignedCommitment]
    scores: Mapping[bytes, int]
    cost_per_ste: Wei | None


@dataclass(frozen=True, slots=True)
class Audit:
    """What came out. `dropped`: receipts whose signature is not of the node key beside them."""

    jobs: int
    receipts: int
    payers: int
    providers: int
    dropped: int
    unjudged: int
    faults: tuple[ChargeFault, ...]
    channels: tuple[ChannelBooks, ...]
    gaps: tuple[tuple[SignedCommitment, CommitmentGap], ...]
    differences: tuple[Difference, ...]
    sold: tuple[SoldBelow, ...]
    permutations: int

    @property
    def clean(self) -> bool:
        """Whether nothing was found that somebody has to explain."""
        return not (
            self.faults
            or self.dropped
            or any(books.uncovered or books.overclaimed for books in self.channels)
            or any(not gap.closed for _, gap in self.gaps)
            or any(item.flagged for item in self.differences)
            or any(item.flagged for item in self.sold)
        )


def genuine(bundle: Bundle, *, own: bool) -> Bundle:
    """The bundle without receipts that nobody can hold against its provider.

    `own`: from this home's journal, where a provider keeps no signature of its own and a client checked each one.
    """
    return replace(bundle, notches=tuple(notch for notch in bundle.notches if own or _signed(bundle, notch)))


def _signed(bundle: Bundle, notch: Notch) -> bool:
    try:
        return verify(bundle.domain, notch.receipt, notch.receipt_signature, bundle.node_key) == notch.digest
    except TallyError:
        return False


def audit(bundles: Sequence[Bundle], dropped: int, question: Question) -> Audit:
    """Everything that the bundles show. Raises: FieldOutOfRange for documents that cannot be hashed."""
    lasts = _lasts(bundles)
    return Audit(
        jobs=len(lasts),
        receipts=len({notch.digest for bundle in bundles for notch in bundle.notches}),
        payers=len({receipt.client for _, _, receipt in lasts}),
        providers=len({receipt.provider for _, _, receipt in lasts}),
        dropped=dropped,
        unjudged=unjudged(bundles),
        faults=tuple(charge_faults(bundles)),
        channels=tuple(channel_books(bundles, question.claimed)),
        gaps=tuple((root, commitment_gap(root.commitment, bundles, root.epoch_s)) for root in question.roots),
        differences=tuple(_differences([(found, receipt) for found, _, receipt in lasts], question)),
        sold=tuple(_sold([(tariff, receipt) for _, tariff, receipt in lasts if tariff], question.cost_per_ste)),
        permutations=question.permutations,
    )


def _lasts(bundles: Iterable[Bundle]) -> list[tuple[Digest, Tariff | None, WorkReceipt]]:
    """The last receipt of each job, once, with its tariff where that is at hand."""
    out: dict[JobId, tuple[Digest, Tariff | None, WorkReceipt]] = {}
    for bundle in bundles:
        for notch in bundle.notches:
            known = out.get(bundle.job_id)
            if known is None or notch.receipt.step >= known[2].step:
                out[bundle.job_id] = (notch.digest, bundle.tariff, notch.receipt)
    return [out[job_id] for job_id in sorted(out)]


def _differences(lasts: Sequence[tuple[Digest, WorkReceipt]], question: Question) -> list[Difference]:
    seed, found = seed_of(digest for digest, _ in lasts), []
    for provider in sorted({Address(receipt.provider) for _, receipt in lasts}):
        own = [receipt for _, receipt in lasts if receipt.provider == provider]
        for metric in METRICS:
            samples = [sample_of(receipt, metric, question.window_ms, question.scores) for receipt in own]
            kept = [sample for sample in samples if sample is not None]
            found += compare(provider, metric, kept, seed, question.permutations)
    return corrected(found)


def _sold(sold: Sequence[tuple[Tariff, WorkReceipt]], cost: Wei | None) -> list[SoldBelow]:
    if cost is None:
        return []
    keys = {(Address(tariff.provider), Digest(tariff.profile_id)) for tariff, _ in sold}
    return below_cost(sold, dict.fromkeys(sorted(keys), cost))


# ---------------------------------------------------------------------------------------------------------------- shown


def as_json(found: Audit, proofs: Mapping[int, str]) -> dict[str, Any]:
    """All findings; amounts are wei as decimal strings. `proofs`: index of a fault -> file of its proof."""
    return {
        "clean": found.clean,
        "jobs": found.jobs,
        "receipts": found.receipts,
        "payers": found.payers,
        "providers": found.providers,
        "receipts_dropped": found.dropped,
        "receipts_without_tariff": found.unjudged,
        "faults": [_fault_json(item, proofs.get(index)) for index, item in enumerate(found.faults)],
        "channels": [_books_json(books) for books in found.channels],
        "roots": [
            {
                "provider": _hex(root.commitment.provider),
                "epoch": root.commitment.epoch,
                "closed": gap.closed,
                "receipts_more": gap.count,
                "wei_more": str(gap.total),
            }
            for root, gap in found.gaps
        ],
        "service": [_difference_json(item) for item in found.differences],
        "permutations": found.permutations,
        "sold": [
            {
                "provider": _hex(item.provider),
                "profile": _hex(item.profile_id),
                "jobs": item.jobs,
                "ste_micro": item.ste_micro,
                "revenue_wei": str(item.revenue),
                "declared_cost_wei": str(item.cost),
                "below_cost": item.flagged,
            }
            for item in found.sold
        ],
    }


def _fault_json(item: ChargeFault, proof: str | None) -> dict[str, Any]:
    return {
        "fault": item.finding.fault.value,
        "detail": item.finding.detail,
        "provider": _hex(item.provider),
        "job_id": _hex(item.job_id),
        "receipt": _hex(item.receipt),
        "excess_wei": str(item.finding.excess),
        "proof": proof,
    }


def _books_json(books: ChannelBooks) -> dict[str, Any]:
    names = ("receipted", "peak", "unacknowledged", "vouched", "missing", "uncovered", "overclaimed", "unsettled")
    return {
        "provider": _hex(books.key.provider),
        "client": _hex(books.key.client),
        "jobs": books.jobs,
        **{f"{name}_wei": str(getattr(books, name)) for name in names},
        "claimed_wei": None if books.claimed is None else str(books.claimed),
    }


def _difference_json(item: Difference) -> dict[str, Any]:
    return {
        "provider": _hex(item.provider),
        "payer": _hex(item.payer),
        "metric": item.metric.value,
        "jobs": item.jobs,
        "median": item.median,
        "others": item.others,
        "worse": item.statistic > 0,
        "exceeded": item.exceeded,
        "adjusted_p_bps": item.adjusted_bps,
        "flagged": item.flagged,
    }


def text(found: Audit, proofs: Mapping[int, str]) -> str:
    """The report as it is read."""
    lines = [
        f"audited    jobs {found.jobs}, receipts {found.receipts}, payers {found.payers}, providers {found.providers}",
    ]
    if found.dropped:
        lines.append(f"dropped    {found.dropped} receipts whose signature is not of the node key beside them")
    judged = found.receipts - found.unjudged
    lines.append(f"charges    {judged} recomputed from their published tariff, {len(found.faults)} faults")
    if found.unjudged:
        lines.append(f"           {found.unjudged} receipts have no tariff in this set and were not judged")
    for index, item in enumerate(found.faults):
        where = proofs.get(index, "no proof: a signature is not in the set")
        lines.append(
            f"  FAULT    {item.finding.fault.value}, job {_short(item.job_id)}: {item.finding.detail}; {where}"
        )
    head = ("channels", "PROVIDER", "CLIENT", ">JOBS", ">RECEIPTED", ">VOUCHED", ">CLAIMED", "BOOKS")
    if found.channels:
        lines.append(table(head, [("", *_channel_cells(books)) for books in found.channels]))
    for root, gap in found.gaps:
        said = "closes: exactly these receipts" if gap.closed else _gap_text(gap)
        lines.append(f"root       epoch {root.commitment.epoch} of {_short(root.commitment.provider)} {said}")
    lines += _service_lines(found)
    for sold in found.sold:
        said = f"took {money.amount(sold.revenue)} for work declared to cost {money.amount(sold.cost)}"
        lines.append(f"{'PREDATION' if sold.flagged else 'cost':10} {_short(sold.provider)} {said}")
    return "\n".join(
        [*lines, "nothing to explain" if found.clean else "see FAULT, FLAG, PREDATION and the books above"]
    )


def _channel_cells(books: ChannelBooks) -> tuple[str, ...]:
    problems = (
        (books.uncovered, "not covered by any voucher"),
        (books.overclaimed, "claimed beyond the vouchers here"),
        (books.missing, "vouched for by receipts that are not here"),
    )
    told = [f"{money.tally(amount)} {what}" for amount, what in problems if amount]
    return (
        _short(books.key.provider),
        _short(books.key.client),
        str(books.jobs),
        money.tally(books.receipted),
        money.tally(books.vouched),
        "?" if books.claimed is None else money.tally(books.claimed),
        "; ".join(told) or "complete",
    )


def _gap_text(gap: CommitmentGap) -> str:
    if gap.count == gap.total == 0:
        return "DOES NOT CLOSE: as many receipts and as much, but another root"
    more = "more" if gap.count >= 0 else "fewer"
    return f"DOES NOT CLOSE: {abs(gap.count)} {more} receipts here than committed, {gap.total} wei apart"


def _service_lines(found: Audit) -> list[str]:
    tests, flagged = len(found.differences), [item for item in found.differences if item.flagged]
    lines = [f"service    {tests} comparisons of payers, {found.permutations} permutations, Holm at 5 % over all"]
    if not tests:
        lines.append("           too few comparable jobs of several payers to compare service")
    elif not can_flag(tests, found.permutations):
        lines.append("           so few permutations cannot flag anything among so many comparisons: --permutations")
    for item in flagged:
        way = "worse" if item.statistic > 0 else "better"
        lines.append(
            f"  FLAG     payer {_short(item.payer)} is served {way} by {_short(item.provider)} in {item.metric.value}: "
            f"median {item.median}, others {item.others}, p {item.adjusted_bps / 10_000:.4f} over {item.jobs} jobs"
        )
    return lines


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _short(value: bytes) -> str:
    return short(_hex(value))
