"""What `inferway.optimize` gains on MiniLM and on a small convolutional net, at a batch of 32, and what it costs.

    python tests/bench/bench_optimize.py [--rounds 7] [--only minilm,cnn] [--plots FOLDER] [--json FILE]

MiniLM is measured on sentences of the project's own guides, cut or padded to 32 tokens: a quarter calibrates, the rest
is compared with the original's embeddings by cosine; how many keep their nearest neighbour among the others is told
beside it. The net is trained here, in half a minute at most, on scikit-learn's digits: ONNX alone, and with
structured pruning, which trains again. Rounds, turns and noise are those of the optimisation itself.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from harness.paths import ROOT
from harness.workloads import make_models, models_dir
from numpy.typing import NDArray

from inferway import OptimizationReport, optimize

BATCH: Final = 32
WANTED: Final = 1.8
TOKENS: Final = 32
SENTENCES: Final = 240


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times each candidate is timed (%(default)s)")
    parser.add_argument("--only", default="minilm,cnn", help="comma-separated (%(default)s)")
    parser.add_argument("--plots", type=Path, help="folder for pictures")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    benches: dict[str, Callable[[int], Mapping[str, OptimizationReport]]] = {"minilm": minilm, "cnn": cnn}
    reports: dict[str, OptimizationReport] = {}
    for name in options.only.split(","):
        reports.update(benches[name](max(3, options.rounds)))
    print("\nAgainst the figures that the project set itself:")
    for name, report in reports.items():
        timing = report.chosen.timings[BATCH]
        verdict = "reached" if report.changed and timing.speedup >= WANTED else "NOT reached"
        print(
            f"  {name}: {report.chosen.name}, {timing.speedup:.2f} (±{timing.spread:.0%}) times as fast at batch "
            f"{BATCH} (wanted ≥ {WANTED}) {verdict}; {report.metric_name} {report.original.metric:.4f} → "
            f"{report.chosen.metric:.4f}, at most {report.max_drop:g} may be lost"
        )
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
            report.plot(str(options.plots / f"{name.partition(' ')[0]}-{len(name)}.png"))
    if options.json:
        options.json.write_text(json.dumps({name: report.as_dict() for name, report in reports.items()}, indent=1))
    return 0


def minilm(rounds: int) -> Mapping[str, OptimizationReport]:
    make_models()
    folder = models_dir() / "minilm"
    rows = _sentences(folder / "tokenizer.json")
    report = optimize(folder / "model.onnx", rows, batch_sizes=(1, 8, BATCH), rounds=rounds, on_progress=_tell())
    _show("MiniLM, ONNX alone", report)
    best = _vectors(report.original.model, rows)
    print("\nSentences that keep their nearest neighbour:")
    for candidate in report.measured[1:]:
        kept = np.mean(_nearest(_vectors(candidate.model, rows)) == _nearest(best))
        print(f"  {candidate.name:26}{kept:.3f}")
    return {"minilm": report}


def cnn(rounds: int) -> Mapping[str, OptimizationReport]:
    import torch
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_digits()
    images = (data.data / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))
    trained, held_out = order[:1200], order[1200:]
    x, y = torch.tensor(images[trained]), torch.tensor(data.target[trained])

    def train(net: Any, epochs: int = 3) -> None:
        net.train()
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(epochs):
            for start in range(0, len(x), 32):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x[start : start + 32]), y[start : start + 32]).backward()
                optimizer.step()
        net.eval()

    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(1024, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10),
    )  # fmt: skip
    train(net, epochs=6)
    found = {}
    common: dict[str, Any] = {
        "calibration": images[trained], "batch_sizes": (1, 8, BATCH, 64), "rounds": rounds, "on_progress": _tell(),
    }  # fmt: skip
    labelled = (images[held_out], data.target[held_out])
    alone = ["graph", "static_int8", "fp16"]
    # The objective is the largest batch; the bar is one of 32, at which the report has its timings as well.
    found["cnn (quantised alone)"] = optimize(net, labelled, techniques=alone, **common)
    _show("CNN on digits, without training again", found["cnn (quantised alone)"])
    found["cnn (pruned as well)"] = optimize(net, labelled, fine_tune=train, **common)
    _show("CNN on digits, with structured pruning", found["cnn (pruned as well)"])
    return found


def _show(title: str, report: OptimizationReport) -> None:
    print(f"\n{title}\n{'-' * len(title)}\n{report}", flush=True)


def _tell() -> Callable[[str], object]:
    import sys

    started = time.perf_counter()
    return lambda words: print(f"  {time.perf_counter() - started:4.0f} s  {words}", file=sys.stderr, flush=True)


def _sentences(tokenizer: Path) -> dict[str, NDArray[np.int64]]:
    """Token ids of the guides' sentences; the same ones each time the guides are the same."""
    from tokenizers import Tokenizer

    text = " ".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    text = re.sub(r"```.*?```|\[|\]\([^)]*\)|[`*|]", " ", text, flags=re.DOTALL)
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text))
    found = [part for part in parts if 30 < len(part) < 200]
    step = max(1, len(found) // SENTENCES)
    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(TOKENS)
    encoder.enable_padding(length=TOKENS)
    encoded = encoder.encode_batch(found[::step][:SENTENCES])
    ids = np.array([row.ids for row in encoded])
    mask = np.array([row.attention_mask for row in encoded])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _vectors(model: Any, rows: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    parts = [
        model.run({name: array[i : i + BATCH] for name, array in rows.items()}) for i in range(0, SENTENCES, BATCH)
    ]
    return np.concatenate([next(iter(part.values())) for part in parts])


def _nearest(vectors: NDArray[np.float32]) -> NDArray[np.intp]:
    close = vectors @ vectors.T
    np.fill_diagonal(close, -np.inf)
    return np.asarray(close.argmax(axis=1))


if __name__ == "__main__":
    raise SystemExit(main())
