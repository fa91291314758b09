"""Train, optimise, deploy, call: a Keras model of 1,000 inputs on its way into service.

What is Keras's own is written as ever. `model = inferway.wrap(model)` adds two calls that no framework has, `optimize`
and `deploy`. The gateway is the one that INFERWAY_BASE_URL names; without that one is started here and stopped again.

    python examples/train_optimize_deploy.py
    KERAS_BACKEND=tensorflow python examples/train_optimize_deploy.py
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
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Keras imports TensorFlow where it is installed, and that talks

import keras
import numpy as np
from keras.layers import Dense
from keras.optimizers import Adam
from numpy.typing import NDArray
from sklearn.datasets import make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import scale

import inferway

FEATURES: Final = 1000
PATIENCE_S: Final = 60

Array = NDArray[Any]


def signals(rows: int) -> list[Array]:
    """Two kinds of signals in noise, told by 60 of 1,000 numbers: rows to train on and to hold out, and their kinds."""
    x, y = make_classification(
        rows * 5 // 4, FEATURES, n_informative=60, n_redundant=0, n_clusters_per_class=1, flip_y=0.01, random_state=0
    )
    parts: list[Array] = train_test_split(scale(x).astype("float32"), y, test_size=0.2, random_state=0)
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, metavar="N", help="rows to train on (default: 4000)")
    args = parser.parse_args()
    x_train, x_test, y_train, y_test = signals(args.rows)
    keras.utils.set_random_seed(0)

    heading(f"Train: Keras {keras.version()} on {keras.backend.backend()}, {len(x_train)} rows of {FEATURES} numbers")
    model = keras.Sequential()
    model.add(keras.Input(shape=(FEATURES,)))
    model.add(Dense(128, activation="relu"))
    model.add(Dense(64, activation="relu"))
    model.add(Dense(1, activation="sigmoid"))
    model = inferway.wrap(model)  # the one line that is not Keras's
    model.compile(optimizer=Adam(0.001), loss="binary_crossentropy", metrics=["accuracy"])
    history = model.fit(x_train, y_train, epochs=10, batch_size=32, validation_data=(x_test, y_test), seed=0)
    print(history)

    heading("Optimise: model.optimize()")
    report = model.optimize()
    print(report.table())

    with gateway() as where:
        heading(f"Deploy: model.deploy(), to {where}")
        with model.deploy() as deployed:
            print(f"{deployed.name} version {deployed.version}: {deployed.deployment.state}")

            heading("Call: deployed.predict(x)")
            answers = deployed.predict(x_test)
            expected = model.predict(x_test, verbose=0)
            here = report.model.predict(x_test)
            same = np.mean((answers > 0.5) == (expected > 0.5))
            print(f"{len(answers)} rows went through the gateway and {same:.1%} of them were decided as Keras decides.")
            print(f"Largest difference of a probability: {np.abs(answers - expected).max():.4f} to Keras, "
                  f"{np.abs(answers - here).max():.6f} to the optimised model run here.")  # fmt: skip
            accuracy = np.mean((answers[:, 0] > 0.5) == y_test)
            print(f"Accuracy on held-out rows: Keras {model.evaluate(x_test, y_test, verbose=0)[1]:.4f}, "
                  f"deployed {accuracy:.4f}")  # fmt: skip

    heading("Before and after")
    show(report)
    return 0


def show(report: Any) -> None:
    """Size, time and accuracy of the exported model and of the chosen one, as `optimize` measured them."""
    width = len(f"after: {report.chosen.name}")
    print(f"{'':{width}} {'size':>10} {'batch 1':>10} {'batch 64':>10} {'accuracy':>9}")
    for label, candidate in (("before", report.original), (f"after: {report.chosen.name}", report.chosen)):
        times = [f"{candidate.timings[batch].seconds * 1e6:.1f} µs" for batch in (1, 64)]
        size = f"{candidate.size_bytes / 1e3:.0f} kB"
        print(f"{label:{width}} {size:>10} {times[0]:>10} {times[1]:>10} {candidate.metric:>9.4f}")


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


@contextmanager
def gateway() -> Iterator[str]:
    """The address of the gateway that is configured; without one, of a new one that ends with this."""
    if configured := os.environ.get("INFERWAY_BASE_URL"):
        yield configured
        return
    with TemporaryDirectory(prefix="inferway-") as folder:
        state = Path(folder)
        command = [sys.executable, "-m", "inferway_gateway"]
        create = [*command, "keys", "create", "--name", "me", "--scopes", "admin", "--quiet", "--state-dir", folder]
        key = subprocess.run(create, check=True, capture_output=True, text=True).stdout.strip()
        log = state / "gateway.log"
        with log.open("wb") as file:
            serve = [*command, "serve", "--port", "0", "--state-dir", folder]
            process = subprocess.Popen(
                serve, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            os.environ["INFERWAY_BASE_URL"] = where = address(process, log)
            os.environ["INFERWAY_API_KEY"] = key
            yield where
        finally:
            for name in ("INFERWAY_BASE_URL", "INFERWAY_API_KEY"):
                os.environ.pop(name, None)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the gateway listens, as it says in its log."""
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        if found := re.search(r"Inferway listens on ([^\s\"]+)[\s\"]", log.read_text()):
            with inferway.Inferway(found[1]) as client:
                client.health.wait_until_ready(timeout=PATIENCE_S)
            return found[1]
        time.sleep(0.02)
    sys.exit(f"{log.read_text()}\nthe gateway did not start; its log is above")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the gateway too, whoever stops us
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
