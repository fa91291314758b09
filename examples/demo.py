"""Two real models behind a gateway, called through the SDK: what `make demo` shows and `make serve` leaves running.

MiniLM turns sentences into vectors; a digits classifier is trained on the spot. The models are kept in .cache for the
next run; the database and the key in it are new each time and gone afterwards.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from inferway import Inferway

ROOT: Final = Path(__file__).resolve().parents[1]
MADE_MODELS: Final = Path(os.environ.get("INFERWAY_MODELS_DIR", ROOT / ".cache" / "inferway-models"))
HOME: Final = ROOT / ".cache" / "inferway-demo"
REPOSITORY: Final = HOME / "models"
TEST_IMAGES: Final = HOME / "digits-test.npz"
START_TIMEOUT_S: Final = 60

SENTENCES: Final = [
    "The cat sits on the mat.",
    "A feline rests on a rug.",
    "Shares fell sharply in early trading.",
    "The stock market had a bad morning.",
    "How do I reset my password?",
]
# Sentences of different lengths may share a run: they are padded, and their masks say what is padding.
MINILM_OPTIONS: Final = """\
[[batching.padding]]
inputs = { input_ids = 1, attention_mask = 1, token_type_ids = 1 }

[text]
long_text = "truncate"
"""
SHADES: Final = " ░▒▓█"

Array = NDArray[Any]


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def sh(*command: str | Path) -> str:
    """Run a command of the project and return what it printed; when it fails, show what it said and end."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\n$ {' '.join(map(str, command))}\nfailed, exit status {done.returncode}")
    return done.stdout


def place(model: str, onnx: Path, options: str = "") -> None:
    """Put a model into the repository as its version 1: NAME/1/model.onnx."""
    version = REPOSITORY / model / "1"
    version.mkdir(parents=True, exist_ok=True)
    target = version / "model.onnx"
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(onnx)
    except OSError:  # another file system
        shutil.copy(onnx, target)
    if options:
        (version.parent / "inferway.toml").write_text(options)


def make_minilm() -> None:
    started = time.perf_counter()
    built = sh(ROOT / "examples" / "models" / "make_models.py", MADE_MODELS, "--quiet", "--only", "minilm")
    place("minilm", MADE_MODELS / "minilm" / "model.onnx", MINILM_OPTIONS)
    shutil.copy(MADE_MODELS / "minilm" / "tokenizer.json", REPOSITORY / "minilm")  # makes /v1/embeddings answer
    done = f"built in {time.perf_counter() - started:.1f} s" if built else "kept from the last run"
    print(f"  minilm   sentences to vectors, 22 million weights      {done}", flush=True)


def make_digits() -> None:
    """Train a classifier of 8 x 8 digit images and export it with its labels."""
    if TEST_IMAGES.exists():
        print("  digits   images of 8 x 8 pixels to digits              kept from the last run", flush=True)
        return
    started = time.perf_counter()
    from skl2onnx import to_onnx
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.astype(np.float32), labels, random_state=0, stratify=labels
    )
    with threadpool_limits(1):  # more threads only get in each other's way with matrices this small
        classifier = MLPClassifier((64,), max_iter=400, random_state=0).fit(train_x, train_y)
    onnx = to_onnx(classifier, train_x[:1], options={"zipmap": False}, target_opset={"": 20, "ai.onnx.ml": 3})
    made = HOME / "digits.onnx"
    made.write_bytes(onnx.SerializeToString())
    place("digits", made)
    np.savez(TEST_IMAGES, images=test_x, labels=test_y)
    done = f"trained on {len(train_x)} images in {time.perf_counter() - started:.1f} s"
    print(f"  digits   images of 8 x 8 pixels to digits              {done}", flush=True)


def address(process: subprocess.Popen[bytes], log_file: Path) -> str | None:
    """Where the gateway listens, as it says in its log. None when it ends instead."""
    while True:
        ended = process.poll() is not None
        if found := re.search(r"Inferway listens on ([^\s\"]+)[\s\"]", log_file.read_text()):
            return found[1]
        if ended:
            return None
        time.sleep(0.02)


@contextmanager
def gateway(state: Path, key: str) -> Iterator[Inferway]:
    """A client of a new gateway on loopback that serves the repository. Port 8080, or another where that is taken."""
    log_file = state / "gateway.log"
    for port in (8080, 0):
        command = ["-m", "inferway_gateway", "serve", REPOSITORY, "--port", port, "--state-dir", state]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C is for this script, which then ends the gateway in order
            )
        try:
            if url := address(process, log_file):
                with Inferway(url, api_key=key) as client:
                    client.health.wait_until_ready(timeout=START_TIMEOUT_S)
                    yield client
                    return
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
    sys.exit(f"{log_file.read_text()}\nthe gateway did not start; its log is above")


def show_sentences(client: Inferway) -> None:
    tokenizer = Tokenizer.from_file(str(MADE_MODELS / "minilm" / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    ids = np.array([row.ids for row in encoded])
    mask = np.array([row.attention_mask for row in encoded])
    started = time.perf_counter()
    answer = client.infer("minilm", {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    took_ms = (time.perf_counter() - started) * 1e3
    vectors = answer["sentence_embedding"]
    heading(f'1. client.infer("minilm", …): which sentences mean the same? ({took_ms:.0f} ms for {len(ids)})\n')
    width = max(map(len, SENTENCES))
    print(" " * (width + 4) + "".join(f"{chr(65 + i):>6}" for i in range(len(ids))))
    alike = (vectors @ vectors.T).round(2) + 0.0  # no "-0.00"
    for i, (text, row) in enumerate(zip(SENTENCES, alike, strict=True)):
        print(f"  {chr(65 + i)} {text:{width}}" + "".join(f"{value:6.2f}" for value in row))


def draw(image: Array) -> list[str]:
    """An image of 64 values 0 to 16 as eight lines of text."""
    levels = np.rint(image.reshape(8, 8) / 16 * (len(SHADES) - 1)).astype(int)
    return ["".join(2 * SHADES[level] for level in row) for row in levels]


def show_digits(client: Inferway) -> None:
    test = np.load(TEST_IMAGES)
    images, labels = test["images"], test["labels"]
    model = client.model("digits")
    started = time.perf_counter()
    predicted = model.infer({"X": images})["label"]
    took_ms = (time.perf_counter() - started) * 1e3
    right = predicted == labels
    heading(f'2. client.model("digits").infer(…): which digits are these? ({took_ms:.1f} ms for {len(images)})\n')
    # Three that it reads and one that it does not.
    shown = [*np.flatnonzero(right)[:3], *np.flatnonzero(~right)[:1]]
    for lines in zip(*(draw(images[i]) for i in shown), strict=True):
        print(("  " + "  ".join(lines)).rstrip())
    verdicts = (f"read as {predicted[i]}" + ("" if right[i] else f", is {labels[i]}") for i in shown)
    print(("  " + "  ".join(f"{verdict:16}" for verdict in verdicts)).rstrip())
    print(f"\n  {right.sum()} of {len(images)} images that it has not seen before are read right: {right.mean():.1%}.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave the gateway running until Ctrl+C")
    args = parser.parse_args()
    started = time.perf_counter()
    HOME.mkdir(parents=True, exist_ok=True)

    print("Models", flush=True)
    make_minilm()
    make_digits()

    heading("Gateway")
    with TemporaryDirectory(prefix="state-", dir=HOME) as folder:
        state = Path(folder)
        create = ("keys", "create", "--name", "demo", "--scopes", "admin", "--quiet")
        key = sh("-m", "inferway_gateway", *create, "--state-dir", state).strip()
        booted = time.perf_counter()
        with gateway(state, key) as client:
            names = ", ".join(client.models.list())
            print(f"  {client.base_url} serves {names}; started in {time.perf_counter() - booted:.1f} s", flush=True)
            show_sentences(client)
            show_digits(client)
            if args.serve:
                with suppress(KeyboardInterrupt):
                    heading(HOW_TO_CALL.format(url=client.base_url, key=key))
                    signal.pause()
            else:
                print(f"\nDone in {time.perf_counter() - started:.1f} s. Next:\n{NEXT}", flush=True)
    return 0


HOW_TO_CALL: Final = """\
Running until Ctrl+C. In another terminal:

  export INFERWAY_BASE_URL={url}
  export INFERWAY_API_KEY={key}

  curl -H "X-API-Key: $INFERWAY_API_KEY" $INFERWAY_BASE_URL/v2/models/digits
  .venv/bin/python -c 'from inferway import Inferway; print(Inferway().model("digits").signature())'

The key is shown here only."""

NEXT: Final = """
  make serve                      leave the gateway running and call it with curl and the SDK
  docs/getting-started.md         serve a model of your own, in five minutes
  .venv/bin/inferway serve --help"""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the gateway too, whoever stops us
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
