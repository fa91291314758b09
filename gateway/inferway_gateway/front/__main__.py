"""A front process. Started by the owner alone, who says everything on the standard input."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final, cast

from ..http.application import is_inference
from ..http.logs import configure_logging
from ..server.policy import DrainPolicy
from ..server.serve import EdgeServer, run
from ..settings import Settings
from .application import create_front
from .processes import edge_limits, longest_body

logger = logging.getLogger("inferway.fronts")

_PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    """Serve until told to stop, or until the owner is gone."""
    config: dict[str, Any] = json.load(sys.stdin)
    _end_with(config["owner"])
    settings = Settings(**config["settings"])
    configure_logging(settings.log_format, settings.log_level)
    sys.setswitchinterval(2e-4)  # as in the owner: threads decode what is long
    servers: list[EdgeServer] = []

    def lost() -> None:
        logger.error("the process that holds the models is gone; this front ends")
        for server in servers:
            # The second time it does not wait for anybody: nothing can be answered any more.
            server.stop()
            server.stop()

    app = create_front(
        settings, line=Path(config["line"]), http=Path(config["http"]), token=config["token"], on_lost=lost
    )
    try:
        run(
            cast(Any, app),
            sockets=[socket.socket(fileno=number) for number in config["listeners"]],
            own_sockets=True,
            control=servers.append,
            limits=edge_limits(settings, share=settings.workers),
            drain=DrainPolicy(delay_s=settings.drain_delay_s, timeout_s=settings.drain_timeout_s),
            on_drain=app.begin_drain,
            stats=app.edge_stats,
            fast=is_inference,
            streamed=longest_body(settings),
        )
    except SystemExit:
        return 1
    return 0


def _end_with(owner: int) -> None:
    """Have the kernel end this process when the owner dies, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != owner:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
