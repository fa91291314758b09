"""Alembic runs this file to migrate the connection that ``store/sql.py`` hands it, inside its transaction."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    # SQLite's DDL is transactional when Python's sqlite3 module keeps out of it, which sql.py sees to.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
