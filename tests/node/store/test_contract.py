"""What each record means, on disk and in the memory twin alike (the fixture `store` runs every test on both)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from incentives.ledger import Record, Role
from node.ports import Store, StoreError
from protocol.units import MAX_AMOUNT, FinishReason
from tests.node.store import samples as s
from tests.node.store.samples import PROVIDER, client, job_id, key


async def test_the_records_of_both_roles_come_back_as_they_were(store: Store) -> None:
    for call in s.one_of_each():
        await store.write(*call)
    opened = s.opened(1)
    row = await store.job(job_id(1))
    assert row is not None
    assert (row.request, row.accept, row.model) == (opened.request, opened.accept, "tiny")
    assert (row.request_signature, row.accept_signature) == (opened.request_signature, opened.accept_signature)
    assert (row.steps, row.owed, row.closed) == (2, 120, FinishReason.STOP)
    assert row.opened_at_ms == opened.accept.accepted_at
    bought = s.vouched(7, 1, 30, 30, 1, is_final=True, finish_reason=1)
    (kept,) = await store.receipts(role=Role.CLIENT)
    assert (kept.receipt, kept.digest, kept.voucher) == (bought.receipt, bought.digest, bought.voucher)
    assert (kept.receipt_signature, kept.token_ids) == (bought.receipt_signature, bought.token_ids)


async def test_owed_sums_the_last_acknowledged_total_of_each_job_of_the_provider(store: Store) -> None:
    await store.write(s.opened(1), s.opened(2), s.issued(1, 1, 50), s.issued(2, 1, 7))
    assert (await _account(store)).owed == 0, "a receipt that nobody acknowledged is owed by nobody"
    await store.write(s.received(1, 1, 50))
    await store.write(s.received(2, 1, 57))
    await store.write(s.issued(1, 2, 110), s.received(1, 2, 117))
    account = await _account(store)
    assert (account.owed, account.vouched) == (117, 117)
    assert account.voucher_signature == s.received(1, 2, 117).signature
    assert [row.steps for row in await store.jobs(Role.PROVIDER)] == [1, 2]


async def test_owed_of_the_client_is_what_it_vouched_for(store: Store) -> None:
    await store.write(s.opened(1, Role.CLIENT), s.opened(2, Role.CLIENT))
    await store.write(s.vouched(1, 1, 50, 50))
    await store.write(s.vouched(2, 1, 7, 57))
    account = await _account(store)
    assert (account.owed, account.vouched, account.voucher_signature) == (57, 57, b"")


async def test_a_final_receipt_with_a_refund_lowers_what_is_owed_and_not_what_is_vouched(store: Store) -> None:
    await store.write(s.opened(1), s.issued(1, 1, 50), s.received(1, 1, 50))
    final = s.issued(1, 2, 45, is_final=True)
    await store.write(final, s.ack_received(final))
    account = await _account(store)
    assert (account.owed, account.vouched) == (45, 50)
    (row,) = await store.receipts(final_only=True)
    assert row.ack_signature == s.ack_received(final).signature
    assert row.voucher is None


async def test_an_acknowledged_step_covers_the_steps_before_it(store: Store) -> None:
    await store.write(s.opened(1), s.issued(1, 1, 10), s.issued(1, 2, 20), s.issued(1, 3, 30), s.received(1, 2, 20))
    (row,) = await store.jobs(Role.PROVIDER)
    assert (row.steps, row.owed) == (2, 20)


async def test_vouchers_of_two_jobs_may_overtake_each_other(store: Store) -> None:
    """Two streams of one channel: the voucher over 20 is handled before the one over 10 that was signed first."""
    await store.write(s.opened(1), s.opened(2), s.issued(1, 1, 10), s.issued(2, 1, 10))
    await store.write(s.received(2, 1, 20))
    await store.write(s.received(1, 1, 10))
    account = await _account(store)
    assert (account.owed, account.vouched) == (20, 20)
    assert account.voucher_signature == s.received(2, 1, 20).signature


@pytest.mark.parametrize("role", list(Role))
async def test_every_record_may_be_replayed(store: Store, role: Role) -> None:
    for call in s.one_of_each():
        await store.write(*call)
    before = await _everything(store)
    for call in s.one_of_each():
        if not any(type(record).__name__.startswith("Settlement") for record in call):
            await store.write(*call)
    assert await _everything(store) == before


def _contradictions() -> list[Any]:
    """(what, calls that are fine, the call that must be refused)."""
    final = s.issued(1, 1, 50, is_final=True)
    job: list[Record] = [s.opened(1), s.issued(1, 1, 50)]
    bought: list[Record] = [s.opened(1, Role.CLIENT), s.vouched(1, 1, 50, 50)]
    unknown = replace(s.ack_received(final), ack=type(s.ack_received(final).ack)(s.transaction(99)))
    other_payee = replace(s.received(1, 1, 50), voucher=replace(s.voucher(50), provider=client()))
    return [
        ("another request under one job id", [s.opened(1)], s.opened(1, max_tokens=77)),
        ("another receipt under one step", job, s.issued(1, 1, 51)),
        ("another digest for one receipt", job, replace(s.issued(1, 1, 50), digest=s.transaction(1))),
        ("another voucher for one step", [*job, s.received(1, 1, 50)], s.received(1, 1, 60)),
        (
            "a lower voucher of one job",
            [*job, s.received(1, 1, 50), s.issued(1, 2, 60)],
            s.received(1, 2, 49),
        ),
        ("a voucher for a receipt never issued", [s.opened(1)], s.received(1, 1, 50)),
        ("a voucher of another client", job, replace(s.received(1, 1, 50), client=client(3))),
        ("a voucher for somebody else", job, other_payee),
        (
            "a voucher behind the last acknowledged step",
            [*job, s.issued(1, 2, 60), s.received(1, 2, 60)],
            s.received(1, 1, 60),
        ),
        ("a receipt of a job never opened", [], s.issued(1, 1, 50)),
        ("a receipt of another channel", [s.opened(1)], s.issued(1, 1, 50, 3)),
        ("a receipt after the end", [*job, s.closed(1, 0)], s.issued(1, 2, 60)),
        ("another end", [s.opened(1), s.closed(1, 0)], s.closed(1, 0, reason=FinishReason.CANCELLED)),
        ("the end of a job never opened", [], s.closed(1, 0)),
        ("an acknowledgement of an unknown receipt", job, unknown),
        (
            "another signature under one acknowledgement",
            [s.opened(1), final, s.ack_received(final)],
            replace(s.ack_received(final), signature=b"other"),
        ),
        ("the client's other receipt under one step", bought, s.vouched(1, 1, 51, 51)),
        ("the client's lower voucher", [*bought, s.opened(2, Role.CLIENT)], s.vouched(2, 1, 5, 49)),
        ("an amount above uint96", [s.opened(1, Role.CLIENT)], s.vouched(1, 1, 50, MAX_AMOUNT + 1)),
        (
            "a debt above uint96",
            [s.opened(1), s.issued(1, 1, MAX_AMOUNT), s.received(1, 1, 1), s.opened(2), s.issued(2, 1, 1)],
            s.received(2, 1, 2),
        ),
        ("other vouchers in one settlement", [s.sent(1, 50)], s.sent(1, 60)),
        ("the end of an unknown settlement", [], s.mined(1)),
        ("the loss of an unknown settlement", [], s.dropped(1)),
        ("a prompt of a job never opened", [], s.prompt_kept(1)),
        (
            "another prompt of one job",
            [s.opened(1), s.prompt_kept(1)],
            replace(s.prompt_kept(1), prompt=(1, 2)),
        ),
        ("output of a job whose prompt is not kept", [s.opened(1)], s.output_kept(1, 1)),
        ("output under no receipt", [s.opened(1), s.prompt_kept(1)], s.output_kept(1, 0)),
        (
            "other output under one step",
            [s.opened(1), s.prompt_kept(1), s.output_kept(1, 1)],
            replace(s.output_kept(1, 1), content=(b"other",)),
        ),
        ("shredding a running job", [s.opened(1), s.prompt_kept(1)], s.shredded(1)),
        ("another commitment under one key", [s.commitment(1)], replace(s.commitment(1), secret=b"\x03" * 32)),
        ("other entries under one key", [s.commitment(1)], replace(s.commitment(1), entries=b"")),
        ("another verdict in one round", [s.verdict(1)], s.verdict(1, flags=99)),
    ]


@pytest.mark.parametrize(("before", "refused"), [pytest.param(*case[1:], id=case[0]) for case in _contradictions()])
async def test_what_contradicts_the_journal_is_refused_and_changes_nothing(
    store: Store, before: list[Record], refused: Record
) -> None:
    for record in before:
        await store.write(record)
    kept = await _everything(store)
    with pytest.raises(StoreError):
        await store.write(s.slot(9), refused)
    assert await _everything(store) == kept, "the slot of the same call was kept"
    await store.write(s.slot(9))


async def test_a_voucher_that_comes_after_the_end_is_still_money(store: Store) -> None:
    await store.write(s.opened(1), s.issued(1, 1, 50), s.closed(1, 0, reason=FinishReason.CANCELLED))
    await store.write(s.received(1, 1, 50))
    assert (await _account(store)).owed == 50
    await store.write(s.closed(1, 0, reason=FinishReason.CANCELLED))


async def test_the_receipts_stand_when_the_end_says_another_amount(store: Store) -> None:
    await store.write(s.opened(1), s.issued(1, 1, 50), s.received(1, 1, 50))
    await store.write(s.closed(1, 0, reason=FinishReason.CANCELLED))
    row = await store.job(job_id(1))
    assert row is not None and (row.owed, row.closed) == (50, FinishReason.CANCELLED)


async def test_open_jobs_are_found_newest_first(store: Store) -> None:
    await store.write(*[s.opened(number) for number in range(4)], s.opened(9, Role.CLIENT))
    await store.write(s.closed(2, 0))
    assert [row.job_id for row in await store.jobs(Role.PROVIDER)] == [job_id(n) for n in (3, 2, 1, 0)]
    assert [row.job_id for row in await store.jobs(Role.PROVIDER, open_only=True)] == [job_id(n) for n in (3, 1, 0)]
    assert [row.job_id for row in await store.jobs(Role.PROVIDER, limit=1)] == [job_id(3)]
    assert await store.job(job_id(77)) is None


async def test_receipts_of_a_job_come_in_the_order_of_steps_others_newest_first(store: Store) -> None:
    await store.write(s.opened(1), s.opened(2), s.issued(1, 2, 5), s.issued(2, 1, 5), s.issued(1, 1, 3))
    assert [row.receipt.step for row in await store.receipts(job_id=job_id(1))] == [1, 2]
    rows = await store.receipts(limit=2)
    assert [(row.receipt.job_id, row.receipt.step) for row in rows] == [(job_id(1), 1), (job_id(2), 1)]
    assert await store.receipts(role=Role.CLIENT) == []
    assert await store.receipts(final_only=True) == []


async def test_a_receipt_is_found_by_the_first_bytes_of_its_digest(store: Store) -> None:
    made = s.issued(1, 1, 5)
    high = [replace(s.issued(1, step, 5), digest=type(made.digest)(b"\xff" * 31 + bytes([step]))) for step in (2, 3)]
    await store.write(s.opened(1), made, *high)
    for prefix in (made.digest, made.digest[:4], made.digest[:1]):
        row = await store.receipt(prefix)
        assert row is not None and row.digest == made.digest
    assert await store.receipt(b"\x00" * 32) is None
    assert (await store.receipt(high[0].digest)) is not None
    with pytest.raises(StoreError, match="several"):
        await store.receipt(b"\xff\xff")
    with pytest.raises(StoreError):
        await store.receipt(b"")


async def test_a_slot_is_what_the_chain_said_last(store: Store) -> None:
    assert await store.account(key()) is None
    await store.write(s.slot(deposit=100, claimed=10, block=7))
    await store.write(s.slot(deposit=90, claimed=5, exit_at=1_800_000_000, block=6))  # a reorganisation
    account = await _account(store)
    assert (account.deposit, account.claimed, account.exit_at, account.owner) == (90, 5, 1_800_000_000, s.OWNER)


async def test_a_slot_without_a_job_is_listed_for_both_roles_until_it_has_one(store: Store) -> None:
    await store.write(s.slot(0), s.slot(1))
    await store.write(s.opened(1, of=1))
    assert [a.key for a in await store.accounts(Role.PROVIDER)] == [key(1), key(0)]
    assert [a.key for a in await store.accounts(Role.CLIENT)] == [key(0)]


async def test_a_node_may_hold_both_halves_of_one_stick(store: Store) -> None:
    await store.write(s.opened(1, Role.CLIENT), s.opened(1), s.slot())
    await store.write(s.issued(1, 1, 50))
    await store.write(s.vouched(1, 1, 50, 50))
    (bought,) = await store.accounts(Role.CLIENT)
    (sold,) = await store.accounts(Role.PROVIDER)
    assert (bought.owed, sold.owed) == (50, 0)
    await store.write(s.received(1, 1, 50))
    (sold,) = await store.accounts(Role.PROVIDER)
    assert (sold.owed, sold.voucher_signature) == (50, s.received(1, 1, 50).signature)
    assert [row.role for row in await store.receipts(job_id=job_id(1))] == [Role.PROVIDER, Role.CLIENT]


async def test_a_settlement_claims_when_mined_and_is_due_again_when_dropped(store: Store) -> None:
    await store.write(s.slot(0, deposit=100, block=5), s.slot(1, deposit=100, block=5))
    await store.write(s.sent(1, 60, 250))
    assert [await _claimed(store, of) for of in (0, 1)] == [0, 0]
    await store.write(s.mined(1, block=9))
    assert [await _claimed(store, of) for of in (0, 1)] == [60, 100], "no more than the deposit"
    (row,) = await store.settlements(state="mined")
    assert (row.transaction, row.block, row.gas, row.gas_wei) == (s.transaction(1), 9, 50_000, 10**20)
    assert (row.paid, row.fee, row.vouchers) == (88, 12, s.sent(1, 60, 250).vouchers)
    await store.write(s.dropped(1))
    assert [await _claimed(store, of) for of in (0, 1)] == [0, 0]
    assert [row.state for row in await store.settlements()] == ["dropped"]
    await store.write(s.mined(1, block=11))  # mined after all, in another block
    assert await _claimed(store, 0) == 60


async def test_the_chain_has_the_last_word_on_what_is_claimed(store: Store) -> None:
    await store.write(s.slot(0, deposit=100, block=5), s.sent(1, 60), s.mined(1, block=9))
    await store.write(s.slot(0, deposit=100, claimed=2, block=8))
    assert await _claimed(store, 0) == 60, "seen before the settlement"
    await store.write(s.slot(0, deposit=100, claimed=55, block=9))
    assert await _claimed(store, 0) == 55, "seen after the settlement"


async def test_a_dropped_settlement_that_goes_out_again_is_sent(store: Store) -> None:
    await store.write(s.sent(1, 60))
    await store.write(s.dropped(1))
    await store.write(s.sent(1, 60))
    assert [row.transaction for row in await store.settlements(state="sent")] == [s.transaction(1)]
    await store.write(s.mined(1))
    await store.write(s.sent(1, 60))
    assert [row.state for row in await store.settlements()] == ["mined"]


async def test_settlements_come_newest_first_also_without_vouchers(store: Store) -> None:
    await store.write(s.sent(1), s.sent(2, 5), s.sent(3, 6, 7))
    rows = await store.settlements(limit=2)
    assert [row.transaction for row in rows] == [s.transaction(3), s.transaction(2)]
    assert [len(row.vouchers) for row in await store.settlements()] == [2, 1, 0]


async def test_values_are_kept_and_replaced(store: Store) -> None:
    assert await store.get_value("cursor") is None
    await store.put_value("cursor", b"\x00\x01")
    await store.put_value("cursor", b"")
    await store.put_value("other", b"x")
    assert await store.get_value("cursor") == b""


async def test_kept_content_comes_back_in_order_and_is_gone_once_shredded(store: Store) -> None:
    await store.write(s.opened(1), s.prompt_kept(1), s.opened(1, Role.CLIENT))
    await store.write(s.issued(1, 1, 5), s.output_kept(1, 1))
    await store.write(s.issued(1, 2, 9), s.output_kept(1, 2))
    kept = await store.kept(Role.PROVIDER, job_id(1))
    assert kept is not None
    assert (kept.salt, kept.prompt) == (s.prompt_kept(1).salt, s.prompt_kept(1).prompt)
    assert kept.content == (b"leaf 1", b"", b"leaf 2", b"")
    assert await store.kept(Role.CLIENT, job_id(1)) is None, "the other half keeps its own"
    assert await store.kept(Role.PROVIDER, job_id(2)) is None
    bills = (await store.receipts(), await store.account(key()))
    await store.write(s.closed(1, 0), s.shredded(1))
    assert await store.kept(Role.PROVIDER, job_id(1)) is None
    assert (await store.receipts(), await store.account(key())) == bills
    await store.write(s.shredded(1))


async def test_a_refused_shredding_leaves_the_content(store: Store) -> None:
    await store.write(s.opened(1), s.prompt_kept(1), s.closed(1, 0))
    with pytest.raises(StoreError):
        await store.write(s.shredded(1), s.mined(77))
    assert await store.kept(Role.PROVIDER, job_id(1)) is not None


async def test_jobs_with_kept_content_are_found_oldest_first(store: Store) -> None:
    for number in (3, 1, 2):
        await store.write(s.opened(number), s.prompt_kept(number), s.closed(number, 0))
    await store.write(s.opened(0), s.opened(0, Role.CLIENT), s.prompt_kept(0, Role.CLIENT))
    before = s.opened(3).accept.accepted_at
    assert await store.kept_before(Role.PROVIDER, before) == [job_id(1), job_id(2)]
    assert await store.kept_before(Role.PROVIDER, before + 1, limit=1) == [job_id(1)]
    await store.write(s.shredded(1))
    assert await store.kept_before(Role.PROVIDER, before + 1) == [job_id(2), job_id(3)]
    assert await store.kept_before(Role.CLIENT, before) == [job_id(0)]


async def test_commitments_and_verdicts_are_kept_for_ever(store: Store) -> None:
    await store.write(s.commitment(1), s.commitment(2), s.verdict(1), s.verdict(1, 1), s.verdict(2))
    row = await store.commitment(s.transaction(1))
    assert row is not None and row.record == s.commitment(1) and row.made_at_ms > 0
    assert [row.record for row in await store.commitments()] == [s.commitment(2), s.commitment(1)]
    assert len(await store.commitments(limit=1)) == 1
    assert await store.commitment(s.transaction(9)) is None
    judged = await store.verdict(s.transaction(1), 1)
    assert judged is not None and judged.record == s.verdict(1, 1)
    assert await store.verdict(s.transaction(2), 1) is None
    assert [row.record for row in await store.verdicts()] == [s.verdict(2), s.verdict(1, 1), s.verdict(1)]


async def test_a_closed_store_refuses_to_write(store: Store) -> None:
    await store.close()
    with pytest.raises(StoreError):
        await store.write(s.slot())
    await store.open()
    await store.write(s.slot())


async def _account(store: Store) -> Any:
    account = await store.account(key())
    assert account is not None
    assert account.key.provider == PROVIDER
    return account


async def _claimed(store: Store, of: int) -> int:
    account = await store.account(key(of))
    assert account is not None
    return account.claimed


async def _everything(store: Store) -> list[Any]:
    return [
        [await store.accounts(role) for role in Role],
        [await store.jobs(role) for role in Role],
        await store.receipts(),
        await store.settlements(),
        [await store.kept(role, job_id(number)) for role in Role for number in (1, 3, 4)],
        await store.commitments(),
        await store.verdicts(),
    ]
