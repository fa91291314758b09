"""Metadata from the wire to the signature that inputs are held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inferway import ModelMetadata, TensorSpec
from inferway._errors import MalformedAnswer
from inferway._signature import read_metadata
from scripted import SIMPLE_METADATA


def test_metadata_is_read_with_what_is_new_in_it() -> None:
    found = read_metadata(
        {
            **SIMPLE_METADATA,
            "inputs": [
                {"name": "x", "datatype": "BF16", "shape": [-1, 2], "unit": "m"},
                {"name": "s", "datatype": "BYTES", "shape": [], "optional": True},
            ],
            "owner": "me",
        }
    )
    assert isinstance(found, ModelMetadata)
    assert found.versions == ("1",)
    assert found.properties["row_exact"] == "true"
    assert found.extra == {"owner": "me"}
    assert found.required == ("x",)
    x, s = found.inputs
    assert (x.extra, x.dtype, x.carrier) == ({"unit": "m"}, np.dtype(np.float32), np.dtype(np.uint16))
    assert (s.optional, s.dtype, s.shape) == (True, np.dtype(object), ())
    assert str(found) == "simple(x: BF16 [-1, 2], s: BYTES [] optional) -> (y: FP32 [-1, 2])"


def test_members_that_only_some_servers_have_may_be_missing() -> None:
    found = read_metadata({"name": "m", "inputs": [], "outputs": []})
    assert (found.versions, found.platform, found.properties) == ((), "", {})


def test_equal_signatures_are_equal() -> None:
    assert read_metadata(SIMPLE_METADATA) == read_metadata(SIMPLE_METADATA)
    assert TensorSpec("x", "FP32", (1,)) != TensorSpec("x", "FP32", (2,))


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        {},
        {**SIMPLE_METADATA, "name": 5},
        {**SIMPLE_METADATA, "inputs": None},
        {**SIMPLE_METADATA, "outputs": {}},
        {**SIMPLE_METADATA, "inputs": [5]},
        {**SIMPLE_METADATA, "inputs": [{"name": "x", "datatype": "FP32"}]},
        {**SIMPLE_METADATA, "inputs": [{"name": "x", "datatype": "FP7", "shape": []}]},
        {**SIMPLE_METADATA, "inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]},
        {**SIMPLE_METADATA, "inputs": [{"name": "x", "datatype": "FP32", "shape": ["a"]}]},
    ],
)
def test_metadata_that_breaks_the_contract_is_refused(broken: Any) -> None:
    with pytest.raises(MalformedAnswer):
        read_metadata(broken)
