"""Metrics of language models: how fast text comes, how much of it, and what memory keys and values take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.generation import STEPS_BOUNDS, TOKEN_SECONDS_BOUNDS, GenerationStats
from .metrics import buckets

Generators = Callable[[], Iterable[tuple[str, int, GenerationStats]]]

_LABELS: Final = ("model", "version")
_FIRST_TOKEN_BOUNDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_COUNTERS: Final = (
    ("requests", "requests", "Answers that were asked for."),
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts."),
    ("cached_tokens", "cached_tokens", "Tokens of prompts whose keys and values were known already."),
    ("completion_tokens", "completion_tokens", "Tokens of answers."),
    ("prefix_hits", "prefix_hits", "Prompts of which a part was known already."),
    ("steps", "steps", "Steps of the engine, each a token for every running answer."),
    ("cancelled", "cancelled", "Answers whose caller left before their end."),
)
_GAUGES: Final = (
    ("running", "running", "Answers that have a place, prompts that are being read among them."),
    ("waiting", "waiting", "Requests that wait for a place."),
    ("kv_bytes", "kv_bytes", "Keys and values in use, those of remembered prompts among them, which give way."),
    ("kv_limit_bytes", "kv_limit_bytes", "Room for keys and values."),
)


class GenerationMetrics(Collector):
    """
    Args:
        generators: gives name, version and counters of each language model that is loaded.
    """

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self.sees: Callable[[str], bool] = lambda _: True

    def collect(self) -> Iterator[Metric]:
        prefix = "inferway_generation_"
        counters: list[tuple[CounterMetricFamily | GaugeMetricFamily, str]]
        counters = [(CounterMetricFamily(prefix + n, text, labels=_LABELS), a) for n, a, text in _COUNTERS]
        gauges: list[tuple[CounterMetricFamily | GaugeMetricFamily, str]]
        gauges = [(GaugeMetricFamily(prefix + n, text, labels=_LABELS), a) for n, a, text in _GAUGES]
        finished = CounterMetricFamily(
            prefix + "finished",
            "Answers that came to their end: stop where the model or a stop string ended them, length at a limit.",
            labels=(*_LABELS, "reason"),
        )
        first = HistogramMetricFamily(
            prefix + "first_token_seconds", "From a request's arrival to its answer's first token.", labels=_LABELS
        )
        each = HistogramMetricFamily(prefix + "token_seconds", "Between two tokens of an answer.", labels=_LABELS)
        freed = HistogramMetricFamily(
            prefix + "freed_after_steps", "Steps between a caller's leaving and its place's being free.", labels=_LABELS
        )
        for name, version, stats in self._generators():
            if not self.sees(name):
                continue
            values = (name, str(version))
            for family, attribute in (*counters, *gauges):
                family.add_metric(values, getattr(stats, attribute))
            for reason, count in stats.finished.items():
                finished.add_metric((*values, reason), count)
            for histogram, seconds, bounds in (
                (first, stats.first_token, _FIRST_TOKEN_BOUNDS),
                (each, stats.per_token, TOKEN_SECONDS_BOUNDS),
                (freed, stats.freed_after_steps, STEPS_BOUNDS),
            ):
                histogram.add_metric(values, buckets(seconds, bounds), sum_value=seconds.sum)
        yield from (family for family, _ in (*counters, *gauges))
        yield from (finished, first, each, freed)
