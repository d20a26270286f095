"""The Store port in dictionaries: what SqlStore promises, at the speed of a simulation.

It passes the contract tests of tests/node/store and is the model of its state machine. Data outlive `close`, so a
crash is a new node on the same MemoryStore. `fail_with` makes writes fail as a full disk does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from incentives.ledger import (
    AckReceived,
    AckSigned,
    ChannelKey,
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
from node.ports import (
    ChannelAccount,
    CommitmentRow,
    JobRow,
    Kept,
    ReceiptRow,
    SettlementRow,
    StoreError,
    VerdictRow,
)
from protocol.messages import ReceiptAck, WorkReceipt
from protocol.units import MAX_AMOUNT, ZERO_ADDRESS, Address, Digest, JobId, Wei


@dataclass(frozen=True, slots=True)
class _Channel:
    owed: int = 0
    vouched: int = 0
    signature: bytes = b""


@dataclass(frozen=True, slots=True)
class _Job:
    opened: JobOpened
    acked_step: int = -1
    steps: int = 0
    owed: int = 0
    vouched: int = 0
    closed: JobClosed | None = None

    @property
    def channel(self) -> tuple[Role, bytes, bytes]:
        return self.opened.role, self.opened.request.provider, self.opened.request.client


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise StoreError(f"the journal refuses this: {why}")


class MemoryStore:
    """See node.ports.Store."""

    def __init__(self) -> None:
        self.fail_with: StoreError | None = None
        self.writes = 0
        self._open = False
        self._undo: list[tuple[dict[Any, Any], Hashable, Any]] = []
        self._channels: dict[tuple[Role, bytes, bytes], _Channel] = {}
        self._slots: dict[tuple[bytes, bytes], SlotSeen] = {}
        self._jobs: dict[tuple[Role, bytes], _Job] = {}
        self._receipts: dict[tuple[Role, bytes, int], ReceiptRow] = {}
        self._acks: dict[tuple[Role, bytes], bytes] = {}
        self._settlements: dict[bytes, tuple[SettlementSent, SettlementRow]] = {}
        self._values: dict[str, bytes] = {}
        self._prompts: dict[tuple[Role, bytes], PromptKept] = {}
        self._outputs: dict[tuple[Role, bytes, int], OutputKept] = {}
        self._commitments: dict[bytes, CommitmentRow] = {}
        self._verdicts: dict[tuple[bytes, int], VerdictRow] = {}

    async def open(self) -> None:
        _need(not self._open, "it is open already")
        self._open = True

    async def close(self) -> None:
        self._open = False

    # ------------------------------------------------------------------------------------------------------- writing

    async def write(self, *records: Record) -> None:
        self._writable()
        self._undo = []
        try:
            for record in records:
                self._apply(record)
        except StoreError:
            for table, key, old in reversed(self._undo):
                if old is None:
                    table.pop(key, None)
                else:
                    table[key] = old
            raise
        self.writes += 1
        await asyncio.sleep(0)  # a real write lets others run, so this one does too

    async def put_value(self, key: str, value: bytes) -> None:
        self._writable()
        self._values[key] = value
        await asyncio.sleep(0)

    def _writable(self) -> None:
        _need(self._open, "it is not open")
        if self.fail_with is not None:
            raise self.fail_with

    def _put(self, table: dict[Any, Any], key: Hashable, value: Any) -> None:
        self._undo.append((table, key, table.get(key)))
        table[key] = value

    def _apply(self, record: Record) -> None:
        match record:
            case JobOpened():
                self._job_opened(record)
            case JobClosed():
                self._job_closed(record)
            case ReceiptIssued():
                self._receipt_issued(record)
            case ReceiptVouched():
                self._receipt_vouched(record)
            case VoucherReceived():
                self._voucher_received(record)
            case AckSigned():
                self._acked(Role.CLIENT, record.job_id, record.ack, b"")
            case AckReceived():
                self._acked(Role.PROVIDER, record.job_id, record.ack, record.signature)
            case SlotSeen():
                self._put(self._slots, (record.key.provider, record.key.client), record)
            case SettlementSent():
                self._settlement_sent(record)
            case SettlementMined() | SettlementDropped():
                self._settlement_ended(record)
            case PromptKept() | OutputKept():
                self._kept(record)
            case ContentShredded():
                self._shredded(record)
            case CommitmentMade():
                made = self._commitments.get(record.key)
                _need(made is None or made.record == record, "another commitment under this key")
                self._put(self._commitments, record.key, made or CommitmentRow(record, time.time_ns() // 1_000_000))
            case VerdictMade():
                key = (record.verdict.case_id, record.verdict.round)
                judged = self._verdicts.get(key)
                _need(judged is None or judged.record == record, "another verdict in this round")
                self._put(self._verdicts, key, judged or VerdictRow(record, time.time_ns() // 1_000_000))

    def _job(self, role: Role, job_id: bytes) -> _Job:
        job = self._jobs.get((role, job_id))
        if job is None:
            raise StoreError("no such job")
        return job

    def _job_opened(self, record: JobOpened) -> None:
        known = self._jobs.get((record.role, record.job_id))
        if known is None:
            job = _Job(record)
            self._put(self._jobs, (record.role, record.job_id), job)
            self._put(self._channels, job.channel, self._channels.get(job.channel, _Channel()))
        else:
            _need(known.opened == record, "opened with other documents")

    def _job_closed(self, record: JobClosed) -> None:
        job = self._job(record.role, record.job_id)
        _need(job.closed in (None, record), "closed already")
        self._put(self._jobs, (record.role, record.job_id), replace(job, closed=record))

    def _add_receipt(self, role: Role, job: _Job, row: ReceiptRow) -> None:
        _need((row.receipt.provider, row.receipt.client) == job.channel[1:], "of another channel")
        _need(job.closed is None, "the job is closed")
        self._put(self._receipts, (role, row.receipt.job_id, row.receipt.step), row)

    def _receipt_issued(self, record: ReceiptIssued) -> None:
        job = self._job(Role.PROVIDER, record.receipt.job_id)
        known = self._receipts.get((Role.PROVIDER, record.receipt.job_id, record.receipt.step))
        if known is None:
            row = ReceiptRow(Role.PROVIDER, record.digest, record.receipt, b"", b"", None, b"", ())
            self._add_receipt(Role.PROVIDER, job, row)
        else:
            _need((known.digest, known.receipt) == (record.digest, record.receipt), "another receipt at this step")

    def _receipt_vouched(self, record: ReceiptVouched) -> None:
        receipt = record.receipt
        job = self._job(Role.CLIENT, receipt.job_id)
        row = ReceiptRow(
            Role.CLIENT, record.digest, receipt, record.receipt_signature, b"", record.voucher, b"", record.token_ids
        )
        known = self._receipts.get((Role.CLIENT, receipt.job_id, receipt.step))
        if known is not None:
            _need(known == row, "another receipt or voucher at this step")
            return
        _need(record.voucher.cumulative >= self._channels[job.channel].vouched, "a lower voucher")
        _need(record.voucher.provider == job.channel[1], "it pays somebody else")
        self._add_receipt(Role.CLIENT, job, row)
        self._vouch(job, record.voucher.cumulative, b"")
        self._acknowledge(job, receipt, record.voucher.cumulative)

    def _voucher_received(self, record: VoucherReceived) -> None:
        job = self._job(Role.PROVIDER, record.job_id)
        _need(record.client == job.channel[2], "from another client")
        key = (Role.PROVIDER, record.job_id, record.step)
        row = self._receipts.get(key)
        if row is None:
            raise StoreError("no receipt at this step")
        if row.voucher is not None:
            _need((row.voucher, row.voucher_signature) == (record.voucher, record.signature), "another voucher")
            return
        _need(record.voucher.cumulative >= job.vouched, "a lower voucher")
        _need(record.voucher.provider == job.channel[1], "it pays somebody else")
        self._put(self._receipts, key, replace(row, voucher=record.voucher, voucher_signature=record.signature))
        self._vouch(job, record.voucher.cumulative, record.signature)
        self._acknowledge(job, row.receipt, record.voucher.cumulative)

    def _vouch(self, job: _Job, cumulative: int, signature: bytes) -> None:
        _need(0 <= cumulative <= MAX_AMOUNT, "no amount")
        channel = self._channels[job.channel]
        if cumulative > channel.vouched:
            self._put(self._channels, job.channel, replace(channel, vouched=cumulative, signature=signature))

    def _acknowledge(self, job: _Job, receipt: WorkReceipt, vouched: int) -> None:
        role, job_id = job.opened.role, job.opened.job_id
        _need(receipt.step >= job.acked_step, "a later step is acknowledged already")
        channel = self._channels[job.channel]
        owed = channel.owed + receipt.total - job.owed
        _need(owed <= MAX_AMOUNT, "the channel would owe too much")
        new = sum((role, job_id, step) in self._receipts for step in range(job.acked_step + 1, receipt.step + 1))
        self._put(self._channels, job.channel, replace(channel, owed=owed))
        advanced = replace(job, acked_step=receipt.step, steps=job.steps + new, owed=receipt.total, vouched=vouched)
        self._put(self._jobs, (role, job_id), advanced)

    def _acked(self, role: Role, job_id: bytes, ack: ReceiptAck, signature: bytes) -> None:
        job = self._job(role, job_id)
        rows = [row for row in self._rows_of(role, job_id) if row.digest == ack.receipt]
        _need(bool(rows), "no such receipt")
        known = self._acks.get((role, ack.receipt))
        if known is not None:
            _need(known == signature, "another signature")
            return
        key = (role, job_id, rows[0].receipt.step)
        self._put(self._acks, (role, ack.receipt), signature)
        self._put(self._receipts, key, replace(rows[0], ack_signature=signature))
        self._acknowledge(job, rows[0].receipt, job.vouched)

    def _rows_of(self, role: Role, job_id: bytes) -> list[ReceiptRow]:
        return [row for (r, j, _), row in self._receipts.items() if (r, j) == (role, job_id)]

    def _settlement_sent(self, record: SettlementSent) -> None:
        known = self._settlements.get(record.transaction)
        row = SettlementRow(record.transaction, "sent", 0, 0, 0, Wei(0), Wei(0), record.vouchers)
        if known is not None:
            _need(known[0] == record, "sent with other vouchers")
            row = replace(known[1], state="sent") if known[1].state == "dropped" else known[1]
        self._put(self._settlements, record.transaction, (record, row))

    def _settlement_ended(self, record: SettlementMined | SettlementDropped) -> None:
        known = self._settlements.get(record.transaction)
        if known is None:
            raise StoreError("no such settlement")
        sent, row = known
        if isinstance(record, SettlementDropped):
            row = replace(row, state="dropped")
        else:
            row = replace(
                row,
                state="mined",
                block=record.block,
                gas=record.gas,
                gas_wei=record.gas_wei,
                paid=record.paid,
                fee=record.fee,
            )
        self._put(self._settlements, record.transaction, (sent, row))

    def _kept(self, record: PromptKept | OutputKept) -> None:
        self._job(record.role, record.job_id)
        key = (record.role, record.job_id)
        if isinstance(record, PromptKept):
            _need(self._prompts.get(key) in (None, record), "another prompt")
            self._put(self._prompts, key, record)
        else:
            _need(key in self._prompts and record.step > 0, "no prompt is kept, or no step")
            _need(self._outputs.get((*key, record.step)) in (None, record), "other content under this step")
            self._put(self._outputs, (*key, record.step), record)

    def _shredded(self, record: ContentShredded) -> None:
        _need(self._job(record.role, record.job_id).closed is not None, "the job is still running")
        key = (record.role, record.job_id)
        self._drop(self._prompts, key)
        for at in [at for at in self._outputs if at[:2] == key]:
            self._drop(self._outputs, at)

    def _drop(self, table: dict[Any, Any], key: Hashable) -> None:
        if key in table:
            self._undo.append((table, key, table.pop(key)))

    # ------------------------------------------------------------------------------------------------------- reading

    def _account(self, pair: tuple[bytes, bytes], channel: _Channel) -> ChannelAccount:
        slot = self._slots.get(pair)
        claimed = slot.claimed if slot else 0
        for sent, row in self._settlements.values():
            if slot and sent.provider == pair[0] and row.state == "mined" and row.block > slot.block:
                amounts = [amount for client, amount in row.vouchers if client == pair[1]]
                claimed = max([claimed, *(min(amount, slot.deposit) for amount in amounts)])
        return ChannelAccount(
            key=ChannelKey(Address(pair[0]), Address(pair[1])),
            owed=Wei(channel.owed),
            vouched=Wei(channel.vouched),
            voucher_signature=channel.signature,
            deposit=Wei(slot.deposit if slot else 0),
            claimed=Wei(claimed),
            exit_at=slot.exit_at if slot else 0,
            owner=slot.owner if slot else ZERO_ADDRESS,
        )

    async def account(self, key: ChannelKey, role: Role | None = None) -> ChannelAccount | None:
        pair = (key.provider, key.client)
        for side in (Role.PROVIDER, Role.CLIENT) if role is None else (role,):
            channel = self._channels.get((side, *pair))
            if channel is not None:
                return self._account(pair, channel)
        return self._account(pair, _Channel()) if pair in self._slots else None

    async def accounts(self, role: Role) -> list[ChannelAccount]:
        own = [(pair, channel) for (side, *pair), channel in self._channels.items() if side is role]
        used = {(provider, client) for _, provider, client in self._channels}
        unused = [(pair, _Channel()) for pair in sorted(self._slots) if pair not in used]
        return [self._account((pair[0], pair[1]), channel) for pair, channel in [*own, *unused]]

    def _job_row(self, job: _Job) -> JobRow:
        opened, closed = job.opened, job.closed
        return JobRow(
            role=opened.role,
            job_id=opened.job_id,
            request=opened.request,
            request_signature=opened.request_signature,
            accept=opened.accept,
            accept_signature=opened.accept_signature,
            model=opened.model,
            options=opened.options,
            steps=job.steps,
            owed=Wei(job.owed),
            closed=closed.reason if closed else None,
            detail=closed.detail if closed else "",
            opened_at_ms=opened.accept.accepted_at,
        )

    async def job(self, job_id: JobId, role: Role | None = None) -> JobRow | None:
        for side in (Role.PROVIDER, Role.CLIENT) if role is None else (role,):
            job = self._jobs.get((side, job_id))
            if job is not None:
                return self._job_row(job)
        return None

    async def jobs(self, role: Role, *, open_only: bool = False, limit: int = 1000) -> list[JobRow]:
        rows = [self._job_row(job) for (side, _), job in reversed(self._jobs.items()) if side is role]
        return [row for row in rows if row.closed is None or not open_only][:limit]

    async def receipts(
        self, *, role: Role | None = None, job_id: JobId | None = None, final_only: bool = False, limit: int = 1000
    ) -> list[ReceiptRow]:
        rows = [
            row
            for (side, job, _), row in reversed(self._receipts.items())
            if role in (None, side) and job_id in (None, job) and (row.receipt.is_final or not final_only)
        ]
        if job_id is not None:
            rows.sort(key=lambda row: (row.role is Role.CLIENT, row.receipt.step))
        return rows[:limit]

    async def receipt(self, digest_prefix: bytes) -> ReceiptRow | None:
        _need(bool(digest_prefix), "an empty prefix")
        rows = [row for row in self._receipts.values() if row.digest.startswith(digest_prefix)]
        _need(len({row.digest for row in rows}) < 2, "several receipts begin so")
        rows.sort(key=lambda row: row.role is Role.CLIENT)
        return rows[0] if rows else None

    async def settlements(self, *, state: str | None = None, limit: int = 1000) -> list[SettlementRow]:
        rows = [row for _, row in reversed(self._settlements.values())]
        return [row for row in rows if state in (None, row.state)][:limit]

    async def get_value(self, key: str) -> bytes | None:
        return self._values.get(key)

    async def kept(self, role: Role, job_id: JobId) -> Kept | None:
        prompt = self._prompts.get((role, job_id))
        if prompt is None:
            return None
        outputs = sorted(
            (output for output in self._outputs.values() if (output.role, output.job_id) == (role, job_id)),
            key=lambda output: output.step,
        )
        return Kept(prompt.salt, prompt.prompt, tuple(item for output in outputs for item in output.content))

    async def kept_before(self, role: Role, opened_before_ms: int, limit: int = 1000) -> list[JobId]:
        jobs = [self._jobs[key].opened for key in self._jobs if key in self._prompts and key[0] is role]
        early = [opened for opened in jobs if opened.accept.accepted_at < opened_before_ms]
        return [opened.job_id for opened in sorted(early, key=lambda opened: opened.accept.accepted_at)][:limit]

    async def commitment(self, key: Digest) -> CommitmentRow | None:
        return self._commitments.get(key)

    async def commitments(self, limit: int = 1000) -> list[CommitmentRow]:
        return list(reversed(self._commitments.values()))[:limit]

    async def verdict(self, case_id: Digest, round_: int) -> VerdictRow | None:
        return self._verdicts.get((case_id, round_))

    async def verdicts(self, limit: int = 1000) -> list[VerdictRow]:
        return list(reversed(self._verdicts.values()))[:limit]
