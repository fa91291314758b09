"""The tables, as the migrations leave them; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import sqlalchemy as sa


class Utc(sa.types.TypeDecorator[datetime]):
    """An aware moment, in UTC on both sides. SQLite keeps no zone, so it gets the naive moment in UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


METADATA: Final = sa.MetaData()
KEYS: Final = sa.Table(
    "inferway_keys",
    METADATA,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("environment", sa.String(4), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("models", sa.JSON, nullable=False),
    sa.Column("digest", sa.LargeBinary(32), nullable=False),
    sa.Column("pepper_version", sa.Integer, nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("created_by", sa.String(12)),
    sa.Column("expires_at", Utc),
    sa.Column("revoked_at", Utc),
    sa.Column("rotated_at", Utc),
    sa.Column("replaced_by", sa.String(12)),
    sa.Column("last_used_at", Utc),
    sa.Column("retry_token", sa.LargeBinary(32), unique=True),
    sa.Index("inferway_keys_by_age", "created_at", "id"),
)
PEPPERS: Final = sa.Table(
    "inferway_peppers",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("check_value", sa.LargeBinary(32), nullable=False),
)

# A large number that SQLite also counts up by itself, which it does for INTEGER alone.
_BIG: Final = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_MODEL: Final = sa.String(128)
_DIGEST: Final = sa.String(64)
_BY: Final = sa.String(32)

CATALOG: Final = sa.Table(
    "inferway_catalog",
    METADATA,
    # One row. Whoever changes the catalog changes it first, and so waits for whoever does at the same time.
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
)
VERSIONS: Final = sa.Table(
    "inferway_versions",
    METADATA,
    sa.Column("model", _MODEL, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("digest", _DIGEST, nullable=False),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("isolation", sa.String(16), nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, key="notes", nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("resident_bytes", sa.BigInteger),
    sa.Column("peak_bytes", sa.BigInteger),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("created_by", _BY, nullable=False),
    sa.UniqueConstraint("model", "digest", name="inferway_versions_content"),
)
VERSION_FILES: Final = sa.Table(
    "inferway_version_files",
    METADATA,
    sa.Column("model", _MODEL, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("path", sa.String(512), primary_key=True),
    sa.Column("digest", _DIGEST, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Index("inferway_version_files_by_digest", "digest"),
)
RETIRED: Final = sa.Table(
    "inferway_retired_versions",
    METADATA,
    # Numbers of deleted versions, each with the only content that may have it again.
    sa.Column("model", _MODEL, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("digest", _DIGEST, nullable=False),
)
ALIASES: Final = sa.Table(
    "inferway_aliases",
    METADATA,
    sa.Column("model", _MODEL, primary_key=True),
    sa.Column("alias", sa.String(63), primary_key=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("previous", sa.JSON(none_as_null=True)),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("updated_at", Utc, nullable=False),
    sa.Column("updated_by", _BY, nullable=False),
)
DEPLOYMENTS: Final = sa.Table(
    "inferway_deployments",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    # The revision at which it began: their order.
    sa.Column("sequence", sa.BigInteger, nullable=False, unique=True),
    sa.Column("model", _MODEL, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", _DIGEST, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("step", sa.String(16)),
    sa.Column("failed_step", sa.String(16)),
    sa.Column("error_code", sa.String(32)),
    sa.Column("error_message", sa.Text),
    sa.Column("reused", sa.Boolean, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("cancelled_by", _BY),
    sa.Column("isolation", sa.String(16), nullable=False),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("owner_seen_at", Utc, nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("created_by", _BY, nullable=False),
    sa.Column("updated_at", Utc, nullable=False),
    sa.Index("inferway_deployments_by_model", "model", "sequence"),
    sa.Index("inferway_deployments_by_state", "state"),
)
_MAKES_VERSION: Final = sa.and_(DEPLOYMENTS.c.state == "running", DEPLOYMENTS.c.reused.is_(sa.false()))
# Should the lock on CATALOG ever fail: two deployments cannot make one version, nor one content two.
for _name, _column in (("number", DEPLOYMENTS.c.version), ("content", DEPLOYMENTS.c.digest)):
    sa.Index(
        f"inferway_deployments_{_name}",
        DEPLOYMENTS.c.model,
        _column,
        unique=True,
        sqlite_where=_MAKES_VERSION,
        postgresql_where=_MAKES_VERSION,
    )
EVENTS: Final = sa.Table(
    "inferway_events",
    METADATA,
    sa.Column("id", _BIG, primary_key=True),
    sa.Column("at", Utc, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("model", _MODEL, nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("alias", sa.String(63)),
    sa.Column("by", _BY, nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Index("inferway_events_by_model", "model", "id"),
    sqlite_autoincrement=True,  # an id is never given twice
)
BLOBS: Final = sa.Table(
    "inferway_blobs",
    METADATA,
    sa.Column("digest", _DIGEST, primary_key=True),
    sa.Column("copy", sa.String(16), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("created_by", _BY, nullable=False),
    sa.Column("wanted_at", Utc, nullable=False),
)
BLOB_HOLDERS: Final = sa.Table(
    "inferway_blob_holders",
    METADATA,
    # Which keys have uploaded a content themselves.
    sa.Column("digest", _DIGEST, primary_key=True),
    sa.Column("key_id", _BY, primary_key=True),
    sa.Index("inferway_blob_holders_by_key", "key_id"),
)
