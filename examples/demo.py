"""Three real models, deployed and called through the SDK: what `make demo` shows and `make serve` leaves running.

A digits classifier is trained on the spot, MiniLM turns sentences into vectors, SmolLM2 chats. The models are kept in
.cache for the next run; the gateway's state and the key in it are new each time and gone afterwards.
"""

from __future__ import annotations

import argparse
import os
import re
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

from inferway import Inferway

ROOT: Final = Path(__file__).resolve().parents[1]
MADE_MODELS: Final = Path(os.environ.get("INFERWAY_MODELS_DIR", ROOT / ".cache" / "inferway-models"))
HOME: Final = ROOT / ".cache" / "inferway-demo"
DIGITS: Final = HOME / "digits.onnx"
TEST_IMAGES: Final = HOME / "digits-test.npz"
START_TIMEOUT_S: Final = 60

SENTENCES: Final = [
    "The cat sits on the mat.",
    "A feline rests on a rug.",
    "Shares fell sharply in early trading.",
    "The stock market had a bad morning.",
    "How do I reset my password?",
]
INSTRUCTION: Final = "Answer in one or two short sentences."
QUESTION: Final = "What is photosynthesis?"
WIDTH: Final = 92
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


def make(model: str, about: str) -> None:
    """Build a model by its recipe in examples/models, unless it is there."""
    started = time.perf_counter()
    built = sh(ROOT / "examples" / "models" / "make_models.py", MADE_MODELS, "--quiet", "--only", model)
    done = f"built in {time.perf_counter() - started:.1f} s" if built else "kept from the last run"
    print(f"  {model:8} {about:45} {done}", flush=True)


def make_digits() -> None:
    """Train a classifier of 8 x 8 digit images and export it with its labels."""
    if TEST_IMAGES.exists() and DIGITS.exists():
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
    DIGITS.write_bytes(onnx.SerializeToString())
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
    """A client of a new gateway on loopback, without any model. Port 8080, or another where that is taken."""
    log_file = state / "gateway.log"
    for port in (8080, 0):
        command = ["-m", "inferway_gateway", "serve", "--port", port, "--state-dir", state]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The chat template of a deployed model is a program, which the operator of a gateway approves by name.
                env={**os.environ, "INFERWAY_APPROVE_TEMPLATES": "smollm2"},
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


def deploy(client: Inferway) -> None:
    heading("client.models.deploy(…): sent, checked, loaded in a process of its own, tried, put into service")
    models: tuple[tuple[str, Path, dict[str, Any]], ...] = (
        ("digits", DIGITS, {}),
        # Of a text that is longer than the model reads, it is to read the beginning.
        ("minilm", MADE_MODELS / "minilm", {"text": {"long_text": "truncate"}}),
        ("smollm2", MADE_MODELS / "smollm2", {}),
    )
    for name, model, config in models:
        started = time.perf_counter()
        deployment = client.models.deploy(model, name=name, config=config, progress=False)
        version = deployment.version_record
        assert version is not None
        size = sum(file.size for file in version.files) / 1e6
        took = time.perf_counter() - started
        print(f"  {name:8} version {version.version}, {size:6.1f} MB, {version.state} after {took:.1f} s", flush=True)


def show_sentences(client: Inferway) -> None:
    client.embed(SENTENCES[:1], model="minilm")  # the first run of a model is slower
    started = time.perf_counter()
    vectors = client.embed(SENTENCES, model="minilm")
    took_ms = (time.perf_counter() - started) * 1e3
    heading(f'2. client.embed(sentences, model="minilm"): which mean the same? ({took_ms:.0f} ms for {len(vectors)})\n')
    width = max(map(len, SENTENCES))
    print(" " * (width + 4) + "".join(f"{chr(65 + i):>6}" for i in range(len(vectors))))
    alike = (vectors @ vectors.T).round(2) + 0.0  # no "-0.00"
    for i, (text, row) in enumerate(zip(SENTENCES, alike, strict=True)):
        print(f"  {chr(65 + i)} {text:{width}}" + "".join(f"{value:6.2f}" for value in row))


def show_chat(client: Inferway) -> None:
    heading('3. client.chat.create(…, model="smollm2", stream=True): a small language model answers\n')
    messages = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": QUESTION},
    ]
    print(f"  You:     {QUESTION}\n  smollm2: ", end="", flush=True)
    started = time.perf_counter()
    first = 0.0
    column = 11
    with client.chat.create(messages, model="smollm2", stream=True, temperature=0, max_tokens=100) as stream:
        for piece in stream.text_stream:
            first = first or time.perf_counter()
            text = piece.replace("\n", " ")
            if column + len(text) > WIDTH and text.startswith(" "):
                print("\n          ", end="")
                column = 10
            print(text, end="", flush=True)
            column += len(text)
        answer = stream.get_final()
    tokens = answer.usage.completion_tokens if answer.usage else 0
    speed = (tokens - 1) / (time.perf_counter() - first)
    waited_ms = (first - started) * 1e3
    print(f"\n\n  {tokens} tokens, {speed:.0f} tokens/s, the first after {waited_ms:.0f} ms")


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
    heading(f'1. client.model("digits").infer(…): which digits are these? ({took_ms:.1f} ms for {len(images)})\n')
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
    make_digits()
    make("minilm", "sentences to vectors, 22 million weights")
    make("smollm2", "a language model, 135 million weights")

    heading("Gateway")
    with TemporaryDirectory(prefix="state-", dir=HOME) as folder:
        state = Path(folder)
        create = ("keys", "create", "--name", "demo", "--scopes", "admin", "--quiet")
        key = sh("-m", "inferway_gateway", *create, "--state-dir", state).strip()
        booted = time.perf_counter()
        with gateway(state, key) as client:
            print(f"  {client.base_url}, started in {time.perf_counter() - booted:.1f} s", flush=True)
            deploy(client)
            show_digits(client)
            show_sentences(client)
            show_chat(client)
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
  .venv/bin/inferway chat smollm2
  .venv/bin/python -c 'from inferway import Inferway; print(Inferway().model("digits").signature())'

The key is shown here only."""

NEXT: Final = """
  make serve                      leave the gateway running: call it with curl, chat with it
  docs/getting-started.md         serve a model of your own, in five minutes
  docs/sdk-text.md                chat, extract and embed from Python and in the terminal
  .venv/bin/inferway serve --help"""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the gateway too, whoever stops us
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
