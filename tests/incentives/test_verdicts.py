"""From measured numbers to flags, from flags to findings, and to a verdict that does not contradict itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.audit_draw import pack_gaps
from incentives.evidence import MAX_TOKENS, hard_fail
from incentives.verdicts import (
    BEYOND,
    MAX_MARKS,
    VOID_MILLI,
    JobFinding,
    TokenMark,
    contradicts_itself,
    findings_json,
    findings_of,
    judge_output,
    results_root,
    scaled_up,
    summarise,
)
from protocol.errors import FieldOutOfRange
from protocol.messages import Verdict
from protocol.units import ZERO_DIGEST, Address, AuditOutcome, Digest, JobId
from tests.protocol.sheets import ON_SLOW_CPU
from tests.protocol.sheets import PROFILE as BARE

PROFILE = replace(BARE, margin_milli=100, logprob_micro=20_000, projection_micro=5_000, flag_ppm=1_000)
JOB = JobId(b"\1" * 32)
ME, CASE, SALT = Address(b"\2" * 20), Digest(b"\3" * 32), Digest(b"\4" * 32)
GAPS = pack_gaps(range(16))


def judged(
    margins: Sequence[float],
    logprobs: Sequence[float] | None = None,
    projections: Sequence[float] | None = None,
    routing: Sequence[bool] | None = None,
) -> JobFinding:
    quiet = [0.0] * len(margins)
    return judge_output(
        PROFILE, JOB, range(len(margins)), margins, logprobs or quiet, projections or quiet,
        routing or [True] * len(margins),
    )  # fmt: skip


def verdict(*findings: JobFinding, flag_ppm: int = PROFILE.flag_ppm) -> Verdict:
    return summarise(ME, CASE, 0, findings, GAPS, SALT, flag_ppm)


# ---------------------------------------------------------------------------------------------------------------- flags


def test_at_the_threshold_is_no_flag_and_above_it_is() -> None:
    assert judged([0.1] * 64, [0.02] * 64, [0.005] * 64).flags == 0
    for index, column in enumerate(([0.1001], [0.02001], [0.005001])):
        columns: list[list[float]] = [[0.0], [0.0], [0.0]]
        columns[index] = column
        assert judged(*columns).flags == 1
    assert judged([0.0], routing=[False]).flags == 1


def test_what_is_no_number_or_outside_the_nucleus_is_void() -> None:
    for odd in (math.inf, math.nan, 1e30):
        found = judged([odd, *[0.0] * 63])
        assert (found.flags, found.voids, found.worst_margin_milli, found.outcome) == (1, 1, BEYOND, AuditOutcome.VOID)
    assert judged([1.999, *[0.0] * 63]).voids == 0 and judged([2.0, *[0.0] * 63]).voids == 1
    assert judged([0.0], [math.nan]).flags == 1


def test_a_void_token_is_flagged_even_under_a_wide_threshold() -> None:
    wide = replace(PROFILE, margin_milli=5_000)
    found = judge_output(wide, JOB, [7], [2.5], [0.0], [0.0], [True])
    assert (found.flags, found.voids) == (1, 1) and VOID_MILLI == 2_000


def test_outcomes_follow_from_the_counts() -> None:
    assert judged([0.0] * 64).outcome is AuditOutcome.PASS
    assert judged([0.5] * 5 + [0.0] * 59).outcome is AuditOutcome.PASS
    assert judged([0.5] * 6 + [0.0] * 58).outcome is AuditOutcome.IMPROBABLE
    assert judged([2.5] * 2 + [0.0] * 62).outcome is AuditOutcome.VOID
    assert judged([2.5] * 3 + [0.0] * 61).outcome is AuditOutcome.IMPROBABLE
    assert judged([]).outcome is AuditOutcome.PASS


def test_the_worst_tokens_are_told_in_order() -> None:
    found = judged([0.0, 0.3, 0.0, 0.2] * 3)
    assert [mark.index for mark in found.marks] == [1, 3, 5, 7, 9, 11]
    assert found.marks[0] == TokenMark(1, 1, 300, 0, 0) and found.worst_margin_milli == 300
    many = judged([0.2] * 100 + [0.9] * 30)
    assert len(many.marks) == MAX_MARKS and many.flags == 130
    indices = [mark.index for mark in many.marks]
    assert indices == sorted(indices) and {*range(100, 130)} <= {*indices}


@ON_SLOW_CPU
@given(st.floats(allow_nan=True), st.sampled_from([1_000, 10**6]))
def test_numbers_round_up_once_and_stay_in_bounds(value: float, scale: int) -> None:
    found = scaled_up(value, scale)
    assert 0 <= found <= BEYOND
    if 0 <= value < 1_000:
        assert found - 1 < value * scale <= found


def test_lengths_must_agree() -> None:
    with pytest.raises(FieldOutOfRange, match="margins"):
        judge_output(PROFILE, JOB, [1, 2], [0.0], [0.0], [0.0], [True])
    with pytest.raises(FieldOutOfRange, match="routing"):
        judge_output(PROFILE, JOB, [1], [0.0], [0.0], [0.0], [])


# -------------------------------------------------------------------------------------------------------------- verdict

outcomes = st.sampled_from([AuditOutcome.WITHHELD, AuditOutcome.FORGED])


@st.composite
def findings(draw: st.DrawFn) -> JobFinding:
    """As `judge_output` makes them, or one of documents and delivery."""
    job = JobId(draw(st.binary(min_size=32, max_size=32)))
    if draw(st.booleans()):
        return JobFinding(job, draw(outcomes), detail="why")
    margins = draw(st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.3, 2.5]), max_size=40))
    quiet = [0.0] * len(margins)
    return judge_output(PROFILE, job, range(len(margins)), margins, quiet, quiet, [True] * len(margins))


@ON_SLOW_CPU
@given(st.lists(findings(), max_size=6, unique_by=lambda item: item.job_id), st.randoms(use_true_random=False))
def test_a_verdict_sums_up_and_never_contradicts_itself(jobs: list[JobFinding], chance: object) -> None:
    made = verdict(*jobs)
    assert not contradicts_itself(made, PROFILE.flag_ppm)
    assert (made.tokens, made.flags, made.voids) == tuple(
        sum(getattr(item, name) for item in jobs) for name in ("tokens", "flags", "voids")
    )
    assert made == verdict(*reversed(jobs))
    if AuditOutcome.FORGED in [item.outcome for item in jobs]:
        assert made.outcome == AuditOutcome.FORGED


def test_the_worst_outcome_stands_in_its_order() -> None:
    def one(outcome: AuditOutcome, number: int) -> JobFinding:
        flags = {AuditOutcome.IMPROBABLE: 6, AuditOutcome.VOID: 1}.get(outcome, 0)
        return JobFinding(JobId(bytes([number]) * 32), outcome, 64, flags, int(outcome is AuditOutcome.VOID))

    rising = [
        AuditOutcome.PASS, AuditOutcome.VOID, AuditOutcome.WITHHELD, AuditOutcome.IMPROBABLE, AuditOutcome.FORGED,
    ]  # fmt: skip
    for upto in range(1, 6):
        jobs = [one(outcome, number) for number, outcome in enumerate(rising[:upto])]
        assert verdict(*jobs).outcome == rising[upto - 1]
    assert verdict().outcome == AuditOutcome.PASS and verdict().results_root == results_root([])


def test_the_job_with_the_least_likely_flags_is_named() -> None:
    long = JobFinding(JobId(b"\1" * 32), AuditOutcome.PASS, 10_000, 12, 0)
    short = JobFinding(JobId(b"\2" * 32), AuditOutcome.PASS, 64, 4, 0)
    void = JobFinding(JobId(b"\3" * 32), AuditOutcome.VOID, 64, 2, 2)
    made = verdict(long, short)
    assert (made.worst_tokens, made.worst_flags, made.worst_voids) == (64, 4, 0)
    made = verdict(long, short, void)
    assert (made.worst_tokens, made.worst_flags, made.worst_voids) == (64, 2, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": AuditOutcome.PASS},
        {"outcome": AuditOutcome.VOID},
        {"flags": 3},
        {"voids": 7},
        {"tokens": 63},
        {"worst_flags": 65},
        {"worst_voids": 7},
        {"worst_tokens": MAX_TOKENS + 1, "tokens": MAX_TOKENS + 1},
    ],
)
def test_a_verdict_that_contradicts_its_numbers_is_seen(changes: dict[str, int]) -> None:
    made = verdict(JobFinding(JOB, AuditOutcome.IMPROBABLE, 64, 6, 0))
    assert not contradicts_itself(made, 1_000) and contradicts_itself(replace(made, **changes), 1_000)


def test_improbable_needs_numbers_that_say_so() -> None:
    calm = verdict(JobFinding(JOB, AuditOutcome.PASS, 64, 5, 0))
    assert contradicts_itself(replace(calm, outcome=AuditOutcome.IMPROBABLE), 1_000)
    assert contradicts_itself(replace(calm, outcome=AuditOutcome.VOID), 1_000)
    assert contradicts_itself(replace(calm, voids=1), 1_000)
    assert not contradicts_itself(replace(calm, outcome=AuditOutcome.FORGED), 1_000)
    assert not hard_fail(64, 5, 0, 1_000)


# ---------------------------------------------------------------------------------------------------------------- JSON


@ON_SLOW_CPU
@given(st.lists(findings(), max_size=4, unique_by=lambda item: item.job_id))
def test_findings_come_back_as_they_were_written(jobs: list[JobFinding]) -> None:
    text = findings_json(jobs)
    assert findings_of(text) == tuple(jobs) and "\n" not in text


@pytest.mark.parametrize("text", ["", "{}x", '[{"job_id": "00"}]', "[1]", '[{"job_id": "zz", "outcome": "PASS"}]'])
def test_what_is_no_finding_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        findings_of(text)


def test_the_results_root_is_of_every_result() -> None:
    jobs = [JobFinding(JobId(bytes([n]) * 32), AuditOutcome.PASS, 64, n, 0) for n in range(3)]
    root = results_root(jobs)
    assert root == results_root(jobs[::-1]) != ZERO_DIGEST
    for bent in ({"flags": 2}, {"tokens": 65}, {"outcome": AuditOutcome.VOID}, {"voids": 1}):
        assert results_root([replace(jobs[0], **bent), *jobs[1:]]) != root
    assert results_root(jobs[:2]) != root
