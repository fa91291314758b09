"""What gateway and worker tell each other about a model, as JSON: how to open it, and what was found out.

The worker believes the gateway, so it reads an order as it is. What the gateway reads is in ``report``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from ...core.backend import Profile
from ...core.model_config import ModelConfig
from ...core.tensors import Signature

REPORT_BYTES: Final = 4 << 20
"""Room for an order and its report. A model with ten thousand inputs and outputs takes a third of it."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """Of the ``OnnxBackend`` in the worker; see there."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    cpus: int | None = None
    inline_threshold_s: float = 100e-6
    trial_budget_s: float = 1.0
    measure_budget_s: float = 0.5
    run_limit_s: float = 5.0
    trial_max_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Decided:
    """What the first opening found out, so that a later one needs neither trial nor measurement."""

    intra_op_threads: int
    disabled_optimizers: tuple[str, ...]
    batched: bool
    max_rows: int


@dataclass(frozen=True, slots=True)
class Order:
    """Open this model.

    Attributes:
        file: the ONNX file's name in the directory that was handed over; empty where the file itself was.
        files: descriptors that come after the model's, as paths of the configuration that stand for them.
        address_space_bytes: limit of the process; None leaves it.
        confine: lock the process in first.
        test_hooks: let a run be told to crash, for tests.
    """

    name: str
    version: int
    file: str
    config: ModelConfig
    backend: BackendOptions
    files: tuple[str, ...] = ()
    decided: Decided | None = None
    address_space_bytes: int | None = None
    confine: bool = True
    test_hooks: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """A model that was opened.

    Attributes:
        layers: of the sandbox, that hold.
        missing: layers that do not, with the reason.
    """

    signature: Signature
    profile: Profile
    decided: Decided
    layers: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


def write_order(order: Order) -> bytes:
    plain = asdict(replace(order, config=replace(order.config, raw={})))
    return json.dumps(plain).encode()


def read_order(raw: bytes) -> Order:
    """In the worker."""
    order: Order = _build(Order, json.loads(raw))
    return order


def _build(kind: Any, value: Any) -> Any:
    """A value of a type from what ``asdict`` and JSON made of it."""
    origin = get_origin(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], part) for name, part in value.items()})
    if origin is tuple:
        item = get_args(kind)[0]
        return tuple(_build(item, part) for part in value)
    if origin is dict:
        key, item = get_args(kind)
        return {int(name) if key is int else name: _build(item, part) for name, part in value.items()}
    if origin in (Union, UnionType) and value is not None:
        return _build(next(part for part in get_args(kind) if part is not NoneType), value)
    return value


def write_report(report: Report) -> bytes:
    """In the worker."""
    signature = report.signature
    plain = {
        "inputs": [_plain(spec) for spec in signature.inputs],
        "outputs": [_plain(spec) for spec in signature.outputs],
        "profile": _plain(report.profile),
        "decided": {**_plain(report.decided), "batched": signature.batched, "max_rows": signature.max_rows},
        "layers": report.layers,
        "missing": dict(report.missing),
    }
    return json.dumps(plain).encode()


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: _deep(getattr(value, f.name)) for f in fields(value) if f.init}


def _deep(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_deep(part) for part in value]
    return _plain(value) if is_dataclass(value) else value
