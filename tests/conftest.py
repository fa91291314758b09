"""Fixtures that more than one part of the suite uses."""

from __future__ import annotations

import asyncio

# A policy that was never asked makes a loop on demand for whoever looks, and nobody closes it. pytest-asyncio and
# looptime look before each test; told that there is none, they leave it at that.
asyncio.set_event_loop(None)
