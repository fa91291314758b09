"""Steps of the schema, each pointing at the one before. A released step is never changed."""
