"""Models of one folder, some in this process and some in their own."""

from __future__ import annotations

from ..core.backend import Artifact, Backend, Session


class ChosenIsolation:
    """Opens each model where its configuration wants it, in this process where it says nothing.

    For models that the operator placed. Where a deployed model runs is not for its own files to say.
    """

    def __init__(self, inprocess: Backend, worker: Backend) -> None:
        self._inprocess = inprocess
        self._worker = worker

    def open(self, artifact: Artifact) -> Session:
        """As ``core.backend.Backend.open``."""
        return (self._worker if artifact.config.isolation == "worker" else self._inprocess).open(artifact)
