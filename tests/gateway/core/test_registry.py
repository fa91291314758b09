"""Models in memory: what the registry does when the disk or a load does not do its part."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import models
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact, Session
from inferway_gateway.core.registry import Registry
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.store.repository import ModelRepository


class StuckBackend:
    """Opens nothing before it may, as a runtime does with a model that takes minutes to load."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def open(self, artifact: Artifact) -> Session:
        self.begun.set()
        self.may_end.wait(30)
        raise OSError("the model has gone")


async def test_a_repository_that_cannot_be_read_at_the_start_is_looked_at_again(tmp_path: Path) -> None:
    async with asyncio.timeout(30), RunnerPool(1) as runners:
        folder = tmp_path / "models"
        registry = Registry(ModelRepository(folder), OnnxBackend(), runners, poll_interval_s=0.01)
        following = asyncio.create_task(registry.run())
        await asyncio.wait((following,), timeout=0.05)
        assert not following.done()
        assert not registry.ready
        models.write_repository(folder, {"a": models.add_one()})
        await following
        assert registry.ready
        assert registry.names() == ["a"]
        await registry.close()


async def test_the_end_does_not_wait_for_a_load(tmp_path: Path) -> None:
    backend = StuckBackend()
    models.write_repository(tmp_path, {"a": models.add_one()})
    async with RunnerPool(1) as runners:
        registry = Registry(ModelRepository(tmp_path), backend, runners)
        loading = asyncio.create_task(registry.run())
        await asyncio.to_thread(backend.begun.wait, 30)
        try:
            async with asyncio.timeout(10):
                loading.cancel()
                await asyncio.wait((loading,))
                await registry.close()
        finally:
            backend.may_end.set()


async def test_a_load_that_comes_before_the_first_look_is_kept(tmp_path: Path) -> None:
    models.write_repository(tmp_path, {"a": models.add_one()})
    async with asyncio.timeout(30), RunnerPool(1) as runners:
        registry = Registry(ModelRepository(tmp_path), OnnxBackend(), runners, control="explicit")
        await registry.load("a")
        await registry.run()
        assert registry.get("a").version == 1
        assert registry.ready
        await registry.close()
