"""Whether payers are served alike: a stratified permutation test on the times and prices that receipts state.

For one provider and one metric each job is a value; jobs that are comparable (same kind, tier, privacy, reservation,
size class and time window) form a stratum. In a stratum of n jobs values become doubled mid-ranks R; a job's score is

    a = (R - (n + 1)) * floor(2^40 / (n + 1))

so that scores sum to zero in each stratum and strata weigh as in van Elteren's test. A payer's statistic T is the sum
of its scores: above zero means served worse. Payers are exchanged within strata B times, by sorting keys of
SHAKE-256(tag || seed || metric || provider || b), and

    p = (1 + #{b : |T_b| >= |T|}) / (B + 1)

is two-sided and never zero. All p of an audit are corrected together by Holm's step-down method, so that an audit of
honest providers flags anything at all with probability at most alpha. Assumption: within a stratum an honest provider's
jobs are exchangeable between payers, that is, load in one time window falls on all of them alike.
Sources: van Elteren 1960 (weights); Phipson and Smyth 2010, "Permutation p-values should never be zero"; Holm 1979.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import Final

from protocol.messages import WorkReceipt
from protocol.units import BPS, ZERO_DIGEST, Address, Digest, FinishReason, JobKind

MIN_JOBS: Final = 8
"""Comparable jobs below which a payer is not tested. Unit: jobs. Fewer tell only gross differences from chance, while
each further test makes the correction stricter for all; doubling it leaves more small payers untested."""

ALPHA_BPS: Final = 500
"""Probability of flagging any honest provider in one audit. Unit: bps (5 %)."""

PERMUTATIONS: Final = 1_999
"""Exchanges of payers per test. The smallest p is one in so many and one, enough for 100 tests at 5 %."""

WINDOW_MS: Final = 3_600_000
"""Jobs are compared within windows of this length. Unit: ms. Doubling it compares more jobs under less equal load."""

_SCALE: Final = 1 << 40
_TAG: Final = b"tally/fairness/1"


class Metric(StrEnum):
    """What is compared between payers; higher is worse in each."""

    TTFT = "ttft_ms"
    TPOT = "tpot_us"
    PRICE = "base_bps"
    FAILED = "failed"
    SCORE = "score"


@dataclass(frozen=True, slots=True)
class Sample:
    """One job. `stratum`: what it is comparable by."""

    payer: Address
    stratum: tuple[int, ...]
    value: int


@dataclass(frozen=True, slots=True)
class Difference:
    """One payer beside the others at one provider, in strata that hold both.

    `statistic`: T, above zero when served worse. `exceeded`: permutations with at least as large a |T|. `adjusted_bps`:
    Holm's p in bps, rounded up. `median`, `others`: lower medians of the values.
    """

    provider: Address
    payer: Address
    metric: Metric
    jobs: int
    statistic: int
    exceeded: int
    permutations: int
    median: int
    others: int
    adjusted_bps: int = BPS

    @property
    def flagged(self) -> bool:
        """Whether the difference is more than chance would give."""
        return self.adjusted_bps <= ALPHA_BPS


def sample_of(
    receipt: WorkReceipt, metric: Metric, window_ms: int = WINDOW_MS, scores: Mapping[bytes, int] | None = None
) -> Sample | None:
    """A final receipt as a sample, None where it says nothing about the metric.

    TTFT: first token less arrival, size class by computed prompt tokens. TPOT: generating time less the wait for
    vouchers, in us a token after the first, by context length. PRICE: the base multiplier. FAILED: 1 for a job that
    ended by error or deadline; those the client ended say nothing. SCORE: an auditor's number per job id.
    """
    if not receipt.is_final:
        return None
    size, value = 0, -1
    match metric:
        case Metric.TTFT if receipt.first_token_at:
            size = (receipt.prompt_tokens - receipt.cached_tokens).bit_length()
            value = receipt.first_token_at - receipt.received_at
        case Metric.TPOT if receipt.completion_tokens > 1:
            size = (receipt.prompt_tokens + receipt.completion_tokens).bit_length()
            spent = receipt.finished_at - receipt.first_token_at - receipt.waited_ms
            value = max(0, spent) * 1000 // (receipt.completion_tokens - 1)
        case Metric.PRICE if receipt.reservation == ZERO_DIGEST:
            value = receipt.base_bps
        case Metric.FAILED if receipt.finish_reason not in (FinishReason.CANCELLED, FinishReason.ESCROW_EXHAUSTED):
            value = int(receipt.finish_reason in (FinishReason.ERROR, FinishReason.DEADLINE))
        case Metric.SCORE if scores and bytes(receipt.job_id) in scores:
            value = scores[bytes(receipt.job_id)]
    if value < 0:
        return None
    embeds, reserved = receipt.kind == JobKind.EMBED, receipt.reservation != ZERO_DIGEST
    window = receipt.received_at // window_ms
    stratum = (embeds, receipt.kind, receipt.tier, receipt.is_private, reserved, size, window)
    return Sample(Address(receipt.client), tuple(int(part) for part in stratum), value)


def compare(
    provider: Address, metric: Metric, samples: Iterable[Sample], seed: bytes, permutations: int = PERMUTATIONS
) -> list[Difference]:
    """Every payer of one provider with MIN_JOBS comparable jobs against the others; p not yet corrected.

    `seed`: any bytes that the audited provider did not choose; the same input and seed give the same result.
    """
    segments = _mixed_strata(samples)
    flat = [sample for segment in segments for sample in segment]
    payers = sorted({sample.payer for sample in flat})
    number = {payer: index for index, payer in enumerate(payers)}
    labels = [number[sample.payer] for sample in flat]
    scores = [score for segment in segments for score in _scores(segment)]
    observed = _statistics(labels, scores, len(payers))
    exceeded = [0] * len(payers)
    head = _TAG + hashlib.sha256(seed).digest() + metric.encode() + b"\0" + provider
    for round_ in range(permutations):
        keys = struct.unpack(
            f">{len(flat)}Q", hashlib.shake_256(head + struct.pack(">I", round_)).digest(8 * len(flat))
        )
        drawn = _statistics(_exchanged(labels, segments, keys), scores, len(payers))
        for index, (ours, theirs) in enumerate(zip(observed, drawn, strict=True)):
            exceeded[index] += abs(theirs) >= abs(ours)
    out = []
    for index, payer in enumerate(payers):
        own = [sample.value for sample in flat if sample.payer == payer]
        rest = [sample.value for sample in flat if sample.payer != payer]
        if len(own) >= MIN_JOBS:
            medians = (_median(own), _median(rest))
            out.append(
                Difference(provider, payer, metric, len(own), observed[index], exceeded[index], permutations, *medians)
            )
    return out


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Holm's step-down over all of them, in the order given: p_(k) becomes max over j <= k of (m - j + 1) p_(j)."""
    order = sorted(range(len(differences)), key=lambda i: (_p_bps(differences[i], 1), i))
    out, highest = list(differences), 0
    for rank, index in enumerate(order):
        item = differences[index]
        highest = max(highest, _p_bps(item, len(differences) - rank))
        out[index] = replace(item, adjusted_bps=min(BPS, highest))
    return out


def can_flag(tests: int, permutations: int) -> bool:
    """Whether so many permutations can flag anything at all among so many tests."""
    return -(-tests * BPS // (permutations + 1)) <= ALPHA_BPS


def _p_bps(item: Difference, tests: int) -> int:
    """p times `tests`, in bps, rounded up (so never in favour of a flag)."""
    return -(-tests * (1 + item.exceeded) * BPS // (item.permutations + 1))


def _keys(head: bytes, round_: int, count: int) -> tuple[int, ...]:
    """64-bit sorting keys of one exchange: so wide that a tie, which the order of jobs would break, never comes."""
    return struct.unpack(f">{count}Q", hashlib.shake_256(head + struct.pack(">I", round_)).digest(8 * count))


def _mixed_strata(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Strata that hold at least two payers; in any other every exchange is the same."""
    ordered = sorted(samples, key=lambda sample: (sample.stratum, sample.payer, sample.value))
    grouped = [list(group) for _, group in groupby(ordered, key=lambda sample: sample.stratum)]
    return [group for group in grouped if group[0].payer != group[-1].payer]


def _scores(segment: Sequence[Sample]) -> list[int]:
    """Centred, weighted, doubled mid-ranks of a stratum; they sum to zero."""
    count = len(segment)
    weight = _SCALE // (count + 1)
    order = sorted(range(count), key=lambda index: segment[index].value)
    out, below = [0] * count, 0
    for _, tied in groupby(order, key=lambda index: segment[index].value):
        same = list(tied)
        for index in same:
            out[index] = (2 * below + len(same) + 1 - (count + 1)) * weight
        below += len(same)
    return out


def _statistics(labels: Sequence[int], scores: Sequence[int], payers: int) -> list[int]:
    out = [0] * payers
    for label, score in zip(labels, scores, strict=True):
        out[label] += score
    return out


def _exchanged(labels: Sequence[int], segments: Sequence[Sequence[Sample]], keys: Sequence[int]) -> list[int]:
    """Labels permuted within each stratum, in the order of the keys."""
    out: list[int] = []
    start = 0
    for segment in segments:
        end = start + len(segment)
        out.extend(labels[index] for index in sorted(range(start, end), key=keys.__getitem__))
        start = end
    return out


def _median(values: Sequence[int]) -> int:
    """The lower median."""
    return sorted(values)[(len(values) - 1) // 2] if values else 0


def seed_of(digests: Iterable[Digest]) -> bytes:
    """A seed that follows from the audited receipts alone, so nobody chooses it: SHA-256 of their sorted digests."""
    return hashlib.sha256(b"".join(sorted(digests))).digest()
