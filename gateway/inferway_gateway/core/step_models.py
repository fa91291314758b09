"""The models of a pipeline's steps, as the router and the registry find them."""

from __future__ import annotations

from .batcher import Asker
from .errors import GatewayError, ModelNotReadyError
from .managed import ManagedVersions
from .pipeline import Choice, StepTarget
from .registry import Registry
from .routing import Router
from .served import ServedVersion


class ServedSteps:
    """``StepModels`` of ``core/pipeline.py``. A step takes part in an alias as a request of the same caller would.

    Args:
        router, registry: where names lead.
        managed: what of it can be loaded.
    """

    def __init__(self, router: Router, registry: Registry, managed: ManagedVersions) -> None:
        self._router = router
        self._registry = registry
        self._managed = managed

    def choose(self, target: StepTarget, asker: Asker | None) -> Choice:
        key_id, fields = ("", {}) if asker is None else (asker.key_id, asker.fields)
        route = self._router.resolve(target.name, target.version, key_id, fields)
        if route is None:
            return Choice(target)
        model = route.model
        return Choice(
            StepTarget(model, None, route.version),
            tuple(StepTarget(model, None, version) for version in route.fallback),
            route.stats,
        )

    def locate(self, target: StepTarget) -> StepTarget:
        model, version = self._router.locate(target.name, target.version)
        return StepTarget(model, None, version)

    def resolve(self, target: StepTarget) -> ServedVersion:
        return self._registry.get(target.model, target.version)

    async def acquire(self, target: StepTarget, deadline: float | None) -> ServedVersion:
        return await self._registry.acquire(target.model, target.version, deadline=deadline)

    def problem(self, target: StepTarget) -> str | None:
        try:
            name, version = self._router.locate(target.name, target.version)
            return self._registry.get(name, version).problem()
        except ModelNotReadyError as error:
            if self._registry.is_managed(name):
                status, reason = self._managed.status(name, version or max(self._registry.known_versions(name)))
                return reason if status == "FAILED" else None
            return error.message
        except GatewayError as error:
            return error.message
