from __future__ import annotations

import threading

from inferway_gateway.backends.worker.keeper import Keeper

LIMIT_S = 10.0


def test_what_is_due_first_is_called_first_and_errors_stop_nothing() -> None:
    order: list[str] = []
    done = threading.Event()

    def fails() -> None:
        order.append("fails")
        raise RuntimeError("a defect")

    with Keeper() as keeper:
        keeper.after(0.10, done.set)
        keeper.after(0.05, lambda: order.append("second"))
        keeper.after(0.0, fails)
        assert done.wait(LIMIT_S)
    assert order == ["fails", "second"]


def test_what_is_done_every_so_often_ends_when_it_says_so() -> None:
    calls: list[int] = []
    done = threading.Event()

    def count() -> bool:
        calls.append(1)
        if len(calls) == 3:
            done.set()
        return len(calls) < 3

    with Keeper() as keeper:
        keeper.every(0.0, count)
        assert done.wait(LIMIT_S)
        settled = threading.Event()
        keeper.after(0.05, settled.set)
        assert settled.wait(LIMIT_S)
    assert len(calls) == 3
