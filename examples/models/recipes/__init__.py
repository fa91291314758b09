"""How each set of models is made and checked: one module per family, on top of `graph`, `quantize` and `sources`."""
