"""The journal: channels, slots, jobs, receipts, vouchers, acknowledgements, settlements, values.

Column types are written out here and never imported from node.store.tables: a migration describes the schema as it
was when it was written.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

WEI = sa.String(29)


def upgrade() -> None:
    op.create_table(
        "channel",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("provider", sa.LargeBinary(), nullable=False),
        sa.Column("client", sa.LargeBinary(), nullable=False),
        sa.Column("owed", WEI, nullable=False),
        sa.Column("vouched", WEI, nullable=False),
        sa.Column("voucher_signature", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("role", "provider", "client", name="channel_key"),
        sa.CheckConstraint("role IN ('provider', 'client')", name="channel_role"),
    )
    op.create_table(
        "slot",
        sa.Column("provider", sa.LargeBinary(), primary_key=True),
        sa.Column("client", sa.LargeBinary(), primary_key=True),
        sa.Column("owner", sa.LargeBinary(), nullable=False),
        sa.Column("deposit", WEI, nullable=False),
        sa.Column("claimed", WEI, nullable=False),
        sa.Column("exit_at", sa.Integer(), nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
    )
    op.create_table(
        "job",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("channel", sa.Integer(), sa.ForeignKey("channel.id"), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("job_id", sa.LargeBinary(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("request_signature", sa.LargeBinary(), nullable=False),
        sa.Column("accept", sa.LargeBinary(), nullable=False),
        sa.Column("accept_signature", sa.LargeBinary(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("acked_step", sa.Integer(), nullable=True),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("owed", WEI, nullable=False),
        sa.Column("vouched", WEI, nullable=False),
        sa.Column("closed", sa.Integer(), nullable=True),
        sa.Column("closed_owed", WEI, nullable=True),
        sa.Column("detail", sa.String(), nullable=False),
        sa.UniqueConstraint("role", "job_id", name="job_key"),
    )
    op.create_index("ix_job_channel", "job", ["channel"])
    op.create_index("job_open", "job", ["role", "closed"])
    op.create_table(
        "receipt",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("job", sa.Integer(), sa.ForeignKey("job.id"), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("is_final", sa.Boolean(), nullable=False),
        sa.Column("total", WEI, nullable=False),
        sa.Column("receipt", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("job", "step", name="receipt_key"),
    )
    op.create_index("receipt_digest", "receipt", ["digest"])
    op.create_index("receipt_final", "receipt", ["is_final"])
    _create_halves()
    _create_settlements()
    op.create_table(
        "value",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("value", sa.LargeBinary(), nullable=False),
    )


def _create_halves() -> None:
    """What the client gave for a receipt."""
    op.create_table(
        "voucher",
        sa.Column("receipt", sa.Integer(), sa.ForeignKey("receipt.id"), primary_key=True, autoincrement=False),
        sa.Column("cumulative", WEI, nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "ack",
        sa.Column("receipt", sa.Integer(), sa.ForeignKey("receipt.id"), primary_key=True, autoincrement=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
    )


def _create_settlements() -> None:
    op.create_table(
        "settlement",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("provider", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
        sa.Column("gas", sa.Integer(), nullable=False),
        sa.Column("gas_wei", WEI, nullable=False),
        sa.Column("paid", WEI, nullable=False),
        sa.Column("fee", WEI, nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.UniqueConstraint("digest", name="settlement_digest"),
        sa.CheckConstraint("state IN ('sent', 'mined', 'dropped')", name="settlement_state"),
    )
    op.create_index("settlement_by_state", "settlement", ["state", "block"])
    op.create_table(
        "settlement_item",
        sa.Column("settlement", sa.Integer(), sa.ForeignKey("settlement.id"), primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("client", sa.LargeBinary(), nullable=False),
        sa.Column("cumulative", WEI, nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
    )
    op.create_index("settlement_item_client", "settlement_item", ["client", "block"])


def downgrade() -> None:
    for name in ("value", "settlement_item", "settlement", "ack", "voucher", "receipt", "job", "slot", "channel"):
        op.drop_table(name)
