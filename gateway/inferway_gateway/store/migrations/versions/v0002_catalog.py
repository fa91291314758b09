"""The catalog of deployed models: versions, aliases, deployments, events, blobs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    catalog = op.create_table(
        "inferway_catalog",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(catalog, [{"id": 1, "revision": 0}])
    op.create_table(
        "inferway_versions",
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("isolation", sa.String(16), nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("resident_bytes", sa.BigInteger),
        sa.Column("peak_bytes", sa.BigInteger),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(32), nullable=False),
        sa.UniqueConstraint("model", "digest", name="inferway_versions_content"),
    )
    op.create_table(
        "inferway_version_files",
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("path", sa.String(512), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
    )
    op.create_index("inferway_version_files_by_digest", "inferway_version_files", ["digest"])
    op.create_table(
        "inferway_retired_versions",
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), nullable=False),
    )
    op.create_table(
        "inferway_aliases",
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("alias", sa.String(63), primary_key=True),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("previous", sa.JSON),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_by", sa.String(32), nullable=False),
    )
    op.create_table(
        "inferway_deployments",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False, unique=True),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("step", sa.String(16)),
        sa.Column("failed_step", sa.String(16)),
        sa.Column("error_code", sa.String(32)),
        sa.Column("error_message", sa.Text),
        sa.Column("reused", sa.Boolean, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("cancelled_by", sa.String(32)),
        sa.Column("isolation", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("owner_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(32), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("inferway_deployments_by_model", "inferway_deployments", ["model", "sequence"])
    op.create_index("inferway_deployments_by_state", "inferway_deployments", ["state"])
    state = sa.column("state", sa.String)
    reused = sa.column("reused", sa.Boolean)
    makes_version = sa.and_(state == "running", reused.is_(sa.false()))
    for name, column in (("number", "version"), ("content", "digest")):
        op.create_index(
            f"inferway_deployments_{name}",
            "inferway_deployments",
            ["model", column],
            unique=True,
            sqlite_where=makes_version,
            postgresql_where=makes_version,
        )
    op.create_table(
        "inferway_events",
        sa.Column("id", _BIG, primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("alias", sa.String(63)),
        sa.Column("by", sa.String(32), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("inferway_events_by_model", "inferway_events", ["model", "id"])
    op.create_table(
        "inferway_blobs",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("copy", sa.String(16), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(32), nullable=False),
        sa.Column("wanted_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "inferway_blob_holders",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), primary_key=True),
    )
    op.create_index("inferway_blob_holders_by_key", "inferway_blob_holders", ["key_id"])


def downgrade() -> None:
    for table in (
        "blob_holders",
        "blobs",
        "events",
        "deployments",
        "aliases",
        "retired_versions",
        "version_files",
        "versions",
        "catalog",
    ):
        op.drop_table(f"inferway_{table}")
