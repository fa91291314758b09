"""The edge below HTTP semantics: connection limits, deadlines, drain."""
