"""How long it is told who did what: events, and deployments that have ended, grow old and are forgotten.

What is, is not history: versions, with who made them, and where aliases point stay whatever is forgotten here.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from ..core.errors import GatewayError
from .catalog import Forgotten, SqlCatalog

_log = logging.getLogger("inferway.store")

FORGET_INTERVAL_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class HistoryLimits:
    """What is kept of the past.

    Attributes:
        age_s: seconds for which an event, and a deployment after its end, is kept.
        per_model: the most events of one model, and the most of its ended deployments; the youngest stay.
    """

    age_s: float = 365 * 86_400.0
    per_model: int = 10_000


async def forget_history(catalog: SqlCatalog, limits: HistoryLimits) -> Forgotten:
    """Forget what is beyond the limits. Deployments that run are left alone.

    Raises:
        StoreUnavailableError: what was forgotten by then stays so.
    """
    return await catalog.forget_history(catalog.now() - timedelta(seconds=limits.age_s), limits.per_model)


async def keep_short(catalog: SqlCatalog, limits: HistoryLimits, interval_s: float = FORGET_INTERVAL_S) -> None:
    """Forget now and every so often, until cancelled."""
    while True:
        try:
            forgotten = await forget_history(catalog, limits)
        except GatewayError as error:
            _log.warning("forgetting old events failed: %s", error)
        except Exception:  # the next one may do better
            _log.exception("forgetting old events failed")
        else:
            if forgotten != Forgotten(0, 0):
                _log.info("forgot %d events and %d deployments that ended", *forgotten)
        await asyncio.sleep(interval_s)
