"""Model versions that servers elsewhere answer for."""

from .backend import RemoteBackend

__all__ = ["RemoteBackend"]
