"""The schema's history, one module a step, run by Alembic when the database is opened."""
