"""One audited job, from its examined dossier to a finding: what a validator and `tally audit` do with a replay.

The documents were examined before (protocol/dossier.py); here the profile's own weights say whether they write those
tokens, and whether the text ended where it had to.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from incentives.verdicts import JobFinding, judge_output
from node.ports import Replay, Replayer, ReplayRequest, Sampling, Unreplayable
from protocol.dossier import Examined
from protocol.messages import Profile
from protocol.transcript import Row
from protocol.units import AuditOutcome, FinishReason, JobId

MILLI: Final = 1_000


@dataclass(frozen=True, slots=True)
class Judged:
    """A finding and what it rests on. `gaps`: thousandths of a logit per output token; () where nothing was replayed.

    `replay`: of a generation job, for whoever wants to show its numbers; None where nothing was replayed.
    """

    finding: JobFinding
    gaps: tuple[int, ...] = ()
    replay: Replay | None = None


def forged(job_id: JobId, why: str, tokens: int = 0) -> JobFinding:
    """The documents contradict the transcript or each other."""
    return JobFinding(job_id, AuditOutcome.FORGED, tokens, detail=why)


def withheld(job_id: JobId, why: str) -> JobFinding:
    """The transcript was not delivered in time."""
    return JobFinding(job_id, AuditOutcome.WITHHELD, detail=why)


async def judge(job_id: JobId, job: Examined, profile: Profile, replayer: Replayer) -> Judged:
    """What the replay of a job finds. Of a private job, or of one that this machine alone may be too slow for, its
    documents are all there is to look at: PASS.

    Raises: TallyError when this machine cannot replay it; then there is no finding.
    """
    if job.private:
        return Judged(JobFinding(job_id, AuditOutcome.PASS, detail="private: only its documents were looked at"))
    try:
        if job.leaves:
            return await _judge_output(job_id, job, profile, replayer)
        if job.vectors:
            return Judged(await _judge_vectors(job_id, job, profile, replayer))
    except Unreplayable as exc:
        return Judged(JobFinding(job_id, AuditOutcome.PASS, detail=f"only its documents were looked at: {exc}"))
    except ValueError as exc:
        return Judged(forged(job_id, f"no such job can have been served: {exc}"))
    return Judged(JobFinding(job_id, AuditOutcome.PASS, detail="nothing was delivered"))


def replay_request(job: Examined) -> ReplayRequest:
    """The generation as it was asked for and recorded."""
    request = job.dossier.request
    sampling = Sampling(request.temperature_micro, request.top_p_micro, request.top_k)
    return ReplayRequest(job.dossier.prompt, job.rows, job.seed, sampling, job.options)


async def _judge_output(job_id: JobId, job: Examined, profile: Profile, replayer: Replayer) -> Judged:
    rows = job.rows
    seen = await replayer.replay(replay_request(job))
    ids = [row.token_id for row in rows]
    finding = judge_output(profile, job_id, ids, seen.margins, seen.logprobs, seen.projections, seen.routing)
    wrong_end = _wrong_end(job, rows, seen.ends)
    if wrong_end:
        finding = replace(finding, outcome=AuditOutcome.FORGED, detail=wrong_end)
    return Judged(finding, tuple(_milli(gap) for gap in seen.gaps), seen)


def _wrong_end(job: Examined, rows: Sequence[Row], ends: Sequence[int]) -> str:
    """What is wrong with where the text ended; "" when nothing is."""
    last = len(rows) - 1
    past = next((index for index in ends if index < last), None)
    if past is not None:
        return f"the text ended at token {past}, and {last - past} more were charged"
    receipt = job.dossier.receipt
    if not receipt.is_final:
        return ""
    stopped = receipt.finish_reason == FinishReason.STOP
    if stopped != (last in ends) and (stopped or receipt.finish_reason == FinishReason.LENGTH):
        return (
            "the receipt says that the text ended by itself, and no token ends it"
            if stopped
            else ("the text ended by itself, and the receipt says that it was cut off")
        )
    return ""


async def _judge_vectors(job_id: JobId, job: Examined, profile: Profile, replayer: Replayer) -> JobFinding:
    """Vectors are compared whole: one that is as far off as a flagged token's fingerprint would be is flagged."""
    ours = await replayer.embed(job.inputs, job.options.dimensions)
    far = [_distance(ours_, theirs) for ours_, theirs in zip(ours, job.vectors, strict=True)]
    zeros = [0.0] * len(far)
    return judge_output(profile, job_id, range(len(far)), zeros, zeros, far, [True] * len(far))


def _distance(ours: bytes, theirs: bytes) -> float:
    """Length of the difference of two unit vectors, fp32 little-endian; infinite when they do not compare."""
    if len(ours) != len(theirs):
        return math.inf
    a, b = (struct.unpack(f"<{len(raw) // 4}f", raw) for raw in (ours, theirs))
    far = math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    return far if math.isfinite(far) else math.inf


def _milli(gap: float) -> int:
    return round(gap * MILLI) if math.isfinite(gap) else 1 << 15
