"""The tables, as SQLModel classes: what Alembic compares the migrations with and what reads come back as.

Facts (receipt, voucher, ack) are inserted once and never updated; what is derived from them (the state of a job, a
channel or a settlement) is updated in the same transaction. The role stands on the channel, and a job belongs to one
channel, so one file can hold both halves of a node that buys and sells.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from sqlalchemy import (
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

from protocol.units import MAX_AMOUNT

WEI_DIGITS: Final = 29
"""Decimal digits of the largest uint96 (79228162514264337593543950335). A column of this width holds every amount
an Escrow slot can; narrower would lose money, wider would only take room."""


class WeiText(TypeDecorator[int]):
    """An amount in wei as zero-padded decimal text.

    SQLite's integers end at 2**63 - 1 wei, 9.2 TALLY. Text of fixed width sorts and compares as the numbers do,
    survives every tool that reads the file, and can be read by a person with the sqlite3 shell; a blob could not.
    """

    impl = String(WEI_DIGITS)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002 - the interface
        """Raises: ValueError for an amount that is negative or above uint96."""
        if value is None:
            return None
        if not 0 <= value <= MAX_AMOUNT:
            raise ValueError(f"{value} wei is no amount: it must be within 0 and {MAX_AMOUNT}")
        return f"{value:0{WEI_DIGITS}d}"

    def process_result_value(self, value: Any | None, dialect: Dialect) -> int | None:  # noqa: ARG002 - the interface
        return None if value is None else int(value)


class Base(SQLModel):
    """Base of the journal's tables, with metadata of its own so that nothing else enters the migrations."""

    metadata: ClassVar[MetaData] = MetaData()


class Channel(Base, table=True):
    """What this node holds of one channel in one role. `vouched` never falls."""

    __tablename__ = "channel"
    __table_args__ = (
        UniqueConstraint("role", "provider", "client", name="channel_key"),
        CheckConstraint("role IN ('provider', 'client')", name="channel_role"),
    )

    id: int = Field(primary_key=True)
    role: str
    provider: bytes
    client: bytes
    owed: int = Field(sa_type=WeiText)
    vouched: int = Field(sa_type=WeiText)
    voucher_signature: bytes


class Slot(Base, table=True):
    """The escrow slot as the chain showed it last, at `block`."""

    __tablename__ = "slot"

    provider: bytes = Field(primary_key=True)
    client: bytes = Field(primary_key=True)
    owner: bytes
    deposit: int = Field(sa_type=WeiText)
    claimed: int = Field(sa_type=WeiText)
    exit_at: int
    block: int


class Job(Base, table=True):
    """One job. `acked_step`: highest acknowledged step, null before the first; `closed`: null while it is open."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("role", "job_id", name="job_key"),
        Index("job_open", "role", "closed"),
    )

    id: int = Field(primary_key=True)
    channel: int = Field(sa_column=Column(Integer, ForeignKey("channel.id"), nullable=False, index=True))
    role: str
    job_id: bytes
    request: bytes
    request_signature: bytes
    accept: bytes
    accept_signature: bytes
    model: str
    acked_step: int | None
    steps: int
    owed: int = Field(sa_type=WeiText)
    vouched: int = Field(sa_type=WeiText)
    closed: int | None
    closed_owed: int | None = Field(sa_type=WeiText)
    detail: str
    options: bytes = Field(sa_column=Column(LargeBinary, nullable=False, server_default=""))


class Receipt(Base, table=True):
    """One receipt of a job: issued (provider) or recomputed and vouched for (client)."""

    __tablename__ = "receipt"
    __table_args__ = (
        UniqueConstraint("job", "step", name="receipt_key"),
        Index("receipt_digest", "digest"),
        Index("receipt_final", "is_final"),
    )

    id: int = Field(primary_key=True)
    job: int = Field(sa_column=Column(Integer, ForeignKey("job.id"), nullable=False))
    step: int
    digest: bytes
    is_final: bool
    total: int = Field(sa_type=WeiText)
    receipt: bytes
    signature: bytes
    token_ids: bytes


class VoucherRow(Base, table=True):
    """The voucher that acknowledges a receipt; its payee is the channel's provider. Signature: provider role only."""

    __tablename__ = "voucher"

    receipt: int = Field(sa_column=Column(Integer, ForeignKey("receipt.id"), primary_key=True, autoincrement=False))
    cumulative: int = Field(sa_type=WeiText)
    signature: bytes


class Ack(Base, table=True):
    """The other half of the stick: signed by us (client, no signature kept: it can be made again) or received."""

    __tablename__ = "ack"

    receipt: int = Field(sa_column=Column(Integer, ForeignKey("receipt.id"), primary_key=True, autoincrement=False))
    signature: bytes


class Settlement(Base, table=True):
    """One settlement transaction; block, gas and amounts are zero until it is mined."""

    __tablename__ = "settlement"
    __table_args__ = (
        UniqueConstraint("digest", name="settlement_digest"),
        CheckConstraint("state IN ('sent', 'mined', 'dropped')", name="settlement_state"),
        Index("settlement_by_state", "state", "block"),
    )

    id: int = Field(primary_key=True)
    digest: bytes
    provider: bytes
    state: str
    block: int
    gas: int
    gas_wei: int = Field(sa_type=WeiText)
    paid: int = Field(sa_type=WeiText)
    fee: int = Field(sa_type=WeiText)
    reason: str


class SettlementItem(Base, table=True):
    """One voucher inside a settlement, in its order. `block`: the settlement's while it is mined, else 0."""

    __tablename__ = "settlement_item"
    __table_args__ = (Index("settlement_item_client", "client", "block"),)

    settlement: int = Field(
        sa_column=Column(Integer, ForeignKey("settlement.id"), primary_key=True, autoincrement=False)
    )
    position: int = Field(primary_key=True)
    client: bytes
    cumulative: int = Field(sa_type=WeiText)
    block: int


class ContentKey(Base, table=True):
    """The key that a job's kept content is sealed under; without it the content is gone. `opened_at_ms`: the job's."""

    __tablename__ = "content_key"
    __table_args__ = (Index("content_key_opened", "opened_at_ms"),)

    job: int = Field(sa_column=Column(Integer, ForeignKey("job.id"), primary_key=True, autoincrement=False))
    opened_at_ms: int
    key: bytes


class Content(Base, table=True):
    """Sealed content of a job: its prompt at step 0, and under each receipt what that receipt is over."""

    __tablename__ = "content"

    job: int = Field(sa_column=Column(Integer, ForeignKey("job.id"), primary_key=True, autoincrement=False))
    step: int = Field(primary_key=True)
    sealed: bytes


class CommitmentMadeRow(Base, table=True):
    """A commitment of this provider, written before it was signed."""

    __tablename__ = "commitment_made"
    __table_args__ = (UniqueConstraint("key", name="commitment_made_key"),)

    id: int = Field(primary_key=True)
    key: bytes
    commitment: bytes
    entries: bytes
    secret: bytes
    decoy: bytes
    made_at_ms: int


class VerdictMadeRow(Base, table=True):
    """A verdict of this validator, written before its digest was submitted."""

    __tablename__ = "verdict_made"
    __table_args__ = (UniqueConstraint("case_id", "round", name="verdict_made_key"),)

    id: int = Field(primary_key=True)
    case_id: bytes
    round: int
    verdict: bytes
    digest: bytes
    findings: str
    made_at_ms: int


class Value(Base, table=True):
    """A small durable setting."""

    __tablename__ = "value"

    key: str = Field(primary_key=True)
    value: bytes


def core(model: type[SQLModel]) -> Table:
    """The SQLAlchemy table behind a model, for the statements of the write path."""
    return Base.metadata.tables[str(model.__tablename__)]
