"""From what a replay shows to a verdict: flags per token, a finding per job, one Verdict per case and round.

Measured numbers enter as floats and are rounded once, up, to the whole units that profiles state thresholds in; every
decision after that is between integers. README.md of this folder has the equations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from incentives.evidence import MAX_TOKENS, VOID_PPM, hard_fail, tail_up
from protocol.errors import FieldOutOfRange
from protocol.messages import Profile, Verdict
from protocol.units import Address, AuditOutcome, Digest, JobId

VOID_MILLI: Final = 2_000
"""Margin at which a token is void, thousandths of a logit. No kernel's noise comes near it; doubling it would let an
altered token in a flat distribution pass as a flag."""

MAX_MARKS: Final = 64
"""Flagged tokens of one job that are told one by one, the worst. Doubling it doubles the most a finding takes."""

BEYOND: Final = (1 << 31) - 1
"""What is told of a distance that is infinite, no number, or too large to matter."""

GRAVITY: Final = (
    AuditOutcome.PASS,
    AuditOutcome.VOID,
    AuditOutcome.WITHHELD,
    AuditOutcome.IMPROBABLE,
    AuditOutcome.FORGED,
)
"""Outcomes from harmless to worst: a case has the worst of its jobs."""

_TAG_RESULTS: Final = b"tally/results/1"


@dataclass(frozen=True, slots=True)
class TokenMark:
    """A flagged token: `index` in the output, and how far off it is (logits x 1000, nats x 1e6, relative x 1e6)."""

    index: int
    token_id: int
    margin_milli: int
    logprob_micro: int
    projection_micro: int


@dataclass(frozen=True, slots=True)
class JobFinding:
    """What the audit of one job found. `tokens`: looked at; 0 where only documents were. `marks`: flagged tokens, in
    order, at most MAX_MARKS. `detail`: for people."""

    job_id: JobId
    outcome: AuditOutcome
    tokens: int = 0
    flags: int = 0
    voids: int = 0
    worst_margin_milli: int = 0
    detail: str = ""
    marks: tuple[TokenMark, ...] = ()


def scaled_up(value: float, scale: int) -> int:
    """value * scale in whole units, rounded up, from 0 to BEYOND; BEYOND for what is no number."""
    if not value * scale < BEYOND:
        return BEYOND
    return math.ceil(max(0, value * scale))


def judge_output(
    profile: Profile,
    job_id: JobId,
    token_ids: Sequence[int],
    margins: Sequence[float],
    logprobs: Sequence[float],
    projections: Sequence[float],
    routing: Sequence[bool],
) -> JobFinding:
    """The finding of a replayed job; one number of each kind per output token, as ports.Replay has them.

    A token is flagged when any distance passes the profile's threshold or other experts are chosen now, and void from a
    margin of 2 logits on. Raises: FieldOutOfRange for sequences of different lengths or more than MAX_TOKENS tokens.
    """
    for name, values in (
        ("margins", margins),
        ("logprobs", logprobs),
        ("projections", projections),
        ("routing", routing),
    ):
        if len(values) != len(token_ids):
            raise FieldOutOfRange("Replay", name, len(values))
    marks, voids, worst = [], 0, 0
    for index, (token_id, margin, logprob, projection, alike) in enumerate(
        zip(token_ids, margins, logprobs, projections, routing, strict=True)
    ):
        mark = TokenMark(
            index, token_id, scaled_up(margin, 1000), scaled_up(logprob, 10**6), scaled_up(projection, 10**6)
        )
        worst = max(worst, mark.margin_milli)
        voids += mark.margin_milli >= VOID_MILLI
        if _is_flagged(profile, mark) or not alike:
            marks.append(mark)
    tokens, flags = len(token_ids), len(marks)
    outcome = (
        AuditOutcome.IMPROBABLE
        if hard_fail(tokens, flags, voids, profile.flag_ppm)
        else AuditOutcome.VOID
        if voids
        else AuditOutcome.PASS
    )
    detail = f"{flags} of {tokens} tokens flagged, {voids} far off" if flags else ""
    return JobFinding(job_id, outcome, tokens, flags, voids, worst, detail, _worst_marks(marks))


def _is_flagged(profile: Profile, mark: TokenMark) -> bool:
    return (
        mark.margin_milli > profile.margin_milli
        or mark.margin_milli >= VOID_MILLI
        or mark.logprob_micro > profile.logprob_micro
        or mark.projection_micro > profile.projection_micro
    )


def _worst_marks(marks: Sequence[TokenMark]) -> tuple[TokenMark, ...]:
    worst = sorted(marks, key=lambda mark: (-mark.margin_milli, -mark.logprob_micro, mark.index))[:MAX_MARKS]
    return tuple(sorted(worst, key=lambda mark: mark.index))


# ------------------------------------------------------------------------------------------------------------ verdict


def tail_of(finding: JobFinding, flag_ppm: int) -> int:
    """How likely honest work looks this bad, x 10^27: the smaller tail of flags and voids. Raises: FieldOutOfRange."""
    return min(tail_up(finding.tokens, finding.flags, flag_ppm), tail_up(finding.tokens, finding.voids, VOID_PPM))


def results_root(findings: Sequence[JobFinding]) -> Digest:
    """SHA-256(tag || per job, by job id: job id, outcome u8, tokens u32, flags u32, voids u32)."""
    out = hashlib.sha256(_TAG_RESULTS)
    for item in sorted(findings, key=lambda item: item.job_id):
        counts = b"".join(value.to_bytes(4, "big") for value in (item.tokens, item.flags, item.voids))
        out.update(item.job_id + bytes([item.outcome]) + counts)
    return Digest(out.digest())


def summarise(
    validator: Address,
    case_id: Digest,
    round_: int,
    findings: Sequence[JobFinding],
    gaps: Digest,
    salt: Digest,
    flag_ppm: int,
) -> Verdict:
    """The verdict over all audited jobs: the worst outcome, the sums, and the job with the least likely flags.

    `salt`: 32 secret bytes, so that the digest tells nobody the outcome before the reveal. Raises: FieldOutOfRange.
    """
    in_order = sorted(findings, key=lambda item: item.job_id)
    worst = min(in_order, key=lambda item: tail_of(item, flag_ppm), default=None)
    outcome = max((item.outcome for item in in_order), key=GRAVITY.index, default=AuditOutcome.PASS)
    return Verdict(
        validator=validator,
        case_id=case_id,
        round=round_,
        outcome=outcome,
        tokens=sum(item.tokens for item in in_order),
        flags=sum(item.flags for item in in_order),
        voids=sum(item.voids for item in in_order),
        worst_tokens=worst.tokens if worst else 0,
        worst_flags=worst.flags if worst else 0,
        worst_voids=worst.voids if worst else 0,
        gaps=gaps,
        results_root=results_root(in_order),
        salt=salt,
    )


def contradicts_itself(verdict: Verdict, flag_ppm: int) -> bool:
    """Whether the outcome is not what the verdict's own counts give; the Court takes no such verdict."""
    if not verdict.voids <= verdict.flags <= verdict.tokens or verdict.worst_tokens > MAX_TOKENS:
        return True
    worst = (verdict.worst_voids, verdict.worst_flags, verdict.worst_tokens)
    whole = (verdict.voids, verdict.flags, verdict.tokens)
    if list(worst) != sorted(worst) or any(part > total for part, total in zip(worst, whole, strict=True)):
        return True
    condemned = hard_fail(verdict.worst_tokens, verdict.worst_flags, verdict.worst_voids, flag_ppm)
    match verdict.outcome:
        case AuditOutcome.IMPROBABLE:
            return not condemned
        case AuditOutcome.PASS:
            return condemned or verdict.voids > 0
        case AuditOutcome.VOID:
            return condemned or verdict.voids == 0
        case _:
            return False


# --------------------------------------------------------------------------------------------------------------- JSON


def findings_json(findings: Sequence[JobFinding]) -> str:
    """The findings as one line of JSON, as the journal keeps them."""
    rows = [
        {
            "job_id": item.job_id.hex(),
            "outcome": item.outcome.name,
            "tokens": item.tokens,
            "flags": item.flags,
            "voids": item.voids,
            "worst_margin_milli": item.worst_margin_milli,
            "detail": item.detail,
            "marks": [
                [mark.index, mark.token_id, mark.margin_milli, mark.logprob_micro, mark.projection_micro]
                for mark in item.marks
            ],
        }
        for item in findings
    ]
    return json.dumps(rows, separators=(",", ":"))


def findings_of(text: str) -> tuple[JobFinding, ...]:
    """The inverse of `findings_json`. Raises: ValueError for what this never wrote."""
    try:
        rows: list[dict[str, Any]] = json.loads(text)
        return tuple(
            JobFinding(
                JobId(bytes.fromhex(row["job_id"])),
                AuditOutcome[row["outcome"]],
                row["tokens"],
                row["flags"],
                row["voids"],
                row["worst_margin_milli"],
                row["detail"],
                tuple(TokenMark(*mark) for mark in row["marks"]),
            )
            for row in rows
        )
    except (KeyError, TypeError) as exc:
        raise ValueError(f"these are no findings: {exc!r}") from exc
