"""The work account: both sides reach the same receipts from the same tokens, and no field of one can be bent."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from protocol.eip712 import digest, fields_of
from protocol.errors import MalformedFrame, ReceiptMismatch, RemoteProtocolError
from protocol.messages import WorkReceipt
from protocol.metering import Reasoning, Usage
from protocol.packing import pack, unpack
from protocol.tariff import Timing, basis_of, cost_up
from protocol.transcript import Leaf, Transcript
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, FinishReason, JobId, Tier, Wei
from protocol.work import CLOCK_SLACK_MS, DURATION_SLACK_MS, Work, check_receipt
from tests.protocol.documents import values
from tests.protocol.jobs import DEADLINE, DOMAIN, LONG, NO_REFUNDS, REQUEST, START, Job, Stage, jobs, row, stages
from tests.protocol.sheets import ON_SLOW_CPU, SHEET


def shared(work: Work) -> Work:
    """The account without what only one side's own clock shows."""
    return replace(work, accepted_seen=0, first_seen=0, waited_ms=0)


# --------------------------------------------------------------------------------------------------- both sides agree


@ON_SLOW_CPU
@given(jobs())
@example(LONG)
def test_both_accounts_agree_on_every_receipt(job: Job) -> None:
    previous, step, tokens = ZERO_DIGEST, 0, 0
    for stage in stages(job):
        receipt = stage.receipt
        after, receipt_digest = check_receipt(DOMAIN, stage.client, receipt, stage.now_ms)
        assert shared(after) == shared(stage.provider) and receipt_digest == digest(DOMAIN, receipt) == after.previous
        assert unpack(WorkReceipt, pack(receipt)) == receipt
        assert (receipt.step, receipt.previous) == (step + 1, previous)
        assert receipt.is_final or receipt.completion_tokens == tokens + LEAF_TOKENS
        assert tokens <= receipt.completion_tokens <= job.request.max_tokens
        previous, step, tokens = receipt_digest, receipt.step, receipt.completion_tokens
    assert receipt.is_final


@ON_SLOW_CPU
@given(jobs())
def test_the_leaves_root_is_the_transcript_of_all_tokens(job: Job) -> None:
    stage = stages(job)[-1]
    sent = [row for rows, _ in job.frames for row in rows][: job.request.max_tokens]
    chain = Transcript.start(JobId(digest(DOMAIN, job.request)))
    for at in range(0, len(sent), LEAF_TOKENS):
        chain = chain.extend(Leaf.of(sent[at : at + LEAF_TOKENS]))
    assert stage.receipt.leaves_root == chain.head and stage.receipt.completion_tokens == len(sent)
    assert stage.receipt.routing_root == chain.routing
    assert (chain.routing != ZERO_DIGEST) == bool(job.profile.moe_layers and sent)


@ON_SLOW_CPU
@given(jobs())
def test_reasoning_is_counted_over_all_tokens_at_every_receipt(job: Job) -> None:
    """However frames and receipts cut the stream."""
    ids = [row.token_id for rows, _ in job.frames for row in rows]
    for stage in stages(job):
        whole = Reasoning(job.profile.reasoning_start, job.profile.reasoning_end, job.options.reasoning_open)
        assert stage.receipt.reasoning_tokens == whole.take(ids[: stage.receipt.completion_tokens]).tokens


@ON_SLOW_CPU
@given(jobs())
def test_what_a_receipt_repeats_is_what_the_request_signed(job: Job) -> None:
    """So that receipt and tariff alone prove the charge."""
    for stage in stages(job):
        receipt = stage.receipt
        assert basis_of(receipt) == basis_of(job.request)
        usage = Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens, receipt.reasoning_tokens)
        timing = Timing(receipt.received_at, receipt.first_token_at, receipt.finished_at, receipt.waited_ms)
        assert cost_up(job.tariff, usage, basis_of(receipt), timing).total == receipt.total


@ON_SLOW_CPU
@given(jobs(NO_REFUNDS))
def test_totals_only_grow_when_nothing_is_refunded(job: Job) -> None:
    totals = [stage.receipt.total for stage in stages(job)]
    assert totals == sorted(totals)


def test_a_promise_missed_at_the_end_lowers_the_total() -> None:
    slow = replace(LONG, frames=tuple((rows, 9_000) for rows, _ in LONG.frames), tariff=replace(SHEET, per_request=0))
    slow = replace(slow, tariff=replace(slow.tariff, standard_ttft_ms=0, standard_refund_bps=10_000))
    totals = [stage.receipt.total for stage in stages(slow)]
    assert totals[0] > 0 and totals[-1] == 0


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.CANCELLED, FinishReason.DEADLINE])
def test_a_deadline_is_no_promise(finish: FinishReason) -> None:
    """A client chooses it: one that leaves no room would be a way to be refunded at will."""
    work = replace(LONG, tariff=replace(SHEET, standard_ttft_ms=0, standard_tpot_ms=0, standard_refund_bps=10_000))
    account = work.begin().take((row(1),), START)
    _, receipt = account.receipt(finish, DEADLINE + 1, Wei(0))
    assert receipt.refund == 0
    check_receipt(DOMAIN, account, receipt, DEADLINE + 1)


@pytest.mark.parametrize("wait_ms", [0, 6_000])
def test_time_spent_on_vouchers_is_the_clients_own(wait_ms: int) -> None:
    """79 tokens after the first, at 100 ms each: 7.9 s are promised, and waiting for vouchers does not count."""
    paced = replace(LONG, frames=tuple((rows, 2_600) for rows, _ in LONG.frames), wait_ms=wait_ms)
    paced = replace(paced, tariff=replace(SHEET, standard_ttft_ms=0))
    final = stages(paced)[-1].receipt
    assert final.waited_ms == 2 * wait_ms and final.finished_at - final.first_token_at == 7_800 + 2 * wait_ms
    assert final.refund == 0


# ------------------------------------------------------------------------------------------------- no field is believed

PEERS_OWN = {"first_token_at", "finished_at", "waited_ms", "finish_reason", "vouched", "is_kept"}
"""Fields in which an honest provider may say one of several things; their bounds have tests of their own. `vouched` is
about the channel, not the job: who holds the channel checks it."""


@pytest.mark.parametrize("field", [item.name for item in fields(WorkReceipt) if item.name not in PEERS_OWN])
@settings(ON_SLOW_CPU, max_examples=12)
@given(job=jobs(), data=st.data())
def test_an_altered_field_is_refused(field: str, job: Job, data: st.DataObject) -> None:
    stage = data.draw(st.sampled_from(stages(job)))
    honest = getattr(stage.receipt, field)
    value = data.draw(values(dict(fields_of(WorkReceipt))[field]))
    if data.draw(st.booleans()) and type(honest) is int:
        value = max(0, honest + data.draw(st.sampled_from([-1, 1])))
    assume(value != honest)
    with pytest.raises(ReceiptMismatch) as caught:
        check_receipt(DOMAIN, stage.client, replace(stage.receipt, **{field: value}), stage.now_ms)
    assert caught.value.claimed != caught.value.recomputed


@ON_SLOW_CPU
@given(jobs(), st.data())
def test_a_finish_reason_that_the_account_contradicts_is_refused(job: Job, data: st.DataObject) -> None:
    stage = data.draw(st.sampled_from(stages(job)))
    reasons = set(range(256))
    if stage.receipt.is_final:
        reasons -= set(FinishReason) - {FinishReason.OPEN, FinishReason.ERROR}
        if stage.client.completion_tokens != job.request.max_tokens:
            reasons.add(FinishReason.LENGTH)
        if stage.now_ms + CLOCK_SLACK_MS < DEADLINE:
            reasons.add(FinishReason.DEADLINE)
    reason = data.draw(st.sampled_from(sorted(reasons - {stage.receipt.finish_reason})))
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, stage.client, replace(stage.receipt, finish_reason=reason), stage.now_ms)


def test_the_cached_count_is_said_once() -> None:
    """A provider that first tells of a prefix hit may not price the whole prompt in a later receipt."""
    first, second, final = stages(LONG)
    for stage in (second, final):
        for cached in (0, 64, 96):
            bent = replace(stage.client, cached_tokens=cached, waited_ms=stage.receipt.waited_ms)
            finish = FinishReason(stage.receipt.finish_reason)
            _, receipt = bent.receipt(finish, stage.receipt.finished_at, Wei(stage.receipt.vouched))
            with pytest.raises(ReceiptMismatch) as caught:
                check_receipt(DOMAIN, stage.client, receipt, stage.now_ms)
            assert caught.value.field == "cached_tokens"
    assert first.receipt.cached_tokens == 32


def test_more_cached_than_the_prompt_is_refused_whatever_prompt_is_claimed() -> None:
    stage = stages(LONG)[0]
    bent = replace(stage.receipt, prompt_tokens=500, cached_tokens=416)
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, stage.client, bent, stage.now_ms)


# ------------------------------------------------------------------------------------------------------------ the clock


def timed(stage: Stage, **times: int) -> WorkReceipt:
    """The receipt a provider would make had its clock shown these times."""
    bent = replace(stage.client, first_token_at=times.get("first_token_at", stage.receipt.first_token_at))
    bent = replace(bent, cached_tokens=stage.receipt.cached_tokens)
    bent = replace(bent, waited_ms=times.get("waited_ms", stage.receipt.waited_ms))
    finish = FinishReason(stage.receipt.finish_reason)
    _, receipt = bent.receipt(finish, times.get("finished_at", stage.receipt.finished_at), Wei(stage.receipt.vouched))
    return receipt


@pytest.mark.parametrize("ahead", [-DURATION_SLACK_MS - LONG.lag_ms - 1, CLOCK_SLACK_MS + 1, -(10**9), 10**9])
def test_a_first_token_time_too_far_from_ours_is_refused(ahead: int) -> None:
    """Both ways: an early one hides a late first token, a late one hides slow tokens after it."""
    slow = replace(LONG, frames=tuple((rows, 6_000) for rows, _ in LONG.frames))
    stage = stages(slow)[0]
    with pytest.raises(ReceiptMismatch) as caught:
        receipt = timed(stage, first_token_at=stage.client.first_token_at + ahead)
        check_receipt(DOMAIN, stage.client, receipt, stage.now_ms)
    assert caught.value.field == "first_token_at"


@pytest.mark.parametrize("ahead", [-DURATION_SLACK_MS - LONG.lag_ms, CLOCK_SLACK_MS])
def test_a_first_token_time_within_the_slack_is_taken(ahead: int) -> None:
    slow = replace(LONG, frames=tuple((rows, 6_000) for rows, _ in LONG.frames))
    stage = stages(slow)[0]
    receipt = timed(stage, first_token_at=stage.client.first_token_at + ahead)
    after, _ = check_receipt(DOMAIN, stage.client, receipt, stage.now_ms)
    assert after.first_token_at == receipt.first_token_at


def test_the_first_token_time_is_said_once() -> None:
    for stage in stages(LONG)[1:]:
        receipt = timed(stage, first_token_at=stage.receipt.first_token_at + 1)
        with pytest.raises(ReceiptMismatch) as caught:
            check_receipt(DOMAIN, stage.client, receipt, stage.now_ms)
        assert caught.value.field == "first_token_at"


@pytest.mark.parametrize("at", [0, START - 1])
def test_a_first_token_without_a_time_or_before_the_job_is_refused(at: int) -> None:
    stage = stages(LONG)[0]
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, stage.client, timed(stage, first_token_at=at), stage.now_ms)


def test_a_time_for_a_token_that_never_came_is_refused() -> None:
    stage = stages(replace(LONG, frames=()))[0]
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, stage.client, timed(stage, first_token_at=START + 1), stage.now_ms)


@pytest.mark.parametrize("ahead", [-DURATION_SLACK_MS - LONG.lag_ms - 1, CLOCK_SLACK_MS + 1, -(10**9), 10**9])
def test_an_end_too_far_from_ours_is_refused(ahead: int) -> None:
    stage = stages(LONG)[-1]
    with pytest.raises(ReceiptMismatch) as caught:
        check_receipt(DOMAIN, stage.client, timed(stage, finished_at=stage.now_ms + ahead), stage.now_ms)
    assert caught.value.field == "finished_at"


def test_a_wait_that_we_did_not_cause_is_refused() -> None:
    """A provider that is slow may not call it waiting for us; a second per receipt is the network's."""
    for stage in stages(LONG):
        most = stage.client.waited_ms + DURATION_SLACK_MS * stage.receipt.step
        after, _ = check_receipt(DOMAIN, stage.client, timed(stage, waited_ms=most), stage.now_ms)
        assert after.waited_ms == stage.client.waited_ms  # our own count stays
        with pytest.raises(ReceiptMismatch) as caught:
            check_receipt(DOMAIN, stage.client, timed(stage, waited_ms=most + 1), stage.now_ms)
        assert caught.value.field == "waited_ms"


def test_a_job_that_has_all_its_tokens_ends() -> None:
    whole = replace(LONG, request=replace(REQUEST, max_tokens=64))
    *_, before, final = stages(whole)
    assert (before.receipt.completion_tokens, final.receipt.completion_tokens) == (32, 64)
    _, open_one = replace(final.client, cached_tokens=32).receipt(FinishReason.OPEN, 0, Wei(0))
    with pytest.raises(ReceiptMismatch) as caught:
        check_receipt(DOMAIN, final.client, open_one, final.now_ms)
    assert caught.value.field == "finish_reason"


@pytest.mark.parametrize("at", [0, START - 1, START + 1])
def test_an_end_out_of_order_is_refused(at: int) -> None:
    stage = stages(LONG)[-1]
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, stage.client, timed(stage, finished_at=at), stage.now_ms)


def test_an_interim_receipt_has_no_end() -> None:
    stage = stages(LONG)[0]
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, stage.client, timed(stage, finished_at=stage.now_ms), stage.now_ms)


# --------------------------------------------------------------------------------------------------------- increments


@ON_SLOW_CPU
@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=10))
def test_no_frame_overruns_the_leaf_or_max_tokens(max_tokens: int, sizes: list[int]) -> None:
    work = replace(LONG, request=replace(REQUEST, max_tokens=max_tokens)).begin()
    for size in sizes:
        rows = tuple(row(i) for i in range(size))
        if not 0 < size <= work.room:
            with pytest.raises(RemoteProtocolError):
                work.take(rows, START)
            continue
        work = work.take(rows, START)
        assert len(work.pending) <= LEAF_TOKENS and work.completion_tokens <= max_tokens
        if len(work.pending) == LEAF_TOKENS:
            work, _ = work.receipt(FinishReason.OPEN, 0, Wei(0))


@pytest.mark.parametrize("pending", [0, 1, LEAF_TOKENS - 1])
def test_an_interim_receipt_comes_only_at_a_full_leaf(pending: int) -> None:
    work = LONG.begin()
    if pending:
        work = work.take(tuple(row(i) for i in range(pending)), START)
    with pytest.raises(RemoteProtocolError):
        work.receipt(FinishReason.OPEN, 0, Wei(0))


def test_nothing_follows_a_short_leaf() -> None:
    """A final receipt over a short leaf closes the transcript for good."""
    work, _ = LONG.begin().take((row(1),), START).receipt(FinishReason.STOP, START, Wei(0))
    with pytest.raises(MalformedFrame):
        work.take((row(2),), START).receipt(FinishReason.STOP, START, Wei(0))


@ON_SLOW_CPU
@given(jobs())
def test_a_step_changes_no_earlier_account(job: Job) -> None:
    stage = stages(job)[0]
    again = replace(stage.client)
    for _ in range(2):
        check_receipt(DOMAIN, stage.client, stage.receipt, stage.now_ms)
    assert stage.client == again


def test_a_cancelled_job_without_a_token_owes_its_prompt() -> None:
    stage = stages(replace(LONG, frames=(), finish=FinishReason.CANCELLED, tariff=replace(SHEET, per_request=0)))[0]
    assert stage.receipt.total == 100 * SHEET.prompt_price and Tier(REQUEST.tier) is Tier.STANDARD
