"""Models in processes of their own, locked in."""
