"""Rows back into the nouns of the port: every query of the store, each run in one read transaction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, exists, select
from sqlalchemy.engine import Connection, Row

from incentives.ledger import ChannelKey, Role
from node.ports import ChannelAccount, JobRow, ReceiptRow, SettlementRow, StoreError
from node.store import documents, tables
from protocol.messages import Accept, JobRequest, Voucher, WorkReceipt
from protocol.units import ZERO_ADDRESS, Address, Digest, FinishReason, JobId, Wei

_channel: Final = tables.core(tables.Channel)
_slot: Final = tables.core(tables.Slot)
_job: Final = tables.core(tables.Job)
_receipt: Final = tables.core(tables.Receipt)
_voucher: Final = tables.core(tables.VoucherRow)
_ack: Final = tables.core(tables.Ack)
_settlement: Final = tables.core(tables.Settlement)
_item: Final = tables.core(tables.SettlementItem)
_value: Final = tables.core(tables.Value)

_Key = tuple[bytes, bytes]
"""(provider, client)."""


# ---------------------------------------------------------------------------------------------------------- accounts


def _slots(connection: Connection, *conditions: ColumnElement[bool]) -> dict[_Key, Row[Any]]:
    rows = connection.execute(select(_slot).where(*conditions))
    return {(row.provider, row.client): row for row in rows}


def _settled(connection: Connection, *conditions: ColumnElement[bool]) -> dict[_Key, int]:
    """Highest cumulative amount that a settlement mined after the slot was last seen has put before the chain."""
    newer = and_(_item.c.client == _slot.c.client, _item.c.block > _slot.c.block)
    query = (
        select(_slot.c.provider, _slot.c.client, _item.c.cumulative)
        .join(_item, newer)
        .join(_settlement, and_(_settlement.c.id == _item.c.settlement, _settlement.c.provider == _slot.c.provider))
        .where(*conditions)
    )
    out: dict[_Key, int] = {}
    for row in connection.execute(query):
        key = (row.provider, row.client)
        out[key] = max(out.get(key, 0), row.cumulative)
    return out


def _account(key: _Key, channel: Row[Any] | None, slot: Row[Any] | None, settled: int) -> ChannelAccount:
    """`claimed`: what the chain showed, or what a settlement mined since then has claimed of the deposit."""
    return ChannelAccount(
        key=ChannelKey(Address(key[0]), Address(key[1])),
        owed=Wei(channel.owed if channel is not None else 0),
        vouched=Wei(channel.vouched if channel is not None else 0),
        voucher_signature=channel.voucher_signature if channel is not None else b"",
        deposit=Wei(slot.deposit if slot is not None else 0),
        claimed=Wei(max(slot.claimed, min(settled, slot.deposit)) if slot is not None else 0),
        exit_at=slot.exit_at if slot is not None else 0,
        owner=Address(slot.owner) if slot is not None else ZERO_ADDRESS,
    )


def account(connection: Connection, key: ChannelKey, role: Role | None) -> ChannelAccount | None:
    """One channel; without `role`, the provider's side when this node holds both."""
    of_channel = [_channel.c.provider == key.provider, _channel.c.client == key.client]
    if role is not None:
        of_channel.append(_channel.c.role == role.value)
    channel = connection.execute(select(_channel).where(*of_channel).order_by(_channel.c.role.desc())).first()
    of_slot = (_slot.c.provider == key.provider, _slot.c.client == key.client)
    pair = (key.provider, key.client)
    slot = _slots(connection, *of_slot).get(pair)
    if channel is None and slot is None:
        return None
    return _account(pair, channel, slot, _settled(connection, *of_slot).get(pair, 0))


def accounts(connection: Connection, role: Role) -> list[ChannelAccount]:
    """Channels with a job in this role, then slots that have no job in any role, in the order of their keys."""
    channels = {
        (row.provider, row.client): row
        for row in connection.execute(select(_channel).where(_channel.c.role == role.value).order_by(_channel.c.id))
    }
    slots = _slots(connection)
    used = exists().where(_channel.c.provider == _slot.c.provider, _channel.c.client == _slot.c.client)
    unused = sorted(_slots(connection, ~used))
    settled = _settled(connection)
    keys: Iterable[_Key] = [*channels, *unused]
    return [_account(key, channels.get(key), slots.get(key), settled.get(key, 0)) for key in keys]


# -------------------------------------------------------------------------------------------------------------- jobs


def _job_row(row: Row[Any]) -> JobRow:
    return JobRow(
        role=Role(row.role),
        job_id=JobId(row.job_id),
        request=documents.decode(JobRequest, row.request),
        request_signature=row.request_signature,
        accept=(accept := documents.decode(Accept, row.accept)),
        accept_signature=row.accept_signature,
        model=row.model,
        options=row.options,
        steps=row.steps,
        owed=Wei(row.owed),
        closed=None if row.closed is None else FinishReason(row.closed),
        detail=row.detail,
        opened_at_ms=accept.accepted_at,
    )


def job(connection: Connection, job_id: bytes, role: Role | None) -> JobRow | None:
    """One job; without `role`, the provider's side when this node holds both."""
    query = select(_job).where(_job.c.job_id == job_id).order_by(_job.c.role.desc())
    if role is not None:
        query = query.where(_job.c.role == role.value)
    row = connection.execute(query).first()
    return None if row is None else _job_row(row)


def jobs(connection: Connection, role: Role, open_only: bool, limit: int) -> list[JobRow]:
    """Newest first."""
    query = select(_job).where(_job.c.role == role.value).order_by(_job.c.id.desc()).limit(limit)
    if open_only:
        query = query.where(_job.c.closed.is_(None))
    return [_job_row(row) for row in connection.execute(query)]


# ---------------------------------------------------------------------------------------------------------- receipts


def _receipts_query() -> Select[Any]:
    return (
        select(
            _receipt,
            _job.c.role,
            _channel.c.provider,
            _voucher.c.cumulative,
            _voucher.c.signature.label("voucher_signature"),
            _ack.c.signature.label("ack_signature"),
        )
        .join(_job, _job.c.id == _receipt.c.job)
        .join(_channel, _channel.c.id == _job.c.channel)
        .outerjoin(_voucher, _voucher.c.receipt == _receipt.c.id)
        .outerjoin(_ack, _ack.c.receipt == _receipt.c.id)
    )


def _receipt_row(row: Row[Any]) -> ReceiptRow:
    voucher = None if row.cumulative is None else Voucher(Address(row.provider), row.cumulative)
    return ReceiptRow(
        role=Role(row.role),
        digest=Digest(row.digest),
        receipt=documents.decode(WorkReceipt, row.receipt),
        receipt_signature=row.signature,
        ack_signature=row.ack_signature or b"",
        voucher=voucher,
        voucher_signature=row.voucher_signature or b"",
        token_ids=documents.unpack_tokens(row.token_ids),
    )


def receipts(
    connection: Connection, role: Role | None, job_id: bytes | None, final_only: bool, limit: int
) -> list[ReceiptRow]:
    """Of one job: in the order of its steps. Otherwise newest first."""
    query = _receipts_query().limit(limit)
    if role is not None:
        query = query.where(_job.c.role == role.value)
    if final_only:
        query = query.where(_receipt.c.is_final.is_(True))
    if job_id is not None:
        query = query.where(_job.c.job_id == job_id).order_by(_job.c.role.desc(), _receipt.c.step)
    else:
        query = query.order_by(_receipt.c.id.desc())
    return [_receipt_row(row) for row in connection.execute(query)]


def receipt(connection: Connection, prefix: bytes) -> ReceiptRow | None:
    """The receipt whose digest begins with `prefix`; the provider's side when this node holds both.

    Raises: StoreError when several receipts begin so, ValueError for an empty prefix.
    """
    if not prefix:
        raise ValueError("a receipt is looked up by the first bytes of its digest; got none")
    above = int.from_bytes(prefix, "big") + 1
    query = _receipts_query().where(_receipt.c.digest >= prefix)
    if above >> (8 * len(prefix)) == 0:
        query = query.where(_receipt.c.digest < above.to_bytes(len(prefix), "big"))
    rows = connection.execute(query.order_by(_receipt.c.digest, _job.c.role.desc()).limit(3)).all()
    if len({row.digest for row in rows}) > 1:
        raise StoreError(f"several receipts begin with 0x{prefix.hex()}; give more digits of the one you mean")
    return _receipt_row(rows[0]) if rows else None


# ------------------------------------------------------------------------------------------------ settlements, values


def settlements(connection: Connection, state: str | None, limit: int) -> list[SettlementRow]:
    """Newest first."""
    query = select(_settlement).order_by(_settlement.c.id.desc()).limit(limit)
    if state is not None:
        query = query.where(_settlement.c.state == state)
    rows = connection.execute(query).all()
    vouchers: dict[int, list[tuple[Address, Wei]]] = {row.id: [] for row in rows}
    if rows:
        chosen = query.with_only_columns(_settlement.c.id)
        items = select(_item).where(_item.c.settlement.in_(chosen)).order_by(_item.c.position)
        for item in connection.execute(items):
            vouchers[item.settlement].append((Address(item.client), Wei(item.cumulative)))
    return [
        SettlementRow(
            transaction=Digest(row.digest),
            state=row.state,
            block=row.block,
            gas=row.gas,
            gas_wei=row.gas_wei,
            paid=Wei(row.paid),
            fee=Wei(row.fee),
            vouchers=tuple(vouchers[row.id]),
        )
        for row in rows
    ]


def value(connection: Connection, key: str) -> bytes | None:
    """One setting."""
    found: bytes | None = connection.execute(select(_value.c.value).where(_value.c.key == key)).scalar_one_or_none()
    return found
