"""Three scikit-learn classifiers of 8 x 8 digit images: logistic regression, a small MLP, a random forest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .graph import open_session


def make(out: Path) -> dict[str, Any]:
    from skl2onnx import to_onnx
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.astype(np.float32), labels, random_state=0, stratify=labels
    )
    models = {
        "logreg": make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        "mlp": MLPClassifier((64,), max_iter=400, random_state=0),
        "forest": RandomForestClassifier(50, random_state=0),
    }
    accuracy = {}
    for name, model in models.items():
        # The order of sums, and so the last bits of the weights, depends on how many threads there are; one is also
        # four times as fast for matrices this small when the machine is busy.
        with threadpool_limits(1):
            model.fit(train_x, train_y)
        proto = to_onnx(model, train_x[:1], options={"zipmap": False}, target_opset={"": 20, "ai.onnx.ml": 3})
        (out / f"{name}.onnx").write_bytes(proto.SerializeToString())
        accuracy[name] = round(float(model.score(test_x, test_y)), 4)
    np.savez(out / "test.npz", x=test_x, y=test_y)
    return {"accuracy": accuracy, "license": "BSD-3-Clause (scikit-learn; UCI digits data CC BY 4.0)"}


def check(out: Path) -> None:
    data = np.load(out / "test.npz")
    for name in ("logreg", "mlp", "forest"):
        session = open_session(out / f"{name}.onnx")
        label = session.run(None, {session.get_inputs()[0].name: data["x"]})[0]
        accuracy = (label == data["y"]).mean()
        assert accuracy > 0.95, f"{name}: {accuracy}"
