"""Work for a caller who may leave before it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope

from ..core.errors import CancelledByCallerError
from .infer import DISCONNECT_EXTENSION

_Result = TypeVar("_Result")


async def while_there(scope: Scope, receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What ``work`` gives. It is cancelled when the caller goes away.

    Args:
        receive: of a request whose body has been read.
    Raises:
        CancelledByCallerError: the caller went away first.
    """
    task = asyncio.ensure_future(work)
    register: Callable[[Callable[[], None]], Callable[[], None]] | None
    register = (scope.get("extensions") or {}).get(DISCONNECT_EXTENSION)
    watch: asyncio.Task[None] | None = None
    unregister: Callable[[], None] | None = None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    if register is not None:
        unregister = register(leave)
    else:
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(lambda done: None if done.cancelled() else leave())
    try:
        return await task
    except asyncio.CancelledError:
        if not gone:
            raise
        raise CancelledByCallerError("the caller went away before its answer was there") from None
    finally:
        if unregister is not None:
            unregister()
        rest = [other for other in (task, watch) if other is not None and not other.done()]
        for other in rest:
            other.cancel()
        if rest:
            await asyncio.wait(rest)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
