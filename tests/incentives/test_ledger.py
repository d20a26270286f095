"""The journal's nouns: facts that cannot be changed once written, and channels that they rebuild."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives import ledger
from incentives.channel import ActionReserve, ActionVouch, Channel, ContractReceiveSlot, ReceiveVoucher, apply
from incentives.ledger import ChannelKey, ReceiptIssued, ReceiptVouched, Record, Role, SlotSeen, VoucherReceived
from protocol.eip712 import digest
from protocol.messages import Voucher, WorkReceipt
from protocol.units import Address, Digest, JobId, Wei
from tests.protocol.documents import documents
from tests.protocol.jobs import DOMAIN
from tests.protocol.sheets import ON_SLOW_CPU

RECORDS = typing.get_args(Record)
KEY = ChannelKey(Address(b"\x01" * 20), Address(b"\x02" * 20))
VALUES: dict[Any, Any] = {
    int: 7,
    str: "text",
    bytes: b"raw",
    Role: Role.PROVIDER,
    ChannelKey: KEY,
}


def sample(kind: Any) -> Any:
    """Some value of a field's type."""
    if dataclasses.is_dataclass(kind) and kind not in VALUES:
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: sample(hints[field.name]) for field in dataclasses.fields(kind)})  # type: ignore[operator]
    if typing.get_origin(kind) is tuple:
        return ()
    while hasattr(kind, "__supertype__"):
        kind = kind.__supertype__
    return next(value for known, value in VALUES.items() if issubclass(kind, known) or known is kind)


def test_every_noun_is_a_record_or_part_of_one() -> None:
    nouns = {
        item for _, item in inspect.getmembers(ledger, dataclasses.is_dataclass) if item.__module__ == ledger.__name__
    }
    assert nouns == {*RECORDS, ChannelKey}
    assert len(RECORDS) == len(set(RECORDS))


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_record_is_a_value_that_nobody_can_change(kind: Any) -> None:
    record = sample(kind)
    assert record == dataclasses.replace(record) and hash(record) == hash(dataclasses.replace(record))
    assert not hasattr(record, "__dict__") and kind.__doc__
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, None)


@pytest.mark.parametrize("kind", [*RECORDS, ChannelKey], ids=lambda kind: kind.__name__)
def test_no_field_is_a_float_or_a_mutable_container(kind: Any) -> None:
    def leaves(hint: Any) -> list[Any]:
        inner = [leaf for part in typing.get_args(hint) for leaf in leaves(part)]
        return [hint, *inner]

    for hint in typing.get_type_hints(kind, include_extras=False).values():
        for leaf in leaves(hint):
            assert (typing.get_origin(leaf) or leaf) not in (float, list, dict, set)


def test_a_receipt_is_filed_under_its_digest() -> None:
    """Both roles key the journal by the digest that was signed, so one job's halves are found by one value."""
    names = {field.name for field in dataclasses.fields(ReceiptIssued)}
    assert names <= {field.name for field in dataclasses.fields(ReceiptVouched)} and "digest" in names


# ------------------------------------------------------------------------------------------ a channel from its records

steps = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=20)


@ON_SLOW_CPU
@given(steps, documents(WorkReceipt))
def test_both_roles_rebuild_their_channel_from_what_they_journaled(
    moves: list[tuple[int, int]], receipt: WorkReceipt
) -> None:
    """What was owed and vouched before a crash follows from the records; only reservations end with the process."""
    slot = SlotSeen(KEY, Address(b"\x03" * 20), Wei(1_000_000), Wei(0), 0, 1)
    provider = client = apply(Channel(KEY), ContractReceiveSlot(slot)).state
    written: list[Record] = [slot]
    totals = {JobId(bytes([number]) * 32): 0 for number in range(3)}
    for number, more in moves:
        job = JobId(bytes([number]) * 32)
        before, after = Wei(totals[job]), Wei(totals[job] + more)
        provider = apply(provider, ActionReserve(job, Wei(more))).state
        client = apply(client, ActionVouch(job, before, after)).state
        voucher = Voucher(KEY.provider, client.vouched)
        stated = dataclasses.replace(receipt, job_id=Digest(job), total=after)
        written.append(ReceiptVouched(digest(DOMAIN, stated), stated, b"", voucher, ()))
        provider = apply(provider, ReceiveVoucher(job, before, after, client.vouched)).state
        written.append(VoucherReceived(KEY.client, job, 1, voucher, b""))
        totals[job] = after
    vouched_by_client = [record for record in written if isinstance(record, ReceiptVouched)]
    last = {bytes(record.receipt.job_id): record.receipt.total for record in vouched_by_client}
    highest = max((record.voucher.cumulative for record in vouched_by_client), default=0)
    taken = max((record.voucher.cumulative for record in written if isinstance(record, VoucherReceived)), default=0)
    assert client == Channel(KEY, slot.deposit, slot.claimed, 0, Wei(sum(last.values())), Wei(highest))
    assert provider == Channel(KEY, slot.deposit, slot.claimed, 0, Wei(sum(last.values())), Wei(taken))
