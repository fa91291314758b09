"""Text encoders: what lies beside a graph over token ids and makes it one."""

from .package import read_package

__all__ = ["read_package"]
