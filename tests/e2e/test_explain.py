"""Explaining models that a gateway serves: every kind of input, both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import inferway
import models
import text_models
from inferway import AsyncInferway, Inferway, ResponseEvent
from live import LiveGateway, run_gateway
from models import F32, ModelFiles, node, value

WEIGHTS = np.array([[1.0, -1.0], [2.0, 0.0], [-3.0, 0.5]], np.float32)
X = np.array([[1.0, 1.0, 1.0], [0.5, -2.0, 3.0]], np.float32)
BASE = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], np.float32)


def linear(weights: Any = WEIGHTS) -> bytes:
    """``x`` FP32 ``[batch, 3]`` to ``y`` FP32 ``[batch, 2]``, and ``best`` INT64 ``[batch]``."""
    return models.model(
        [node("MatMul", ["x", "w"], ["y"]), node("ArgMax", ["y"], ["best"], axis=1, keepdims=0)],
        [value("x", F32, ["batch", 3])],
        [value("y", F32, ["batch", 2]), value("best", onnx.TensorProto.INT64, ["batch"])],
        {"w": weights},
    )


def window() -> bytes:
    """``image`` FP32 ``[batch, 3, 16, 16]`` to ``sum`` FP32 ``[batch]``: of its upper left quarter."""
    mask = np.zeros((1, 3, 16, 16), np.float32)
    mask[..., :8, :8] = 1
    return models.model(
        [node("Mul", ["image", "mask"], ["seen"]), node("ReduceSum", ["seen", "axes"], ["sum"], keepdims=0)],
        [value("image", F32, ["batch", 3, 16, 16])],
        [value("sum", F32, ["batch"])],
        {"mask": mask, "axes": np.array([1, 2, 3])},
    )


def columns() -> bytes:
    """``age`` FP32 ``[batch, 1]`` and ``city`` BYTES ``[batch, 1]`` to ``risk`` FP32 ``[batch, 1]``."""
    return models.model(
        [
            node("LabelEncoder", ["city"], ["extra"], domain="ai.onnx.ml", keys_strings=["Bern", "Oslo"],
                 values_floats=[10.0, 20.0], default_float=0.0),
            node("Add", ["age", "extra"], ["risk"]),
        ],
        [value("age", F32, ["batch", 1]), value("city", onnx.TensorProto.STRING, ["batch", 1])],
        [value("risk", F32, ["batch", 1])],
        domains={"ai.onnx.ml": 3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("explain")
    embedder, scorer = text_models.embedder(), text_models.scorer(3, task="classify")
    models.write_repository(
        root / "models",
        {
            "linear": linear(),
            "window": window(),
            "columns": columns(),
            "embedder": ModelFiles({1: embedder.pop("model.onnx")}, files=embedder),
            "scorer": ModelFiles({1: scorer.pop("model.onnx")}, files=scorer),
        },
    )
    with run_gateway(root / "models", root / "state") as running:
        yield running


@pytest.fixture
def client(live: LiveGateway) -> Iterator[Inferway]:
    with Inferway(live.url, api_key=live.make_key("infer", "read", "deploy")) as opened:
        yield opened


def test_a_linear_model_rests_on_its_weights(client: Inferway) -> None:
    found = client.models.explain("linear", X, BASE)
    wanted = (X - BASE.mean(axis=0))[:, :, np.newaxis] * WEIGHTS
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    np.testing.assert_allclose(found.predictions, X @ WEIGHTS, atol=1e-6)
    assert found.output == "y"
    assert found.additivity_error < 1e-6
    assert found.feature_names == ("x[0]", "x[1]", "x[2]")


async def test_both_clients_and_a_models_handle_give_the_same(live: LiveGateway, client: Inferway) -> None:
    wanted = client.models.explain("linear", X, BASE, seed=4)
    assert np.array_equal(client.model("linear").explain(X, BASE, seed=4).values, wanted.values)
    async with AsyncInferway(live.url, api_key=live.admin_key) as other:
        one, two = await asyncio.gather(
            other.models.explain("linear", X, BASE, seed=4), other.model("linear").explain(X, BASE, seed=4)
        )
    assert np.array_equal(one.values, wanted.values)
    assert np.array_equal(two.values, wanted.values)


def test_columns_of_a_data_frame_are_explained_by_name(client: Inferway) -> None:
    pandas = pytest.importorskip("pandas")
    rows = pandas.DataFrame({"age": [30.0, 60.0], "city": ["Oslo", "Rome"]})
    usual = pandas.DataFrame({"age": [40.0], "city": ["Bern"]})
    found = client.models.explain("columns", rows, usual)
    np.testing.assert_allclose(found.to_frame(), [[-10.0, 10.0], [20.0, -10.0]], atol=1e-6)
    assert "city = Oslo  +10" in str(found)


def test_the_part_of_an_image_that_matters_is_found(client: Inferway) -> None:
    image = np.ones((1, 3, 16, 16), np.float32)
    found = client.models.explain("window", image, 0.0, permutations=1)
    grid = found.values[0].reshape(8, 8)
    np.testing.assert_allclose(grid[:4, :4], 3 * 2 * 2, atol=1e-4)
    assert np.abs(grid[4:]).max() < 1e-4


def test_words_of_a_text_are_explained_by_what_the_model_is_for(client: Inferway) -> None:
    text = "the cat sat"
    found = client.models.explain("scorer", text)
    scores = client.classify([text], model="scorer").results[0].scores
    assert found.output_names == tuple(sorted(scores))
    np.testing.assert_allclose(found.predictions[0], [scores[label] for label in sorted(scores)], atol=1e-6)
    assert found.additivity_error < 1e-6
    meaning = client.models.explain("embedder", text, reference="a cat", mask="dog")
    own, other = client.embed([text, "a cat"], model="embedder").astype(np.float64)
    assert meaning.predictions[0] == pytest.approx(own @ other / np.linalg.norm(own) / np.linalg.norm(other), abs=1e-6)
    assert meaning.feature_names == ("the", "cat", "sat")
    assert meaning.rows_sent > 3


def test_many_requests_are_in_flight_at_once_and_no_more_than_was_allowed(live: LiveGateway) -> None:
    lock = threading.Lock()
    flying = most = 0

    def begun(_: Any) -> None:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)

    def ended(_: ResponseEvent) -> None:
        nonlocal flying
        with lock:
            flying -= 1

    with Inferway(live.url, api_key=live.admin_key, on_request=begun, on_response=ended) as client:
        client.models.explain("linear", X, np.repeat(BASE, 50, axis=0), chunk_rows=10, concurrency=3)
    assert 1 < most <= 3


def test_one_version_is_explained_where_another_becomes_the_default_meanwhile(
    live: LiveGateway, client: Inferway
) -> None:
    client.models.deploy(linear(), name="moving", progress=False)
    other = Inferway(live.url, api_key=live.admin_key)
    moved = threading.Event()

    def move(event: ResponseEvent) -> None:
        if event.request.url.endswith("/infer") and not moved.is_set():
            moved.set()
            other.models.deploy(linear(-WEIGHTS), name="moving", progress=False)

    with other, Inferway(live.url, api_key=live.admin_key, on_response=move) as watched:
        found = watched.models.explain("moving", X, BASE)
        now = other.infer("moving", X)["y"]
    assert moved.is_set()
    np.testing.assert_allclose(now, -(X @ WEIGHTS), atol=1e-6)
    np.testing.assert_allclose(found.predictions, X @ WEIGHTS, atol=1e-6)
    assert found.additivity_error < 1e-6


async def test_an_explanation_that_nobody_waits_for_asks_no_more(live: LiveGateway) -> None:
    asked = asyncio.Event()
    count = 0

    async def seen(_: ResponseEvent) -> None:
        nonlocal count
        count += 1
        if count == 3:
            asked.set()

    async with AsyncInferway(live.url, api_key=live.admin_key, on_response=seen) as client:
        work = asyncio.create_task(
            client.models.explain("linear", np.repeat(X, 200, axis=0), BASE, chunk_rows=1, concurrency=1)
        )
        async with asyncio.timeout(30):
            await asked.wait()
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            # The thread that draws orders ends too, though it has thousands of rows to ask for.
            await asyncio.get_running_loop().shutdown_default_executor()
        assert count <= 4


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"x": X}, inferway.ConfigurationError, "background expects some typical rows"),
        ({"x": X, "background": BASE, "output": "best"}, inferway.ConfigurationError, "one; best is INT64"),
        ({"x": X, "background": BASE, "output": "z"}, inferway.ConfigurationError, "output expects one of y, best"),
        ({"x": X, "background": BASE, "task": "embed"}, inferway.ConfigurationError, "task is for a text"),
        ({"x": X, "background": BASE, "permutations": 0}, inferway.ConfigurationError, "permutations expects a whole"),
        ({"x": X, "background": BASE, "chunk_rows": 0}, inferway.ConfigurationError, "chunk_rows expects a whole"),
        ({"x": "a text"}, inferway.BadRequestError, "expected a model"),
        ({"x": "  "}, inferway.InvalidInputError, "a text with words in it"),
        ({"x": "a", "background": 1}, inferway.ConfigurationError, "background and segments are for tensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_said(client: Inferway, arguments: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        client.models.explain("linear", **arguments)
    with pytest.raises(inferway.ModelNotFoundError):
        client.models.explain("nobody", X, BASE)


def test_a_text_model_is_not_explained_by_what_it_is_not_for(client: Inferway) -> None:
    with pytest.raises(inferway.BadRequestError, match="expected a model for embeddings"):
        client.models.explain("scorer", "the cat", task="embed")
    with pytest.raises(inferway.ConfigurationError, match=r"reference expects \d+ numbers, got 2"):
        client.models.explain("embedder", "the cat", reference=[1.0, 2.0])


def test_pictures_can_be_kept(client: Inferway, tmp_path: Path) -> None:
    found = client.models.explain("linear", X, BASE, output_names=["no", "yes"])
    path = tmp_path / "waterfall.png"
    found.plot(row=1, output="yes").savefig(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
