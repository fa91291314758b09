"""Encode texts over and over with sentence-transformers: windows are asked for on standard input, one a line.

    python encode.py MODEL TEXTS.json THREADS

Each line is a number of texts that are handed to ``encode`` together, its ``batch_size``, and a number of seconds; the
answer is a line of JSON: texts encoded, seconds that this took, processor seconds.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer


def main() -> None:
    model_path, texts_path, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = SentenceTransformer(model_path, device="cpu")
    texts = json.loads(Path(texts_path).read_text())
    print(json.dumps({"ready": True, "vector": model.encode(texts[:1])[0].tolist()}), flush=True)
    for line in sys.stdin:
        window, batch, seconds = line.split()
        groups = itertools.cycle(texts[i : i + int(window)] for i in range(0, len(texts), int(window)))
        done, started, used = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started < float(seconds):
            done += len(model.encode(next(groups), batch_size=int(batch)))
        took = time.perf_counter() - started
        print(json.dumps({"texts": done, "s": took, "cpu_s": time.process_time() - used}), flush=True)


if __name__ == "__main__":
    main()
