"""Models in processes of their own, locked in."""

from .backend import WorkerBackend, WorkerLimits
from .description import BackendOptions
from .session import SessionLimits, WorkerSession

__all__ = ["BackendOptions", "SessionLimits", "WorkerBackend", "WorkerLimits", "WorkerSession"]
