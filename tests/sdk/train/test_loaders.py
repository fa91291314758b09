"""Rows out of loaders: all of them, in order, whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import inferway
from inferway import ConfigurationError, InvalidInputError
from inferway.train.loaders import gathered, is_source

X = np.arange(50, dtype=np.float32).reshape(25, 2)
Y = np.arange(25) % 3


def batches(size: int = 10) -> Any:
    return ((X[at : at + size], Y[at : at + size]) for at in range(0, len(X), size))


def assert_all_rows(found: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(found[0], X)
    np.testing.assert_array_equal(found[1], Y)


def test_an_iterable_of_batches_gives_all_rows() -> None:
    assert_all_rows(gathered(batches()))
    several, _ = gathered(({"a": x, "b": x[:, :1]}, y) for x, y in batches())
    np.testing.assert_array_equal(several["b"], X[:, :1])
    listed, _ = gathered(([x, x[:, 0]], y) for x, y in batches())
    np.testing.assert_array_equal(listed[1], X[:, 0])


def test_what_holds_its_rows_is_no_source() -> None:
    pandas = pytest.importorskip("pandas")
    for rows in (X, X.tolist(), {"x": X}, [X, X], (X,), pandas.DataFrame(X), None):
        assert not is_source(rows)
    assert is_source(batches())


@pytest.mark.torch
def test_datasets_and_loaders_of_pytorch_give_all_rows() -> None:
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    for source in (dataset, torch.utils.data.Subset(dataset, range(25)), torch.utils.data.DataLoader(dataset, 4)):
        assert is_source(source)
        assert_all_rows(gathered(source))


@pytest.mark.torch
def test_fit_trains_on_a_loader_as_on_its_arrays() -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)

    def trained(*data: Any, held: Any) -> Any:
        torch.manual_seed(1)
        model = inferway.wrap(torch.nn.Linear(2, 3), loss="sparse_categorical_crossentropy", optimizer="sgd")
        model.fit(*data, validation_data=held, epochs=2, batch_size=5, seed=4, progress=False)
        return model.predict(X)

    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X / 50), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(dataset, 7)
    np.testing.assert_array_equal(trained(loader, held=loader), trained(X / 50, Y, held=(X / 50, Y)))


@pytest.mark.torch
def test_a_dataset_of_keras_gives_its_batches() -> None:
    pytest.importorskip("keras")
    from keras.utils import PyDataset

    class Halves(PyDataset):  # type: ignore[misc]  # keras is not followed
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            part = slice(0, 13) if index == 0 else slice(13, None)
            return X[part], Y[part]

    assert is_source(Halves())
    assert_all_rows(gathered(Halves()))


def test_batches_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="batch 1 is a ndarray; expected a pair"):
        gathered(x for x, _ in batches())
    with pytest.raises(InvalidInputError, match="batch 1 is a tuple of 3"):
        gathered((x, y, y) for x, y in batches())
    spent = batches()
    list(spent)
    with pytest.raises(InvalidInputError, match="read before"):
        gathered(spent)
    with pytest.raises(ConfigurationError, match="without y"):
        gathered(batches(), Y)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray Data of Ray Data's own settings
def test_a_ray_data_dataset_gives_its_columns(local_ray: None) -> None:
    pytest.importorskip("ray.data")
    import pandas
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    table = pandas.DataFrame({"width": X[:, 0], "height": X[:, 1], "kind": Y})
    dataset = ray.data.from_pandas(table)
    assert is_source(dataset)
    x, y = gathered(dataset, "kind")
    assert list(x.columns) == ["width", "height"]
    assert_all_rows((x.to_numpy(), y))
    images, _ = gathered(ray.data.from_numpy(X).add_column("kind", lambda frame: frame.index % 3), "kind")
    np.testing.assert_array_equal(images, X)
    with pytest.raises(ConfigurationError, match=r"fit\(dataset, 'name'\); it has width, height, kind"):
        gathered(dataset)
