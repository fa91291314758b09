"""Metrics of text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.encoding import TextStats

Encoders = Callable[[], Iterable[tuple[str, int, TextStats]]]


class TextMetrics(Collector):
    """
    Args:
        encoders: gives name, version and counters of each text encoder that is loaded.
    """

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self.sees: Callable[[str], bool] = lambda _: True

    def collect(self) -> Iterator[Metric]:
        labels = ("model", "version")
        texts = CounterMetricFamily("inferway_texts", "Texts that were embedded, ranked or classified.", labels=labels)
        tokens = CounterMetricFamily(
            "inferway_text_tokens", "Tokens of texts that encoders read, without padding.", labels=labels
        )
        shortened = CounterMetricFamily(
            "inferway_texts_shortened", "Texts longer than the model takes, by what was done.", labels=(*labels, "how")
        )
        for name, version, stats in self._encoders():
            if not self.sees(name):
                continue
            values = (name, str(version))
            texts.add_metric(values, stats.texts)
            tokens.add_metric(values, stats.tokens)
            shortened.add_metric((*values, "cut"), stats.truncated)
            shortened.add_metric((*values, "parts"), stats.chunked)
        yield from (texts, tokens, shortened)
