"""API keys, and what tells one pepper from another."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "inferway_keys",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("environment", sa.String(4), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("models", sa.JSON, nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("pepper_version", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(12)),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("rotated_at", sa.DateTime(timezone=True)),
        sa.Column("replaced_by", sa.String(12)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
        sa.Column("retry_token", sa.LargeBinary(32), unique=True),
    )
    op.create_index("inferway_keys_by_age", "inferway_keys", ["created_at", "id"])
    op.create_table(
        "inferway_peppers",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("check_value", sa.LargeBinary(32), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("inferway_peppers")
    op.drop_table("inferway_keys")
