"""Jobs keep the options their request signed a hash of."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("options", sa.LargeBinary(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("job", "options")
