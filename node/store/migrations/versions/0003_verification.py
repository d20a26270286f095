"""Kept content under a key per job; commitments; verdicts."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "content_key",
        sa.Column("job", sa.Integer(), sa.ForeignKey("job.id"), primary_key=True, autoincrement=False),
        sa.Column("opened_at_ms", sa.Integer(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
    )
    op.create_index("content_key_opened", "content_key", ["opened_at_ms"])
    op.create_table(
        "content",
        sa.Column("job", sa.Integer(), sa.ForeignKey("job.id"), primary_key=True, autoincrement=False),
        sa.Column("step", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "commitment_made",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("commitment", sa.LargeBinary(), nullable=False),
        sa.Column("entries", sa.LargeBinary(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("decoy", sa.LargeBinary(), nullable=False),
        sa.Column("made_at_ms", sa.Integer(), nullable=False),
        sa.UniqueConstraint("key", name="commitment_made_key"),
    )
    op.create_table(
        "verdict_made",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("case_id", sa.LargeBinary(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("findings", sa.String(), nullable=False),
        sa.Column("made_at_ms", sa.Integer(), nullable=False),
        sa.UniqueConstraint("case_id", "round", name="verdict_made_key"),
    )


def downgrade() -> None:
    for name in ("verdict_made", "commitment_made", "content", "content_key"):
        op.drop_table(name)
