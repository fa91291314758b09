"""Values against what they are by their definition, over models that are functions here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from math import factorial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import inferway
from inferway import ConfigurationError, ModelMetadata, TensorSpec
from inferway.explain.explainer import default_permutations, explain
from inferway.explain.explanation import Explanation
from inferway.explain.players import Numbers, Patches, Players, Words, players_of

Model = Callable[[Any], NDArray[Any]]
RNG = np.random.default_rng(3)
X = RNG.standard_normal((3, 4))
BASE = RNG.standard_normal((5, 4))


def explained(players: Players, model: Model, **changes: Any) -> tuple[Explanation, list[int]]:
    """The explanation, and how many rows each request had."""
    sizes: list[int] = []

    def ask(chunks: Sequence[Any]) -> list[NDArray[Any]]:
        answers = [model(chunk) for chunk in chunks]
        sizes.extend(len(answer) for answer in answers)
        return answers

    arguments: dict[str, Any] = {
        "model": "m", "output": "y", "permutations": None, "chunk_rows": 7, "seed": 0, "output_names": None,
        "tell": lambda done, total: None, **changes,
    }  # fmt: skip
    return explain(players, ask, **arguments), sizes


def shapley(model: Model, x: NDArray[Any], base: NDArray[Any]) -> NDArray[Any]:
    """By the definition: over all coalitions."""
    count = len(x)
    values = np.zeros(count)

    def worth(known: Sequence[int]) -> float:
        rows = base.copy()
        rows[:, list(known)] = x[list(known)]
        return float(model(rows).mean())

    for part in range(count):
        others = [at for at in range(count) if at != part]
        for size in range(count):
            weight = factorial(size) * factorial(count - size - 1) / factorial(count)
            for known in combinations(others, size):
                values[part] += weight * (worth([*known, part]) - worth(known))
    return values


def numbers(x: NDArray[Any] = X, base: NDArray[Any] = BASE) -> Players:
    return Numbers(x, base, [f"c{at}" for at in range(x.shape[1])])


def linear(rows: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(rows @ np.array([1.0, -2.0, 0.5, 3.0]))


def pairs(rows: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(rows[:, 0] * rows[:, 1] - 3 * rows[:, 2] * rows[:, 3] + rows[:, 0])


def tangled(rows: NDArray[Any]) -> NDArray[Any]:
    bent = np.tanh(rows.sum(axis=1)) * np.exp(-(rows[:, 0] ** 2))
    return np.asarray(bent + np.where(rows[:, 1] > 0, rows.prod(axis=1), 0))


@pytest.mark.parametrize("model", [linear, pairs])
def test_values_are_exact_where_at_most_two_parts_work_together(model: Model) -> None:
    found, _ = explained(numbers(), model, permutations=1)
    for row in range(3):
        np.testing.assert_allclose(found.values[row], shapley(model, X[row], BASE), atol=1e-12)
    np.testing.assert_allclose(found.base_values, model(BASE).mean(), atol=1e-12)
    np.testing.assert_allclose(found.predictions, model(X), atol=1e-12)


def test_values_come_near_where_many_work_together_and_the_standard_error_says_how_near() -> None:
    found, _ = explained(numbers(), tangled, permutations=200)
    exact = np.stack([shapley(tangled, row, BASE) for row in X])
    assert np.abs(found.values - exact).max() < 0.05
    assert (np.abs(found.values - exact) <= 5 * found.standard_error + 1e-9).all()
    few, _ = explained(numbers(), tangled, permutations=5)
    assert few.standard_error.mean() > 3 * found.standard_error.mean()


def test_each_output_is_explained() -> None:
    def both(rows: NDArray[Any]) -> NDArray[Any]:
        return np.stack([linear(rows), pairs(rows)], axis=1)

    found, _ = explained(numbers(), both, output_names=["one", "two"])
    assert found.values.shape == (3, 4, 2)
    for at, model in enumerate((linear, pairs)):
        np.testing.assert_allclose(found.values[1, :, at], shapley(model, X[1], BASE), atol=1e-12)
    with pytest.raises(ConfigurationError, match="output_names expects a name for each of the 2 outputs, got 1"):
        explained(numbers(), both, output_names=["one"])


def test_what_it_adds_up_to_is_measured_and_not_assumed() -> None:
    calls = 0

    def moody(rows: NDArray[Any]) -> NDArray[Any]:
        nonlocal calls
        calls += 1
        return linear(rows) + (0.25 if calls == 1 else 0.0)

    steady, _ = explained(numbers(), linear)
    assert steady.additivity_error < 1e-12
    found, _ = explained(numbers(X[:1]), moody)
    assert found.additivity_error == pytest.approx(0.25)


def test_rows_go_in_requests_of_the_size_that_was_asked_for_and_are_counted() -> None:
    told: list[tuple[int, int]] = []
    found, sizes = explained(
        numbers(X[:2]), linear, permutations=2, tell=lambda done, total: told.append((done, total))
    )
    assert max(sizes) == 7
    # Two inputs alone, and two orders of nine steps over five rows of background for each.
    assert sum(sizes) == found.rows_sent <= 2 * (1 + 2 * 9 * 5)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (182, 182)


def test_large_rows_go_in_small_requests() -> None:
    players = Patches(np.ones((1, 1, 1024, 512)), np.zeros((1, 1, 1024, 512)), np.zeros((1, 1024, 512), np.intp))
    found, sizes = explained(players, lambda rows: rows.mean(axis=(1, 2, 3)), chunk_rows=100)
    assert max(sizes) == 1
    assert found.values.tolist() == [[1.0]]


def test_a_walk_that_would_not_fit_into_memory_is_refused_with_what_would() -> None:
    wide = np.ones((1, 5000))
    players = Numbers(wide, np.zeros((100, 5000)), ["c"] * 5000)
    with pytest.raises(ConfigurationError, match=r"100 rows of background over 5000 parts .* at most 5 rows"):
        explained(players, lambda rows: rows.sum(axis=1))


def test_the_same_seed_gives_the_same_and_the_callers_generator_is_left_alone() -> None:
    np.random.seed(7)
    wanted = np.random.random(3).tolist()
    np.random.seed(7)
    first, _ = explained(numbers(), tangled, seed=5)
    assert np.random.random(3).tolist() == wanted
    again, _ = explained(numbers(), tangled, seed=5)
    other, _ = explained(numbers(), tangled, seed=6)
    assert np.array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)


@pytest.mark.parametrize(("parts", "orders"), [(1, 10), (64, 10), (250, 9), (1000, 2), (100_000, 1)])
def test_wide_inputs_get_fewer_orders_and_never_none(parts: int, orders: int) -> None:
    assert default_permutations(parts) == orders


# ---- parts of inputs


def metadata(*inputs: TensorSpec) -> ModelMetadata:
    return ModelMetadata("m", ("1",), "onnxruntime_onnx", inputs, (TensorSpec("y", "FP32", (-1,)),))


TABLE = metadata(TensorSpec("age", "FP32", (-1, 1)), TensorSpec("city", "BYTES", (-1, 1)))
IMAGE = metadata(TensorSpec("x", "FP32", (-1, 3, 32, 24)))


def test_columns_of_any_type_keep_their_values_and_missing_ones_stay_missing() -> None:
    players = players_of(
        TABLE,
        {"age": np.array([30.0, np.nan]), "city": np.array(["Bern", None], object)},
        {"age": np.array([np.nan, 40.0]), "city": np.array(["Oslo", "Bern"], object)},
        None,
        None,
    )
    assert list(players.names) == ["age", "city"]
    back = players.inputs(players.rows, 0)
    assert back["age"].shape == (2, 1)
    np.testing.assert_array_equal(back["age"][:, 0], [30.0, np.nan])
    assert back["city"][:, 0].tolist() == ["Bern", None]
    # A value that is the same in both is known to be: nothing has to be asked about it.
    assert players.rows[1, 0] == players.background[0, 0]
    assert players.rows[0, 1] == players.background[1, 1]


def test_whole_numbers_stay_whole() -> None:
    spec = metadata(TensorSpec("x", "INT64", (-1, 2)))
    players = players_of(spec, np.array([[2**53, -1]]), np.array([[0, 0]]), None, None)
    given = players.inputs(players.rows, 0)
    assert given.dtype == np.int64
    assert given.tolist() == [[2**53, -1]]
    with pytest.raises(inferway.InvalidInputError, match="at most 2\\^53"):
        players_of(spec, np.array([[2**53 + 1, 0]]), np.array([[0, 0]]), None, None)


def test_an_image_falls_into_squares_and_the_mean_colour_stands_in() -> None:
    image = RNG.random((2, 3, 32, 24)).astype(np.float32)
    players = players_of(IMAGE, image, None, None, None)
    assert len(players.names) == 64
    codes = np.ones((1, 64))
    codes[0, 0] = 0
    given = players.inputs(codes, 1)
    mean = image[1].mean(axis=(1, 2))
    np.testing.assert_allclose(given[0, :, :4, :3], np.broadcast_to(mean[:, None, None], (3, 4, 3)), rtol=1e-6)
    np.testing.assert_array_equal(given[0, :, 4:], image[1, :, 4:])
    np.testing.assert_array_equal(given[0, :, :, 3:], image[1, :, :, 3:])


@pytest.mark.parametrize("shape", [(3, 32, 24), (32, 24, 3), (32, 24)], ids=["channels first", "channels last", "grey"])
def test_every_layout_of_an_image_is_cut_along_height_and_width(shape: tuple[int, ...]) -> None:
    players = players_of(metadata(TensorSpec("x", "FP32", (-1, *shape))), np.ones((1, *shape)), 0.0, None, None)
    assert len(players.names) == 64
    assert players.inputs(np.zeros((1, 64)), 0).sum() == 0


def test_segments_of_ones_own_are_taken() -> None:
    segments = np.zeros((32, 24), int)
    segments[:, 12:] = 70
    players = players_of(IMAGE, np.ones((1, 3, 32, 24)), 0.0, None, segments)
    given = players.inputs(np.array([[0.0, 1.0]]), 0)
    assert given[0, :, :, :12].sum() == 0
    assert given[0, :, :, 12:].min() == 1


def test_a_word_that_is_taken_away_leaves_a_mark_and_the_spaces() -> None:
    words = Words("  one two,\nthree ")
    assert list(words.names) == ["one", "two,", "three"]
    assert words.inputs(np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), 0) == ["  one …\nthree ", "  … …\n… "]


@pytest.mark.parametrize(
    ("spec", "x", "background", "names", "segments", "said"),
    [
        (TABLE, np.ones((2, 2)), None, None, None, "x expects a data frame or a mapping with the inputs age, city"),
        (TABLE, {"age": [1.0]}, {"age": [1.0]}, None, None, "city is missing"),
        (TABLE, {"age": [1.0], "city": ["a"]}, None, None, None, "background expects a data frame or a mapping"),
        (TABLE, {"age": [1.0], "city": ["a"]}, {"age": [2.0]}, None, None, "background expects the columns of x; city"),
        (TABLE, {"age": [1.0, 2.0], "city": ["a"]}, {"age": [1.0], "city": ["a"]}, None, None, "columns of one length"),
        (IMAGE, np.ones((3, 8)), None, None, None, r"x: expected an array with 4 axes, rows first, got shape \(3, 8\)"),
        (IMAGE, np.ones((1, 3, 32, 24)), np.ones(7), None, None, "background expects a value or an image that fits"),
        (IMAGE, np.ones((1, 3, 32, 24)), None, None, np.ones((2, 2)), r"segments expects whole numbers of shape"),
        (metadata(TensorSpec("x", "FP32", (-1, 3))), np.ones((1, 3)), None, None, None, "expects some typical rows"),
        (metadata(TensorSpec("x", "FP32", (-1, 3))), np.ones((1, 3)), np.ones((2, 4)), None, None, "rows of 3 columns"),
        (metadata(TensorSpec("x", "FP32", (-1, 3))), np.ones((1, 3)), np.ones((2, 3)), ["a"], None, "expects 3 names"),
        (metadata(TensorSpec("x", "BYTES", (-1, 1))), np.array([["a"]]), None, None, None, "expected numbers, got <U1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(
    spec: ModelMetadata, x: Any, background: Any, names: Any, segments: Any, said: str
) -> None:
    with pytest.raises((ConfigurationError, inferway.InvalidInputError), match=said):
        players_of(spec, x, background, names, segments)


# ---- what people see


def test_it_is_told_in_words() -> None:
    found, _ = explained(numbers(np.array([[1.0, 2.0, 0.0, -1.0]]), np.zeros((1, 4))), linear)
    assert str(found).splitlines() == [
        "m: y = -6, usually 0",
        "  c1 = 2   -4",
        "  c3 = -1  -3",
        "  c0 = 1   +1",
        "",
        "85 rows asked, 10 orders; base and values add up to the prediction within 0",
    ]
    assert "c1" in found._repr_html_()
    assert repr(found).startswith("Explanation(model='m', kind='table', values[1, 4], rows_sent=")
    frame = found.to_frame()
    assert frame.loc[0].tolist() == [1.0, -4.0, 0.0, -3.0]


def texts_of(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_pictures_say_what_the_numbers_say() -> None:
    found, _ = explained(numbers(), linear)
    waterfall = found.plot(row=1)
    drawn: list[Any] = list(waterfall.axes[0].patches)
    bars = [patch for patch in drawn if patch.get_height() == pytest.approx(0.7)]
    assert sorted(bar.get_width() for bar in bars) == pytest.approx(sorted(found.values[1]))
    ends = {round(end, 9) for bar in bars for end in (bar.get_x(), bar.get_x() + bar.get_width())}
    assert {round(float(found.base_values[1]), 9), round(float(found.predictions[1]), 9)} <= ends
    assert any(text.startswith("c3 = ") for text in texts_of(waterfall))
    bar = found.plot("bar", top=2)
    drawn = list(bar.axes[0].patches)
    assert [patch.get_width() for patch in drawn] == pytest.approx(sorted(np.abs(found.values).mean(axis=0))[-2:])


def test_a_picture_of_an_image_covers_what_matters() -> None:
    image = RNG.random((1, 3, 16, 16))
    players = players_of(metadata(TensorSpec("x", "FP32", (-1, 3, 16, 16))), image, 0.0, None, None)
    found, _ = explained(players, lambda rows: rows[:, :, :4, :4].sum(axis=(1, 2, 3)))
    cover = found.plot().axes[0].images[1]
    assert np.asarray(cover.get_alpha())[:4, :4].min() > 0
    assert np.asarray(cover.get_alpha())[4:].max() == 0
    with pytest.raises(ConfigurationError, match="needs an explanation of that kind, got 'image'"):
        found.plot("text")


def test_a_picture_of_a_text_keeps_every_word_within_it() -> None:
    text = "the $price$ of a_b^c fell by 12% " * 12
    found, _ = explained(Words(text), lambda texts: np.array([float(one.count("fell")) for one in texts]))
    figure = found.plot()
    figure.canvas.draw()
    words = [t for t in figure.axes[0].texts if t.get_text() in text.split()]
    assert [word.get_text() for word in words] == text.split()
    boxes = [word.get_window_extent() for word in words]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    for one, other in pairwise(boxes):
        assert one.x1 < other.x0 or other.y1 <= one.y0 + 1  # beside it, or on the next line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "pie"}, "kind expects waterfall, bar, image or text, got 'pie'"),
        ({"kind": "image"}, "needs an explanation of that kind, got 'table'"),
        ({"row": 3}, "row expects a number below 3, got 3"),
        ({"output": 1}, "output expects nothing, because there is one, got 1"),
    ],
)
def test_a_picture_of_what_is_not_there_is_refused(arguments: Any, said: str) -> None:
    found, _ = explained(numbers(), linear)
    with pytest.raises(ConfigurationError, match=said):
        found.plot(**arguments)


def test_without_the_library_the_message_says_how_to_install_it() -> None:
    code = """
import sys
sys.modules["shap"] = None
import inferway
with inferway.Inferway("http://127.0.0.1:9", api_key="ifw_x") as client:
    try:
        client.models.explain("m", [[1.0]], [[2.0]])
    except inferway.MissingExtraError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout == "explaining a prediction needs shap, which is not installed: pip install 'inferway[explain]'\n"
    )
