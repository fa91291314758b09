"""The models of a pipeline's steps, as the router and the registry find them."""

from __future__ import annotations

from .errors import GatewayError, ModelNotReadyError
from .managed import ManagedVersions
from .pipeline import StepTarget
from .registry import Registry
from .routing import Router
from .served import ServedVersion


class ServedSteps:
    """``StepModels`` of ``core/pipeline.py``. A step takes part in an alias' weights as any request without a key does.

    Args:
        router, registry: where names lead.
        managed: what of it can be loaded.
    """

    def __init__(self, router: Router, registry: Registry, managed: ManagedVersions) -> None:
        self._router = router
        self._registry = registry
        self._managed = managed

    def resolve(self, target: StepTarget) -> ServedVersion:
        return self._registry.get(*self._choose(target))

    async def acquire(self, target: StepTarget, deadline: float | None) -> ServedVersion:
        return await self._registry.acquire(*self._choose(target), deadline=deadline)

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

    def _choose(self, target: StepTarget) -> tuple[str, int | None]:
        route = self._router.resolve(target.name, target.version, "", {})
        return (target.model, target.version) if route is None else (route.model, route.version)
