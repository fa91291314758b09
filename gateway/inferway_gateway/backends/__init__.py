"""Ways to run a model: one module per kind of backend."""
