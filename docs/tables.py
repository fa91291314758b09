"""The tables of the guides that come from the code. cog, in `make docs`, puts them between the marks in the pages."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic_core import PydanticUndefined

from inferway_contract.codes import ERRORS
from inferway_gateway.__main__ import _parser
from inferway_gateway.core.budget import MemoryBudget
from inferway_gateway.core.catalog import AliasRecord, AliasSpec, Shadow
from inferway_gateway.core.encoding import TextStats
from inferway_gateway.core.generation import GenerationStats
from inferway_gateway.core.routing import Router
from inferway_gateway.core.stats import Histogram, ModelStats
from inferway_gateway.core.upstream import EndpointStats, UpstreamStats
from inferway_gateway.http.alias_metrics import AliasMetrics
from inferway_gateway.http.budget_metrics import BudgetMetrics
from inferway_gateway.http.elsewhere_metrics import Elsewhere
from inferway_gateway.http.generation_metrics import GenerationMetrics
from inferway_gateway.http.metrics import Metrics
from inferway_gateway.http.text_metrics import TextMetrics
from inferway_gateway.server.policy import EdgeStats
from inferway_gateway.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    # Blank lines on both sides: not every viewer takes a table that touches a comment.
    return "\n" + "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def words(text: str | None) -> str:
    """A docstring in one line, with Markdown's marks for code."""
    return " ".join((text or "").replace("``", "`").split())


def serve_options() -> dict[str, str]:
    """Setting to the option of ``inferway serve`` that sets it."""
    _, commands = _parser()
    actions = commands.choices["serve"]._actions
    return {a.dest: a.option_strings[0] if a.option_strings else str(a.metavar) for a in actions if a.dest != "help"}


def default_of(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "see right"
    value = field.default
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


def settings() -> str:
    options = serve_options()
    rows = (
        (
            f"`INFERWAY_{name.upper()}`",
            f"`{options[name]}`" if name in options else "",
            default_of(field),
            words(field.description),
        )
        for name, field in Settings.model_fields.items()
    )
    return table(("in the environment", "option", "default", "meaning"), rows)


def routes() -> str:
    contract: dict[str, Any] = yaml.safe_load((ROOT / "openapi" / "inferway.yaml").read_text())
    rows = []
    for path, methods in contract["paths"].items():
        for method, operation in methods.items():
            if method == "parameters":
                continue
            scopes = operation.get("x-required-scopes")
            who = "anybody" if scopes is None else " or ".join(f"`{scope}`" for scope in scopes) or "any key"
            rows.append((f"`{method.upper()} {path}`", who, operation["summary"].rstrip(".")))
    return table(("route", "scope", "what it does"), rows)


def codes() -> str:
    rows = (
        (str(kind.status), f"`{kind.code}`", "yes" if kind.retryable else "no", kind.title) for kind in ERRORS.values()
    )
    return table(("status", "code", "try again", "meaning"), rows)


def metrics(prefix: str) -> str:
    """Every metric of that prefix that a gateway shows which has served a model of each kind."""
    stats = ModelStats()
    stats.ran(1, 0.0, 0.0, 0.0)
    stats.finished(0.0, "internal")
    edge = EdgeStats(refused={"headers_too_large": 1}, expired={"header": 1})
    shown = Metrics(lambda: [("iris", 1, stats, True)], edge)
    shown.http_request("/v2", 200)
    router = Router()
    spec = AliasSpec({1: 100}, shadow=Shadow(2))
    router.update([AliasRecord("iris", "stable", spec, None, 1, datetime.now(UTC), "gateway")])
    shown.add(AliasMetrics(router.aliases))
    upstream = UpstreamStats("other", [EndpointStats("other.example:8000")])
    shown.add(Elsewhere(lambda: [upstream], lambda: [("inch-iris", 1, {"classify": Histogram()})]))
    shown.add(BudgetMetrics(MemoryBudget(1)))
    shown.add(GenerationMetrics(lambda: [("tiny-llm", 1, GenerationStats())]))
    shown.add(TextMetrics(lambda: [("sentences", 1, TextStats())]))
    text, _ = shown.render("")
    rows = []
    for family in sorted(text_string_to_metric_families(text.decode()), key=lambda family: family.name):
        if family.name.startswith(prefix) and not family.name.endswith("_created"):
            name = family.name + "_total" * (family.type == "counter")
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            rows.append((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation))
    return table(("metric", "type", "labels", "meaning"), rows)
