"""The threads on which sessions run, shared by all models."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class RunnerPool:
    """As many threads as the process may use processors; ``async with`` opens and closes it."""

    def __init__(self, threads: int | None = None) -> None: ...

    async def __aenter__(self) -> Self:
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError
