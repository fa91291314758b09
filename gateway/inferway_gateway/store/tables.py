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
