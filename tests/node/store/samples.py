"""Records of one provider and its clients, made from small numbers, for the store's tests."""

from __future__ import annotations

import hashlib
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
from protocol.eip712 import fields_of, type_hash
from protocol.messages import Accept, Commitment, JobRequest, ReceiptAck, Verdict, Voucher, WorkReceipt
from protocol.units import Address, Digest, FinishReason, JobId, Wei

PROVIDER = Address(b"\xaa" * 20)
OWNER = Address(b"\xbb" * 20)
SLOT_DEPOSIT = 10_000


def client(number: int = 0) -> Address:
    """Session key of client `number`."""
    return Address(bytes([0xC0, number]) + b"\xcc" * 18)


def key(number: int = 0) -> ChannelKey:
    """The channel of client `number`."""
    return ChannelKey(PROVIDER, client(number))


def job_id(number: int) -> JobId:
    """The id of job `number`."""
    return JobId(hashlib.sha256(f"job {number}".encode()).digest())


def document(struct: type, **given: Any) -> Any:
    """A document with every field set, to the value given or one that differs from field to field."""
    values: dict[str, Any] = {}
    for at, (name, sol) in enumerate(fields_of(struct)):
        if sol == "address":
            values[name] = bytes([at]) * 20
        elif sol == "bytes32":
            values[name] = bytes([at]) * 32
        else:
            values[name] = False if sol == "bool" else at
    return struct(**{**values, **given})


def signature(of: str) -> bytes:
    """65 bytes that name what they sign."""
    return hashlib.sha512(of.encode()).digest() + b"\x1b"


def opened(job: int, role: Role = Role.PROVIDER, of: int = 0, **request: Any) -> JobOpened:
    """Job `job` of client `of`."""
    return JobOpened(
        role=role,
        job_id=job_id(job),
        request=document(JobRequest, provider=PROVIDER, client=client(of), **request),
        request_signature=signature(f"request {job}"),
        accept=document(Accept, job_id=job_id(job), accepted_at=1_700_000_000_000 + job),
        accept_signature=signature(f"accept {job}"),
        model="tiny",
        options=f"options {job}".encode(),
    )


def receipt(job: int, step: int, total: int, of: int = 0, **fields: Any) -> WorkReceipt:
    """Receipt `step` of a job."""
    given = {"provider": PROVIDER, "client": client(of), "job_id": job_id(job), "step": step, "total": total}
    made: WorkReceipt = document(WorkReceipt, **{**given, **fields})
    return made


def digest(made: WorkReceipt) -> Digest:
    """Stands for the EIP-712 digest: differs whenever a field does."""
    return Digest(hashlib.sha256(type_hash(WorkReceipt) + repr(made).encode()).digest())


def issued(job: int, step: int, total: int, of: int = 0, **fields: Any) -> ReceiptIssued:
    made = receipt(job, step, total, of, **fields)
    return ReceiptIssued(digest(made), made)


def voucher(cumulative: int) -> Voucher:
    return Voucher(PROVIDER, cumulative)


def received(job: int, step: int, cumulative: int, of: int = 0) -> VoucherReceived:
    return VoucherReceived(client(of), job_id(job), step, voucher(cumulative), signature(f"voucher {of} {cumulative}"))


def vouched(job: int, step: int, total: int, cumulative: int, of: int = 0, **fields: Any) -> ReceiptVouched:
    made = receipt(job, step, total, of, **fields)
    return ReceiptVouched(
        digest(made), made, signature(f"receipt {job} {step}"), voucher(cumulative), (1, 70_000, 2**32 - 1)
    )


def ack_received(made: ReceiptIssued) -> AckReceived:
    return AckReceived(JobId(made.receipt.job_id), ReceiptAck(made.digest), signature("ack"))


def ack_signed(made: ReceiptVouched) -> AckSigned:
    return AckSigned(JobId(made.receipt.job_id), ReceiptAck(made.digest))


def closed(
    job: int, owed: int, role: Role = Role.PROVIDER, reason: FinishReason = FinishReason.STOP, detail: str = ""
) -> JobClosed:
    return JobClosed(role, job_id(job), reason, Wei(owed), detail)


def slot(of: int = 0, deposit: int = SLOT_DEPOSIT, claimed: int = 0, exit_at: int = 0, block: int = 5) -> SlotSeen:
    return SlotSeen(key(of), OWNER, Wei(deposit), Wei(claimed), exit_at, block)


def transaction(number: int) -> Digest:
    return Digest(hashlib.sha256(f"transaction {number}".encode()).digest())


def sent(number: int, *amounts: int) -> SettlementSent:
    """A settlement of the vouchers of client 0, 1, ..."""
    items = tuple((client(of), Wei(amount)) for of, amount in enumerate(amounts))
    return SettlementSent(transaction(number), PROVIDER, items)


def mined(number: int, block: int = 9) -> SettlementMined:
    return SettlementMined(transaction(number), block, 50_000, 10**20, Wei(88), Wei(12))


def dropped(number: int) -> SettlementDropped:
    return SettlementDropped(transaction(number), "replaced")


def prompt_kept(job: int, role: Role = Role.PROVIDER) -> PromptKept:
    return PromptKept(role, job_id(job), bytes([job]) * 32, (job, 70_000, 2**32 - 1))


def output_kept(job: int, step: int, role: Role = Role.PROVIDER) -> OutputKept:
    return OutputKept(role, job_id(job), step, (b"leaf %d" % step, b""))


def shredded(job: int, role: Role = Role.PROVIDER) -> ContentShredded:
    return ContentShredded(role, job_id(job))


def commitment(number: int, **fields: Any) -> CommitmentMade:
    """The commitment of epoch `number`."""
    made = document(Commitment, provider=PROVIDER, epoch=number, **fields)
    return CommitmentMade(transaction(number), made, b"\x01" * 76, b"\x02" * 32, job_id(5))


def verdict(case: int, round_: int = 0, **fields: Any) -> VerdictMade:
    """A verdict in case `case`."""
    made = document(Verdict, case_id=transaction(case), round=round_, **fields)
    return VerdictMade(made, transaction(1000 + case), '{"jobs": []}')


def one_of_each() -> list[list[Record]]:
    """Calls that together write every kind of record, each valid after those before it."""
    last = issued(1, 2, 120, is_final=True, finish_reason=1)
    bought = vouched(7, 1, 30, 30, 1, is_final=True, finish_reason=1)
    return [
        [slot()],
        [opened(1)],
        [issued(1, 1, 50)],
        [received(1, 1, 50)],
        [last],
        [received(1, 2, 120), ack_received(last), closed(1, 120)],
        [opened(7, Role.CLIENT, 1)],
        [bought],
        [ack_signed(bought)],
        [closed(7, 30, Role.CLIENT)],
        [sent(1, 120)],
        [mined(1)],
        [sent(2, 120)],
        [dropped(2)],
        [opened(3), prompt_kept(3)],
        [issued(3, 1, 50), output_kept(3, 1)],
        [opened(4), prompt_kept(4), closed(4, 0), shredded(4)],
        [commitment(1)],
        [verdict(1), verdict(1, 1)],
    ]
