"""Ray, found or started, and what a training needs of it: reserved within a time, or refused.

What is set here and why (Ray 2.60):

- A Ray that is started here listens on the machine's own address, not on loopback only (Ray replaces 127.0.0.1), and
  whoever can call it can run code. So it gets token authentication with a token of its own that is written nowhere.
  Left alone, Ray would leave one in the home folder that everybody on the machine can read.
- To a Ray that is there already the token comes from the environment, ``RAY_AUTH_TOKEN`` or ``RAY_AUTH_TOKEN_PATH``;
  Ray looks at neither unless ``RAY_AUTH_MODE`` says so too.
- No usage statistics, no dashboard, and never ``ray stop``, which ends every Ray of the machine.
- Ray waits for resources without limit; a placement group that did not come about in time is an error here.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from .._errors import ConfigurationError, InsufficientResourcesError, MissingExtraError, TrainingError

OBJECT_STORE_BYTES: Final = 1 << 30
"""Of a Ray that is started here. Ray's own default is 30 % of the memory; what does not fit goes to disk."""

CONNECT_S: Final = 10.0

_STARTED: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would otherwise say at every start that it is going to change what it hides GPUs from.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray.

    Attributes:
        started: whether this Ray was started for it, and ends with it.
        nodes: machines of the cluster at the moment of connecting.
    """

    started: bool
    nodes: int


@contextmanager
def connect(
    address: str | None = None, *, cpus: float | None = None, object_store_bytes: int = OBJECT_STORE_BYTES
) -> Iterator[Session]:
    """Use the Ray that this process is connected to; else connect to one, or start one, and leave it at the end.

    Args:
        address: None: a Ray of this machine, that ends with the block. ``auto``: the one that ``RAY_ADDRESS`` or this
            machine's ``ray start`` names. Else ``host:port``, or ``ray://host:10001`` from outside of the cluster.
        cpus: processors that a Ray started here says it has; None: those that there are. More than there are is
            allowed: they are shared.
        object_store_bytes: shared memory of a Ray started here.
    Raises:
        MissingExtraError: Ray is not installed.
        ConfigurationError: there is no Ray at the address, or it did not take the token.
        TrainingError: Ray did not start here, as on a machine that is too busy.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "ray", "Training over several processes") from error
    if ray.is_initialized():
        yield Session(False, len(_alive()))
        return
    with _environment(_settings(address)):
        if address is None:
            try:
                ray.init(
                    "local",
                    num_cpus=None if cpus is None else int(-(-cpus // 1)),
                    object_store_memory=object_store_bytes,
                    include_dashboard=False,
                    configure_logging=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            except Exception as error:  # Ray gives itself 30 s, and then raises no narrower one
                raise TrainingError(
                    f"Ray did not start on this machine: {error} Where processors or memory are taken by others, wait "
                    "for them, or use a Ray that runs already, with address='auto'"
                ) from error
        else:
            _knock(address)
            try:
                ray.init(address, configure_logging=False, log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, ray.exceptions.RayError, RuntimeError) as error:
                raise ConfigurationError(
                    f"no Ray could be reached at '{address}': {error}. A cluster with authentication wants its token "
                    "in RAY_AUTH_TOKEN"
                ) from error
        try:
            yield Session(address is None, len(_alive()))
        finally:
            ray.shutdown()


@contextmanager
def reserve(bundles: Sequence[Mapping[str, float]], *, timeout_s: float, strategy: str = "PACK") -> Iterator[Any]:
    """A placement group, and everything that runs in it, for as long as the block lasts.

    Args:
        bundles: resources that have to be on one machine each, by Ray's names.
        timeout_s: how long to wait for all of them together.
        strategy: Ray's: ``PACK``, ``SPREAD``, ``STRICT_PACK``, ``STRICT_SPREAD``.
    Raises:
        InsufficientResourcesError: they did not all come in time.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
    try:
        if not group.wait(timeout_s):
            wanted = _sum(bundles)
            total, free = _sum(node["Resources"] for node in _alive()), ray.available_resources()
            named = {name: (float(total.get(name, 0)), float(free.get(name, 0))) for name in wanted}
            has = ", ".join(f"{name}: {all_:g}, {left:g} of them free" for name, (all_, left) in named.items())
            largest = max(bundles, key=lambda bundle: sum(bundle.values()))
            raise InsufficientResourcesError(
                f"{_said(wanted)} in {len(bundles)} parts of up to {_said(largest)} did not come together in "
                f"{timeout_s:g} s; the cluster's {len(_alive())} nodes have {has}",
                wanted=wanted,
                available={name: left for name, (_, left) in named.items()},
            )
        yield group
    finally:
        remove_placement_group(group)


def _knock(address: str) -> None:
    """See that somebody is there: Ray would try for minutes."""
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if not found or not port.isdecimal():
        return  # "auto", or a name for Ray to look up
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConfigurationError(f"no Ray could be reached at '{address}': {error}") from error


def _sum(parts: Any) -> dict[str, float]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return {name: float(amount) for name, amount in total.items()}


def _said(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _settings(address: str | None) -> dict[str, str]:
    if address is None:
        return {**_STARTED, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    return {"RAY_AUTH_MODE": "token"} if named and "RAY_AUTH_MODE" not in os.environ else {}


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set these for the block. Ray keeps what it once read, so it is told to look again, before and after."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    # Not public in Ray; its own way of turning authentication on after the import is the same two calls.
    from ray import _raylet

    raylet: Any = _raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
