"""The journal's nouns: every record a node must have on disk before it signs or acts, and the channel accounts.

A record is a fact, written once and never changed; the store derives its tables from records, and a restart
rebuilds every channel from them. Both roles write the same nouns, seen from their own side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protocol.messages import Accept, Commitment, JobRequest, ReceiptAck, Verdict, Voucher, WorkReceipt
from protocol.units import Address, Digest, FinishReason, JobId, Wei


class Role(StrEnum):
    """Which half of the stick this node holds for a job."""

    PROVIDER = "provider"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class ChannelKey:
    """One escrow slot: what `provider` (wallet) is owed by `client` (session key)."""

    provider: Address
    client: Address


@dataclass(frozen=True, slots=True)
class JobOpened:
    """A job was agreed: the request, the acceptance, and both signatures. Written before the first token.

    `options`: the bytes that the request's options hash is over; whoever replays the job needs them.
    """

    role: Role
    job_id: JobId
    request: JobRequest
    request_signature: bytes
    accept: Accept
    accept_signature: bytes
    model: str
    options: bytes


@dataclass(frozen=True, slots=True)
class ReceiptIssued:
    """Provider: this receipt will be signed. Written and synced before the signature exists."""

    digest: Digest
    receipt: WorkReceipt


@dataclass(frozen=True, slots=True)
class ReceiptVouched:
    """Client: this receipt recomputed, and `voucher` will be signed for it. Written and synced before either.

    `token_ids` are the increment's tokens, so that a failover after a crash can continue from them.
    """

    digest: Digest
    receipt: WorkReceipt
    receipt_signature: bytes
    voucher: Voucher
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VoucherReceived:
    """Provider: a checked voucher that acknowledges receipt `step` of `job_id`. Synced before tokens are released."""

    client: Address
    job_id: JobId
    step: int
    voucher: Voucher
    signature: bytes


@dataclass(frozen=True, slots=True)
class AckSigned:
    """Client: the final receipt will be acknowledged."""

    job_id: JobId
    ack: ReceiptAck


@dataclass(frozen=True, slots=True)
class AckReceived:
    """Provider: the other half of the stick, checked."""

    job_id: JobId
    ack: ReceiptAck
    signature: bytes


@dataclass(frozen=True, slots=True)
class JobClosed:
    """The job reached a terminal state on this side. `owed` is what the last acknowledged receipt comes to."""

    role: Role
    job_id: JobId
    reason: FinishReason
    owed: Wei
    detail: str


@dataclass(frozen=True, slots=True)
class SlotSeen:
    """An escrow slot as the chain shows it at a confirmed block: what may be served against.

    `exit_at`: Unix seconds after which the payer may take the rest back, 0 when no exit is asked for.
    """

    key: ChannelKey
    owner: Address
    deposit: Wei
    claimed: Wei
    exit_at: int
    block: int


@dataclass(frozen=True, slots=True)
class SettlementSent:
    """Provider: these vouchers go to the chain in `transaction`. Written before the transaction is broadcast."""

    transaction: Digest
    provider: Address
    vouchers: tuple[tuple[Address, Wei], ...]  # (client, cumulative)


@dataclass(frozen=True, slots=True)
class SettlementMined:
    """The settlement is in a block. `gas` as used, `gas_wei` what it cost in the chain's coin."""

    transaction: Digest
    block: int
    gas: int
    gas_wei: int
    paid: Wei
    fee: Wei


@dataclass(frozen=True, slots=True)
class SettlementDropped:
    """The settlement vanished: replaced, reverted, or reorganised away; its vouchers are due again."""

    transaction: Digest
    reason: str


@dataclass(frozen=True, slots=True)
class PromptKept:
    """What a job's prompt hash is over, kept for an audit: sealed at rest under a key of its own.

    Provider: written with JobOpened. Client: before its request leaves. `salt`: 32 bytes.
    """

    role: Role
    job_id: JobId
    salt: bytes
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OutputKept:
    """The transcript leaves (or vectors) under receipt `step`, in one write with ReceiptIssued or ReceiptVouched.

    `content`: the leaves' canonical bytes one after the other (transcript.py), or an embedding job's vectors.
    """

    role: Role
    job_id: JobId
    step: int
    content: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ContentShredded:
    """The key of a job's kept content is destroyed: its bills stay, its texts are gone."""

    role: Role
    job_id: JobId


@dataclass(frozen=True, slots=True)
class CommitmentMade:
    """Provider: this commitment will be signed and posted. Written before the signature exists; one per key, for ever.

    `entries`: the tree's entries, packed (dossier.py). `secret`: what `lot` hides. `decoy`: the job made wrong on
    purpose in it, or zero.
    """

    key: Digest
    commitment: Commitment
    entries: bytes
    secret: bytes
    decoy: JobId


@dataclass(frozen=True, slots=True)
class VerdictMade:
    """Validator: this verdict's digest will be committed. Written before; one per case and round, for ever.

    `findings`: the per-job results behind it, as JSON for `tally case show`.
    """

    verdict: Verdict
    digest: Digest
    findings: str


Record = (
    JobOpened
    | ReceiptIssued
    | ReceiptVouched
    | VoucherReceived
    | AckSigned
    | AckReceived
    | JobClosed
    | SlotSeen
    | SettlementSent
    | SettlementMined
    | SettlementDropped
    | PromptKept
    | OutputKept
    | ContentShredded
    | CommitmentMade
    | VerdictMade
)
