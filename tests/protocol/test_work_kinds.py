"""Work accounts beyond plain text: embeddings, experts, prefix hits, and jobs that nothing is sold on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Final

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocol.eip712 import digest, fields_of
from protocol.errors import FieldOutOfRange, ReceiptMismatch, RemoteProtocolError, TallyError, TierNotOffered
from protocol.messages import Tariff, WorkReceipt
from protocol.metering import Usage, embedding_flops
from protocol.options import MAX_EMBED_INPUTS, JobOptions, encode_options, options_hash
from protocol.tariff import PRICES, basis_of
from protocol.units import ZERO_DIGEST, Digest, FinishReason, JobKind, Tier, Wei
from protocol.work import Work, check_receipt, most_up
from tests.protocol.documents import values
from tests.protocol.jobs import DOMAIN, EXPERTS, LONG, REQUEST, START, Job, jobs, row, stages
from tests.protocol.sheets import ON_SLOW_CPU, PROFILE, SHEET, bases, exact_metered, tariffs

OTHER: Final = Digest(b"\x77" * 32)
lengths = st.lists(st.integers(1, 3_000), min_size=1, max_size=MAX_EMBED_INPUTS).map(tuple)


def embedding(inputs: tuple[int, ...], tariff: Tariff = SHEET, **request: Any) -> Job:
    """A job over texts of those lengths, 30 ms away."""
    options = JobOptions(inputs=inputs)
    encoded = options_hash(encode_options(options))
    asked = {"kind": JobKind.EMBED, "prompt_tokens": sum(inputs), "max_tokens": 0, "options_hash": encoded} | request
    return Job(replace(REQUEST, **asked), tariff, 0, (), FinishReason.STOP, 30, Wei(0), options=options)


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[Job, tuple[bytes, ...]]:
    """An embedding job over any tariff, and the vectors that were delivered of it."""
    inputs, tariff = draw(lengths), draw(tariffs())
    basis = replace(draw(bases(tariff)), kind=JobKind.EMBED)
    job = embedding(
        inputs,
        tariff,
        tier=basis.tier,
        is_private=basis.private,
        base_bps=basis.base_bps,
        reservation=basis.reservation,
    )
    delivered = draw(st.integers(0, len(inputs)))
    return job, tuple(draw(st.binary(min_size=4, max_size=4)) * 8 for _ in range(delivered))


def both(job: Job, vectors: tuple[bytes, ...], step_ms: int = 5) -> tuple[Work, Work, int]:
    """The provider's account, the client's, and the provider's clock after those vectors."""
    provider, client, now = job.begin(), job.begin(START + job.lag_ms), START
    for index, vector in enumerate(vectors):
        now += step_ms
        provider, client = provider.take_vector(index, vector, now), client.take_vector(index, vector, now + job.lag_ms)
    return provider, client, now


def ended(job: Job, vectors: tuple[bytes, ...]) -> FinishReason:
    return FinishReason.STOP if len(vectors) == len(job.options.inputs) else FinishReason.CANCELLED


# ----------------------------------------------------------------------------------------------------------- embeddings


@ON_SLOW_CPU
@given(embeddings())
def test_both_sides_reach_the_receipt_of_an_embedding_job(made: tuple[Job, tuple[bytes, ...]]) -> None:
    """It pays for the texts whose vectors came, and for no other."""
    job, vectors = made
    provider, client, now = both(job, vectors)
    after, receipt = provider.receipt(ended(job, vectors), now, Wei(0))
    checked, receipt_digest = check_receipt(DOMAIN, client, receipt, now + job.lag_ms)
    assert receipt_digest == digest(DOMAIN, receipt) and checked.total == after.total == receipt.total

    read = job.options.inputs[: len(vectors)]
    assert (receipt.prompt_tokens, receipt.cached_tokens) == (sum(read), 0)
    assert receipt.completion_tokens == receipt.reasoning_tokens == 0
    exact = exact_metered(job.tariff, Usage(sum(read), 0, 0, 0), basis_of(job.request))
    assert receipt.total == math.ceil(exact) + job.tariff.per_request - receipt.refund
    assert receipt.ste_micro == -(-embedding_flops(PROFILE, read) // 16_000)
    assert (receipt.is_final, receipt.step, bool(receipt.first_token_at)) == (True, 1, bool(vectors))

    head = hashlib.sha256(b"tally/transcript/start/1" + client.job_id).digest()
    for vector in vectors:
        leaf = hashlib.sha256(b"tally/transcript/vector/1" + vector).digest()
        head = hashlib.sha256(b"tally/transcript/head/1" + head + leaf).digest()
    assert (receipt.leaves_root, receipt.routing_root) == (head, ZERO_DIGEST)


@ON_SLOW_CPU
@given(embeddings())
def test_an_embedding_job_never_comes_to_more_than_was_reserved(made: tuple[Job, tuple[bytes, ...]]) -> None:
    job, vectors = made
    provider, _, now = both(job, vectors)
    _, receipt = provider.receipt(ended(job, vectors), now, Wei(0))
    assert receipt.total <= most_up(job.tariff, job.request, 32)


def test_a_discount_for_long_prompts_is_no_way_out_of_a_reservation() -> None:
    """A job that ends after its first text was not long, and is dearer than all of it would have been."""
    sheet = replace(SHEET, long_context_threshold=100, long_context_bps=1_000)
    job = embedding((100, 100), sheet)
    provider, _, now = both(job, (bytes(16),))
    _, receipt = provider.receipt(FinishReason.CANCELLED, now, Wei(0))
    assert receipt.total == 100 * sheet.embedding_price + sheet.per_request > 20 * sheet.embedding_price
    assert most_up(sheet, job.request, 32) == receipt.total


def test_vectors_come_in_order_and_no_more_than_were_asked_for() -> None:
    work = embedding((5, 6)).begin()
    for index in (1, 2, -1):
        with pytest.raises(RemoteProtocolError):
            work.take_vector(index, bytes(16), START)
    work = work.take_vector(0, bytes(16), START)
    for index in (0, 2):
        with pytest.raises(RemoteProtocolError):
            work.take_vector(index, bytes(16), START)
    work = work.take_vector(1, bytes(16), START + 7)
    assert (work.begun, work.first_token_at) == (True, START)
    with pytest.raises(RemoteProtocolError):
        work.take_vector(2, bytes(16), START)


def test_a_vector_is_no_output_of_a_job_that_writes_and_a_token_none_of_one_that_embeds() -> None:
    with pytest.raises(RemoteProtocolError):
        replace(LONG, options=JobOptions(inputs=(5,))).begin().take_vector(0, bytes(16), START)
    for max_tokens in (0, 10):
        with pytest.raises(RemoteProtocolError):
            embedding((5, 6), max_tokens=max_tokens).begin().take((row(1),), START)


@pytest.mark.parametrize("delivered", [0, 1, 2, 3])
@pytest.mark.parametrize("finish", list(FinishReason))
def test_how_an_embedding_job_may_end(delivered: int, finish: FinishReason) -> None:
    """STOP after the last vector and only then; LENGTH never; before that, what ends any job."""
    job = embedding((5, 6, 7))
    provider, client, now = both(job, (bytes(16),) * delivered)
    if finish is FinishReason.DEADLINE:
        now = job.request.deadline
        client = replace(client, accepted_seen=0)
    lawful = (
        {FinishReason.STOP}
        if delivered == 3
        else set(FinishReason)
        - {
            FinishReason.STOP,
            FinishReason.LENGTH,
            FinishReason.ERROR,
            FinishReason.OPEN,
        }
    )
    _, honest = provider.receipt(FinishReason.STOP, now, Wei(0))
    final = finish is not FinishReason.OPEN
    claimed = replace(honest, finish_reason=finish, is_final=final, finished_at=now if final else 0)
    if finish in lawful:
        check_receipt(DOMAIN, client, claimed, now + job.lag_ms)
        return
    with pytest.raises(RemoteProtocolError):
        check_receipt(DOMAIN, client, claimed, now + job.lag_ms)


def test_no_interim_receipt_comes_of_an_embedding_job() -> None:
    provider, _, _ = both(embedding((5, 6, 7)), (bytes(16),) * 2)
    with pytest.raises(RemoteProtocolError):
        provider.receipt(FinishReason.OPEN, 0, Wei(0))


def test_other_vectors_are_another_transcript() -> None:
    job = embedding((5, 6))
    provider, _, now = both(job, (b"\1" * 16, b"\2" * 16))
    _, receipt = provider.receipt(FinishReason.STOP, now, Wei(0))
    for vectors in ((b"\2" * 16, b"\1" * 16), (b"\1" * 16, b"\2" * 15 + b"\3")):
        _, client, _ = both(job, vectors)
        with pytest.raises(ReceiptMismatch) as caught:
            check_receipt(DOMAIN, client, receipt, now)
        assert caught.value.field == "leaves_root"


PEERS_OWN = {"first_token_at", "finished_at", "waited_ms", "finish_reason", "vouched"}


@pytest.mark.parametrize("field", [item.name for item in fields(WorkReceipt) if item.name not in PEERS_OWN])
@settings(ON_SLOW_CPU, max_examples=5)
@given(made=embeddings(), data=st.data())
def test_an_altered_field_of_an_embedding_receipt_is_refused(field: str, made: Any, data: st.DataObject) -> None:
    job, vectors = made
    provider, client, now = both(job, vectors)
    _, receipt = provider.receipt(ended(job, vectors), now, Wei(0))
    honest = getattr(receipt, field)
    value = data.draw(values(dict(fields_of(WorkReceipt))[field]))
    assume(value != honest)
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, client, replace(receipt, **{field: value}), now + job.lag_ms)


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("routing", [b"", bytes(7), bytes(9), bytes(16)])
def test_each_token_of_a_mixture_of_experts_says_where_it_went(routing: bytes) -> None:
    work = replace(LONG, profile=EXPERTS).begin()
    with pytest.raises(RemoteProtocolError):
        work.take((row(1, routing),), START)
    with pytest.raises(RemoteProtocolError):
        work.take((row(1, bytes(8)), row(2, routing)), START)  # some with, some without
    assert work.take((row(1, bytes(8)), row(2, bytes(8))), START).completion_tokens == 2


def test_a_token_of_a_dense_model_went_nowhere() -> None:
    with pytest.raises(RemoteProtocolError):
        LONG.begin().take((row(1, bytes(8)),), START)


def test_experts_other_than_those_received_are_refused() -> None:
    job = replace(LONG, profile=EXPERTS, frames=(((row(1, b"12345678"), row(2, b"abcdefgh")), 10),))
    (stage,) = stages(job)
    swapped = job.begin(START).take((row(1, b"abcdefgh"), row(2, b"12345678")), START + 10)
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, swapped, stage.receipt, stage.now_ms)
    with pytest.raises(ReceiptMismatch) as caught:
        check_receipt(DOMAIN, stage.client, replace(stage.receipt, routing_root=OTHER), stage.now_ms)
    assert caught.value.field == "routing_root"


# ---------------------------------------------------------------------------------------------------------- prefix hits


def claiming(job: Job, bend: Callable[[Work], Work]) -> tuple[Work, WorkReceipt, int]:
    """The client's account, a first receipt that is consistent with a bent one, and the client's clock."""
    stage = stages(job)[0]
    honest = replace(stage.client, cached_tokens=job.cached, kept=job.kept, first_token_at=stage.receipt.first_token_at)
    finish = FinishReason(stage.receipt.finish_reason)
    _, receipt = bend(honest).receipt(finish, stage.receipt.finished_at, job.vouched)
    return stage.client, receipt, stage.now_ms


def refused_field(job: Job, **changes: Any) -> str:
    """Which field a first receipt with those changes is refused for."""
    client, receipt, now_ms = claiming(job, lambda work: work)
    with pytest.raises(ReceiptMismatch) as caught:
        check_receipt(DOMAIN, client, replace(receipt, **changes), now_ms)
    return caught.value.field


@pytest.mark.parametrize("cached", [1, 31, 33, 100, 128, 1 << 31])
def test_a_hit_is_whole_blocks_of_the_prompt(cached: int) -> None:
    """Of 100 tokens 96 can be cached."""
    assert refused_field(LONG, cached_tokens=cached) == "cached_tokens"


@pytest.mark.parametrize("cached", [0, 32, 64, 96])
def test_any_whole_block_is_taken_with_its_head(cached: int) -> None:
    client, receipt, now_ms = claiming(LONG, lambda work: work.hit(cached, kept=True))
    after, _ = check_receipt(DOMAIN, client, receipt, now_ms)
    assert (after.cached_tokens, after.kept) == (cached, True)
    with pytest.raises(ReceiptMismatch) as caught:
        check_receipt(DOMAIN, client, replace(receipt, cache_head=OTHER), now_ms)
    assert caught.value.field == "cache_head"


def test_the_last_token_of_a_prompt_is_computed() -> None:
    job = replace(LONG, request=replace(LONG.request, prompt_tokens=96), cached=64)
    assert refused_field(job, cached_tokens=96) == "cached_tokens"
    client, receipt, now_ms = claiming(job, lambda work: work)
    check_receipt(DOMAIN, client, receipt, now_ms)


@pytest.mark.parametrize("cached", [32, 96])
def test_without_a_salt_nothing_is_cached(cached: int) -> None:
    assert refused_field(replace(LONG, salted=False, cached=0), cached_tokens=cached) == "cached_tokens"


@pytest.mark.parametrize("job", [replace(LONG, salted=False, cached=0)])
def test_what_was_not_named_is_not_kept(job: Job) -> None:
    assert refused_field(job, is_kept=True) == "is_kept"
    assert not job.begin().hit(0, kept=True).kept
    short = replace(LONG, request=replace(LONG.request, prompt_tokens=31), cached=0)
    assert refused_field(short, is_kept=True) == "is_kept"


def test_whether_a_prompt_is_kept_is_said_once() -> None:
    for kept in (False, True):
        for stage in stages(replace(LONG, kept=kept))[1:]:
            with pytest.raises(ReceiptMismatch) as caught:
                check_receipt(DOMAIN, stage.client, replace(stage.receipt, is_kept=not kept), stage.now_ms)
            assert caught.value.field == "is_kept"


@ON_SLOW_CPU
@given(jobs(), st.sampled_from([-1, 1]))
def test_a_reasoning_count_of_its_own_is_refused(job: Job, more: int) -> None:
    """Even when the money is worked out from it: dearer tokens would be sold where there are none."""
    job = replace(job, profile=replace(job.profile, reasoning_start=1, reasoning_end=2))

    def bend(work: Work) -> Work:
        return replace(work, reasoning=replace(work.reasoning, tokens=work.reasoning.tokens + more))

    (first, *_) = stages(job)
    assume(0 <= first.receipt.reasoning_tokens + more <= first.receipt.completion_tokens)
    client, receipt, now_ms = claiming(
        replace(job, cached=first.receipt.cached_tokens, kept=first.receipt.is_kept), bend
    )
    with pytest.raises(ReceiptMismatch) as caught:
        check_receipt(DOMAIN, client, receipt, now_ms)
    assert caught.value.field == "reasoning_tokens"


@pytest.mark.parametrize(
    "request_changes",
    [
        {"base_bps": 10_001},
        {"tier": Tier.FLEX},
        {"tier": Tier.PRIORITY},
        {"kind": JobKind.BATCH, "tier": Tier.FLEX},
        {"kind": JobKind.EMBED},
        {"is_private": True},
        {"base_bps": 8_000, "reservation": OTHER},
    ],
    ids=str,
)
def test_a_receipt_on_another_basis_is_refused(request_changes: dict[str, Any]) -> None:
    """Consistent in itself, by the tariff, and not what was asked for."""
    client, receipt, now_ms = claiming(
        replace(LONG, cached=0), lambda work: replace(work, request=replace(work.request, **request_changes))
    )
    with pytest.raises(ReceiptMismatch):
        check_receipt(DOMAIN, client, receipt, now_ms)


# ------------------------------------------------------------------------------------------------ nothing is sold on it


@pytest.mark.parametrize(
    ("request_changes", "sheet_changes", "error"),
    [
        ({"tier": Tier.STANDARD}, {"standard_bps": 0}, TierNotOffered),
        ({"base_bps": SHEET.base_min_bps - 1}, {}, FieldOutOfRange),
        ({"base_bps": SHEET.base_max_bps + 1}, {}, FieldOutOfRange),
        ({"base_bps": 0}, {}, FieldOutOfRange),
        ({"base_bps": 10_000, "reservation": OTHER}, {}, FieldOutOfRange),
        ({"kind": JobKind.BATCH}, {}, FieldOutOfRange),
        ({"kind": 3}, {}, FieldOutOfRange),
        ({"tier": 3}, {}, FieldOutOfRange),
    ],
)
def test_a_job_that_nothing_is_sold_on_comes_to_no_receipt(
    request_changes: dict[str, Any], sheet_changes: dict[str, int], error: type[TallyError]
) -> None:
    """Neither side's account gives a price for it, not even of zero."""
    tariff, request = replace(SHEET, **sheet_changes), replace(LONG.request, **request_changes)
    with pytest.raises(error):
        most_up(tariff, request, 32)
    account = replace(LONG, request=request, tariff=tariff).begin()
    with pytest.raises(error):
        account.receipt(FinishReason.CANCELLED, START, Wei(0))
    with pytest.raises(error):
        check_receipt(DOMAIN, account, replace(PRICELESS, job_id=Digest(account.job_id)), START)


PRICELESS: Final = stages(replace(LONG, frames=(), cached=0, lag_ms=0, finish=FinishReason.CANCELLED))[0].receipt
"""What a provider might state for a job that its sheet has no price for."""


@ON_SLOW_CPU
@given(jobs(tariffs().map(lambda sheet: replace(sheet, **dict.fromkeys(PRICES, 0)))))
def test_a_free_tariff_gives_receipts_over_nothing(job: Job) -> None:
    """Counted, recomputed and signed for like any other; only the money is zero."""
    for stage in stages(job):
        receipt = stage.receipt
        assert receipt.total == receipt.refund == receipt.prompt_line == receipt.completion_line == 0
        assert receipt.ste_micro > 0
    assert most_up(job.tariff, job.request, job.request.max_tokens) == 0
