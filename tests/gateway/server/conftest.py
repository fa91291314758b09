"""Edges that several files of this folder speak to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raw_edge import RunningEdge, running


@pytest.fixture(scope="module", params=["task", "fast"])
def edge(request: pytest.FixtureRequest) -> Iterator[RunningEdge]:
    """An edge that echoes, once with a task per request and once without."""
    with running(fast=(lambda _: True) if request.param == "fast" else None) as found:
        yield found
