"""One local Ray for the tests that need one; they are marked to run in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before anything imports Keras.
os.environ.setdefault("KERAS_BACKEND", "torch")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray that says it has eight processors; whoever connects while it runs uses it."""
    from ray import cloudpickle

    import training
    from inferway.train import ray_session

    # Ray's processes do not look for modules in the folder of the tests.
    cloudpickle.register_pickle_by_value(training)
    with ray_session.connect(cpus=8, object_store_bytes=200_000_000):
        yield
