"""Records into rows: one function per record, run inside the writer's transaction.

Each function is idempotent for a replay of the same record and raises `StoreError` for a record that contradicts what
is kept: no two payloads ever stand under one sequence number (role, job, step), and what was vouched never falls.
Statements are built once here, because compiling them would cost more than running them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import bindparam, func, insert, select, update
from sqlalchemy.engine import Connection

from incentives.ledger import (
    AckReceived,
    AckSigned,
    CommitmentMade,
    ContentShredded,
    JobClosed,
    JobOpened,
    OutputKept,
    PromptKept,
    ReceiptIssued,
    ReceiptVouched,
    Record,
    Role,
    SettlementDropped,
    SettlementMined,
    SettlementSent,
    SlotSeen,
    VerdictMade,
    VoucherReceived,
)
from node.store import documents, keeping, tables
from node.store.rows import Found, name, one, refused
from protocol.messages import ReceiptAck, Voucher, WorkReceipt
from protocol.units import MAX_AMOUNT

log = logging.getLogger("tally.store")

_channel: Final = tables.core(tables.Channel)
_slot: Final = tables.core(tables.Slot)
_job: Final = tables.core(tables.Job)
_receipt: Final = tables.core(tables.Receipt)
_voucher: Final = tables.core(tables.VoucherRow)
_ack: Final = tables.core(tables.Ack)
_settlement: Final = tables.core(tables.Settlement)
_item: Final = tables.core(tables.SettlementItem)
_value: Final = tables.core(tables.Value)

_FIND_CHANNEL: Final = select(_channel).where(
    _channel.c.role == bindparam("role"),
    _channel.c.provider == bindparam("provider"),
    _channel.c.client == bindparam("client"),
)
_FIND_JOB: Final = (
    select(
        _job,
        _channel.c.provider,
        _channel.c.client,
        _channel.c.owed.label("channel_owed"),
        _channel.c.vouched.label("channel_vouched"),
    )
    .join(_channel, _job.c.channel == _channel.c.id)
    .where(_job.c.role == bindparam("role"), _job.c.job_id == bindparam("job_id"))
)
_RECEIPT_COLUMNS: Final = (
    select(
        _receipt,
        _voucher.c.cumulative,
        _voucher.c.signature.label("voucher_signature"),
        _ack.c.signature.label("ack_signature"),
    )
    .outerjoin(_voucher, _voucher.c.receipt == _receipt.c.id)
    .outerjoin(_ack, _ack.c.receipt == _receipt.c.id)
    .where(_receipt.c.job == bindparam("job"))
)
_FIND_STEP: Final = _RECEIPT_COLUMNS.where(_receipt.c.step == bindparam("step"))
_FIND_DIGEST: Final = _RECEIPT_COLUMNS.where(_receipt.c.digest == bindparam("digest"))
_COUNT_STEPS: Final = select(func.count()).where(
    _receipt.c.job == bindparam("job"),
    _receipt.c.step > bindparam("after"),
    _receipt.c.step <= bindparam("until"),
)
_SET_JOB: Final = update(_job).where(_job.c.id == bindparam("key"))
_ADVANCE_JOB: Final = _SET_JOB.values(
    acked_step=bindparam("acked_step"), steps=bindparam("steps"), owed=bindparam("owed"), vouched=bindparam("vouched")
)
_CLOSE_JOB: Final = _SET_JOB.values(
    closed=bindparam("closed"), closed_owed=bindparam("closed_owed"), detail=bindparam("detail")
)
_SET_CHANNEL: Final = update(_channel).where(_channel.c.id == bindparam("key"))
_OWE: Final = _SET_CHANNEL.values(owed=bindparam("owed"))
_VOUCH: Final = _SET_CHANNEL.values(vouched=bindparam("vouched"), voucher_signature=bindparam("voucher_signature"))
_FIND_SLOT: Final = select(_slot).where(
    _slot.c.provider == bindparam("provider"), _slot.c.client == bindparam("client")
)
_SET_SLOT: Final = (
    update(_slot)
    .where(_slot.c.provider == bindparam("key_provider"), _slot.c.client == bindparam("key_client"))
    .values({name: bindparam(name) for name in ("owner", "deposit", "claimed", "exit_at", "block")})
)
_FIND_SETTLEMENT: Final = select(_settlement).where(_settlement.c.digest == bindparam("digest"))
_FIND_ITEMS: Final = (
    select(_item.c.client, _item.c.cumulative)
    .where(_item.c.settlement == bindparam("settlement"))
    .order_by(_item.c.position)
)
_SET_SETTLEMENT: Final = update(_settlement).where(_settlement.c.id == bindparam("key"))
_STATE_SETTLEMENT: Final = _SET_SETTLEMENT.values(state=bindparam("state"), reason=bindparam("reason"))
_MINE_SETTLEMENT: Final = _SET_SETTLEMENT.values(
    {name: bindparam(name) for name in ("state", "reason", "block", "gas", "gas_wei", "paid", "fee")}
)
_MINE_ITEMS: Final = update(_item).where(_item.c.settlement == bindparam("key")).values(block=bindparam("at_block"))
_FIND_VALUE: Final = select(_value.c.value).where(_value.c.key == bindparam("key"))
_SET_VALUE: Final = update(_value).where(_value.c.key == bindparam("value_key")).values(value=bindparam("value"))
_ADD_CHANNEL: Final = insert(_channel)
_ADD_JOB: Final = insert(_job)
_ADD_RECEIPT: Final = insert(_receipt)
_ADD_VOUCHER: Final = insert(_voucher)
_ADD_ACK: Final = insert(_ack)
_ADD_SLOT: Final = insert(_slot)
_ADD_SETTLEMENT: Final = insert(_settlement)
_ADD_ITEM: Final = insert(_item)
_ADD_VALUE: Final = insert(_value)


def _find_job(connection: Connection, what: str, role: Role, job_id: bytes) -> Found:
    job = one(connection, _FIND_JOB, role=role.value, job_id=job_id)
    if job is None:
        raise refused(f"{what} of {name(role, job_id)}", "no JobOpened was written for it")
    return job


def _channel_id(connection: Connection, role: Role, provider: bytes, client: bytes) -> int:
    """The channel's row, made if there is none yet."""
    found = one(connection, _FIND_CHANNEL, role=role.value, provider=provider, client=client)
    if found is not None:
        return int(found.id)
    row = {
        "role": role.value,
        "provider": provider,
        "client": client,
        "owed": 0,
        "vouched": 0,
        "voucher_signature": b"",
    }
    return int(connection.execute(_ADD_CHANNEL, row).lastrowid)


# -------------------------------------------------------------------------------------------------------------- jobs


def _job_opened(connection: Connection, record: JobOpened) -> None:
    facts = {
        "request": documents.encode(record.request),
        "request_signature": record.request_signature,
        "accept": documents.encode(record.accept),
        "accept_signature": record.accept_signature,
        "model": record.model,
        "options": record.options,
    }
    known = one(connection, _FIND_JOB, role=record.role.value, job_id=record.job_id)
    if known is not None:
        if any(getattr(known, name) != value for name, value in facts.items()):
            raise refused(f"JobOpened of {name(record.role, record.job_id)}", "it was opened with other documents")
        return
    channel = _channel_id(connection, record.role, record.request.provider, record.request.client)
    derived = {"acked_step": None, "steps": 0, "owed": 0, "vouched": 0, "closed": None, "closed_owed": None}
    row = {**facts, **derived, "channel": channel, "role": record.role.value, "job_id": record.job_id, "detail": ""}
    connection.execute(_ADD_JOB, row)


def _job_closed(connection: Connection, record: JobClosed) -> None:
    what = f"JobClosed of {name(record.role, record.job_id)}"
    job = _find_job(connection, "JobClosed", record.role, record.job_id)
    if job.closed is not None:
        if (job.closed, job.closed_owed, job.detail) != (int(record.reason), record.owed, record.detail):
            raise refused(what, f"it is closed already, with reason {job.closed} and {job.closed_owed} wei")
        return
    if record.owed != job.owed:
        # A caller cancelled while its voucher was being synced closes with the figure before it; the receipts count.
        log.warning("%s says %d wei; the journal holds receipts for %d wei, which stand", what, record.owed, job.owed)
    values = {"key": job.id, "closed": int(record.reason), "closed_owed": record.owed, "detail": record.detail}
    connection.execute(_CLOSE_JOB, values)


# ---------------------------------------------------------------------------------------------------------- receipts


def _insert_receipt(
    connection: Connection, job: Found, digest: bytes, receipt: WorkReceipt, signature: bytes, token_ids: bytes
) -> int:
    """Keep a receipt of an open job. Raises: StoreError when it is of another channel or the job is closed."""
    what = f"a receipt of {name(Role(job.role), receipt.job_id, receipt.step)}"
    if (receipt.provider, receipt.client) != (job.provider, job.client):
        raise refused(what, "its provider or client is not the job's")
    if job.closed is not None:
        raise refused(what, "the job is closed")
    row = {
        "job": job.id,
        "step": receipt.step,
        "digest": digest,
        "is_final": receipt.is_final,
        "total": receipt.total,
        "receipt": documents.encode(receipt),
        "signature": signature,
        "token_ids": token_ids,
    }
    return int(connection.execute(_ADD_RECEIPT, row).lastrowid)


def _acknowledge(connection: Connection, job: Found, step: int, total: int, vouched: int) -> None:
    """Make receipt `step` the job's last acknowledged one: its total is what the job owes now.

    The total may fall (a final receipt with a refund). Raises: StoreError when `step` lies behind the last.
    """
    if job.acked_step is not None and step < job.acked_step:
        raise refused(
            f"an acknowledgement of {name(Role(job.role), job.job_id, step)}", f"step {job.acked_step} has one already"
        )
    owed = job.channel_owed + total - job.owed
    if owed > MAX_AMOUNT:
        raise refused(f"a receipt of {name(Role(job.role), job.job_id, step)}", f"the channel would owe {owed} wei")
    after = -1 if job.acked_step is None else job.acked_step
    new = connection.execute(_COUNT_STEPS, {"job": job.id, "after": after, "until": step}).scalar_one()
    values = {"key": job.id, "acked_step": step, "steps": job.steps + new, "owed": total, "vouched": vouched}
    connection.execute(_ADVANCE_JOB, values)
    if owed != job.channel_owed:
        connection.execute(_OWE, {"key": job.channel, "owed": owed})


def _insert_voucher(connection: Connection, job: Found, receipt: int, voucher: Voucher, signature: bytes) -> None:
    """Keep a voucher, and raise what the channel has vouched when it is the highest."""
    if voucher.provider != job.provider:
        raise refused(f"a voucher of {name(Role(job.role), job.job_id)}", "it pays somebody else than the channel")
    row = {"receipt": receipt, "cumulative": voucher.cumulative, "signature": signature}
    connection.execute(_ADD_VOUCHER, row)
    if voucher.cumulative > job.channel_vouched:
        values = {"key": job.channel, "vouched": voucher.cumulative, "voucher_signature": signature}
        connection.execute(_VOUCH, values)


def _receipt_issued(connection: Connection, record: ReceiptIssued) -> None:
    receipt = record.receipt
    job = _find_job(connection, "ReceiptIssued", Role.PROVIDER, receipt.job_id)
    known = one(connection, _FIND_STEP, job=job.id, step=receipt.step)
    if known is None:
        _insert_receipt(connection, job, record.digest, receipt, b"", b"")
    elif (known.digest, known.receipt) != (record.digest, documents.encode(receipt)):
        raise refused(
            f"ReceiptIssued of {name(Role.PROVIDER, receipt.job_id, receipt.step)}",
            "another receipt was issued under this step; signing both would be equivocation",
        )


def _receipt_vouched(connection: Connection, record: ReceiptVouched) -> None:
    receipt, voucher = record.receipt, record.voucher
    what = f"ReceiptVouched of {name(Role.CLIENT, receipt.job_id, receipt.step)}"
    job = _find_job(connection, "ReceiptVouched", Role.CLIENT, receipt.job_id)
    tokens = documents.pack_tokens(record.token_ids)
    known = one(connection, _FIND_STEP, job=job.id, step=receipt.step)
    if known is not None:
        kept = (known.digest, known.receipt, known.signature, known.token_ids, known.cumulative)
        new = (record.digest, documents.encode(receipt), record.receipt_signature, tokens, voucher.cumulative)
        if kept != new or voucher.provider != job.provider:
            raise refused(what, "another receipt or voucher was written under this step")
        return
    if voucher.cumulative < job.channel_vouched:
        raise refused(what, f"its {voucher.cumulative} wei are below the {job.channel_vouched} wei vouched before")
    receipt_id = _insert_receipt(connection, job, record.digest, receipt, record.receipt_signature, tokens)
    _insert_voucher(connection, job, receipt_id, voucher, b"")
    _acknowledge(connection, job, receipt.step, receipt.total, voucher.cumulative)


def _voucher_received(connection: Connection, record: VoucherReceived) -> None:
    what = f"VoucherReceived for {name(Role.PROVIDER, record.job_id, record.step)}"
    job = _find_job(connection, "VoucherReceived", Role.PROVIDER, record.job_id)
    if record.client != job.client:
        raise refused(what, "it is from another client than the job's")
    receipt = one(connection, _FIND_STEP, job=job.id, step=record.step)
    if receipt is None:
        raise refused(what, "no receipt was issued under this step")
    if receipt.cumulative is not None:
        kept = (receipt.cumulative, receipt.voucher_signature, job.provider)
        if kept != (record.voucher.cumulative, record.signature, record.voucher.provider):
            raise refused(what, "another voucher was received for this step")
        return
    # Vouchers of one job arrive in order; those of two jobs of one channel come on two streams and may overtake
    # each other, so a lower one is still an acknowledgement, while the channel keeps the highest.
    if record.voucher.cumulative < job.vouched:
        raise refused(what, f"its {record.voucher.cumulative} wei are below the {job.vouched} wei this job had before")
    _insert_voucher(connection, job, receipt.id, record.voucher, record.signature)
    _acknowledge(connection, job, record.step, receipt.total, record.voucher.cumulative)


def _acked(connection: Connection, role: Role, job_id: bytes, ack: ReceiptAck, signature: bytes) -> None:
    what = f"the acknowledgement of {name(role, job_id)}"
    job = _find_job(connection, "an acknowledgement", role, job_id)
    receipt = one(connection, _FIND_DIGEST, job=job.id, digest=ack.receipt)
    if receipt is None:
        raise refused(what, f"no receipt with digest 0x{ack.receipt.hex()} was written for this job")
    if receipt.ack_signature is not None:
        if receipt.ack_signature != signature:
            raise refused(what, "it was acknowledged with another signature")
        return
    connection.execute(_ADD_ACK, {"receipt": receipt.id, "signature": signature})
    _acknowledge(connection, job, receipt.step, receipt.total, job.vouched)


def _ack_signed(connection: Connection, record: AckSigned) -> None:
    _acked(connection, Role.CLIENT, record.job_id, record.ack, b"")


def _ack_received(connection: Connection, record: AckReceived) -> None:
    _acked(connection, Role.PROVIDER, record.job_id, record.ack, record.signature)


# -------------------------------------------------------------------------------------------------------------- chain


def _slot_seen(connection: Connection, record: SlotSeen) -> None:
    """The chain's word replaces what was known, also with an older block: a reorganisation goes backwards."""
    seen = {
        "owner": record.owner,
        "deposit": record.deposit,
        "claimed": record.claimed,
        "exit_at": record.exit_at,
        "block": record.block,
    }
    key = {"provider": record.key.provider, "client": record.key.client}
    if one(connection, _FIND_SLOT, **key) is None:
        connection.execute(_ADD_SLOT, {**key, **seen})
    else:
        connection.execute(_SET_SLOT, {"key_provider": key["provider"], "key_client": key["client"], **seen})


def _settlement_sent(connection: Connection, record: SettlementSent) -> None:
    known = one(connection, _FIND_SETTLEMENT, digest=record.transaction)
    if known is not None:
        items = connection.execute(_FIND_ITEMS, {"settlement": known.id}).all()
        if known.provider != record.provider or tuple((i.client, i.cumulative) for i in items) != record.vouchers:
            raise refused(f"SettlementSent 0x{record.transaction.hex()}", "it was written with other vouchers")
        if known.state == "dropped":  # the same signed transaction goes out again
            connection.execute(_STATE_SETTLEMENT, {"key": known.id, "state": "sent", "reason": ""})
        return
    row = {"digest": record.transaction, "provider": record.provider, "state": "sent", "reason": ""}
    zero = {"block": 0, "gas": 0, "gas_wei": 0, "paid": 0, "fee": 0}
    settlement = connection.execute(_ADD_SETTLEMENT, {**row, **zero}).lastrowid
    items_to_keep = [
        {"settlement": settlement, "position": position, "client": client, "cumulative": cumulative, "block": 0}
        for position, (client, cumulative) in enumerate(record.vouchers)
    ]
    if items_to_keep:
        connection.execute(_ADD_ITEM, items_to_keep)


def _find_settlement(connection: Connection, what: str, transaction: bytes) -> Found:
    known = one(connection, _FIND_SETTLEMENT, digest=transaction)
    if known is None:
        raise refused(f"{what} 0x{transaction.hex()}", "no SettlementSent was written for this transaction")
    return known


def _settlement_mined(connection: Connection, record: SettlementMined) -> None:
    """What is claimed follows from it when read, until the slot is seen at this block or later (node.store.read)."""
    known = _find_settlement(connection, "SettlementMined", record.transaction)
    mined = {
        "block": record.block,
        "gas": record.gas,
        "gas_wei": record.gas_wei,
        "paid": record.paid,
        "fee": record.fee,
    }
    connection.execute(_MINE_SETTLEMENT, {"key": known.id, "state": "mined", "reason": "", **mined})
    connection.execute(_MINE_ITEMS, {"key": known.id, "at_block": record.block})


def _settlement_dropped(connection: Connection, record: SettlementDropped) -> None:
    known = _find_settlement(connection, "SettlementDropped", record.transaction)
    connection.execute(_STATE_SETTLEMENT, {"key": known.id, "state": "dropped", "reason": record.reason})
    connection.execute(_MINE_ITEMS, {"key": known.id, "at_block": 0})


# -------------------------------------------------------------------------------------------------------------- entry

_APPLY: Final[dict[type, Callable[[Connection, Any], None]]] = {
    JobOpened: _job_opened,
    JobClosed: _job_closed,
    ReceiptIssued: _receipt_issued,
    ReceiptVouched: _receipt_vouched,
    VoucherReceived: _voucher_received,
    AckSigned: _ack_signed,
    AckReceived: _ack_received,
    SlotSeen: _slot_seen,
    SettlementSent: _settlement_sent,
    SettlementMined: _settlement_mined,
    SettlementDropped: _settlement_dropped,
    PromptKept: keeping.prompt_kept,
    OutputKept: keeping.output_kept,
    ContentShredded: keeping.content_shredded,
    CommitmentMade: keeping.commitment_made,
    VerdictMade: keeping.verdict_made,
}


def apply(connection: Connection, record: Record) -> None:
    """Write one record inside the caller's transaction.

    Raises: StoreError when it contradicts the journal; FieldOutOfRange, ValueError for a value no column can hold.
    """
    _APPLY[type(record)](connection, record)


def set_value(connection: Connection, key: str, value: bytes) -> None:
    """Write one setting inside the caller's transaction."""
    if connection.execute(_FIND_VALUE, {"key": key}).one_or_none() is None:
        connection.execute(_ADD_VALUE, {"key": key, "value": value})
    else:
        connection.execute(_SET_VALUE, {"value_key": key, "value": value})
