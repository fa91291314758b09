"""The core keeps constants of its own, because it imports nothing; here they meet those of the contract."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from inferway_contract import document, names
from inferway_gateway.core import backend, errors, keys, model_config, registry, stats, tensors
from inferway_gateway.http import codec, routes_keys, routes_oip
from inferway_gateway.server.policy import EdgeLimits
from inferway_gateway.settings import Settings

CONTRACT: Mapping[str, Any] = document.load()
FIELDS = Settings.model_fields
EDGE = EdgeLimits()


@pytest.mark.parametrize(
    ("gateway", "contract"),
    [
        (FIELDS["body_limit_bytes"].default, names.BODY_LIMIT_BYTES),
        (FIELDS["json_limit_bytes"].default, names.JSON_LIMIT_BYTES),
        (FIELDS["header_limit_bytes"].default, names.HEADER_LIMIT_BYTES),
        (FIELDS["header_limit_count"].default, names.HEADER_COUNT_LIMIT),
        (FIELDS["header_timeout_s"].default, names.HEADER_TIMEOUT_S),
        (FIELDS["body_timeout_s"].default, names.BODY_TIMEOUT_S),
        (FIELDS["body_min_rate"].default, names.BODY_RATE_BYTES_PER_S),
        (EDGE.body_bytes, names.BODY_LIMIT_BYTES),
        (EDGE.header_bytes, names.HEADER_LIMIT_BYTES),
        (EDGE.header_count, names.HEADER_COUNT_LIMIT),
        (EDGE.header_timeout_s, names.HEADER_TIMEOUT_S),
        (EDGE.body_timeout_s, names.BODY_TIMEOUT_S),
        (EDGE.body_min_bytes_per_s, names.BODY_RATE_BYTES_PER_S),
        (codec.JSON_STRUCTURE_LIMIT, names.JSON_STRUCTURE_LIMIT),
        (tensors.MAX_RANK, names.MAX_RANK),
        (keys.ADMIN_LIFETIME_S, names.KEY_ADMIN_EXPIRES_IN_S),
        (keys.MAX_LIFETIME_S, names.KEY_MAX_EXPIRES_IN_S),
        (keys.DEFAULT_OVERLAP_S, names.KEY_DEFAULT_OVERLAP_S),
        (keys.MAX_OVERLAP_S, names.KEY_MAX_OVERLAP_S),
        (keys.SCOPES, frozenset(names.SCOPES)),
        (stats.STAGES, names.TIMING_STAGES),
        (frozenset(routes_oip.EXTENSIONS), frozenset(names.EXTENSIONS)),
        (model_config.ModelConfig().platform, names.PLATFORM),
        (backend.RowExactness, names.RowExactness),
        (keys.Environment, names.Environment),
        (registry.State, names.ModelState),
    ],
)
def test_a_constant_is_the_same(gateway: object, contract: object) -> None:
    assert gateway == contract


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("time of one model run", f"{FIELDS['run_timeout_s'].default:g} s"),
        ("open connections", f"{FIELDS['max_connections'].default}"),
        ("classes that an output is told as, over all rows", f"{codec.CLASSIFICATION_LIMIT:,}"),
        ("chunks of a chunked body", f"{EDGE.chunk_count:,}"),
        ("body of a request for keys", f"{routes_keys.BODY_LIMIT_BYTES >> 10} KiB"),
    ],
)
def test_a_limit_that_has_no_constant_in_the_contract_is_in_its_table(row: str, text: str) -> None:
    line = next(line for line in CONTRACT["info"]["description"].splitlines() if line.startswith(f"| {row} |"))
    assert text in line


def test_json_is_read_down_to_the_depth_that_the_contract_names() -> None:
    depth = names.JSON_DEPTH_LIMIT
    limit = names.JSON_LIMIT_BYTES
    assert codec.load_json(b"[" * depth + b"]" * depth, limit) is not None
    with pytest.raises(errors.MalformedRequestError):
        codec.load_json(b"[" * (depth + 1) + b"]" * (depth + 1), limit)


@pytest.mark.parametrize("datatype", names.DATATYPE_BYTES)
def test_a_datatype_has_the_size_that_the_contract_names(datatype: str) -> None:
    size = names.DATATYPE_BYTES[datatype]
    assert tensors.DTYPES.keys() == names.DATATYPE_BYTES.keys()
    assert tensors.DTYPES[datatype].hasobject if size is None else tensors.DTYPES[datatype].itemsize == size


def test_the_gateway_makes_keys_that_the_contract_describes() -> None:
    for environment in names.ENVIRONMENTS:
        text = keys.ApiKey.generate(environment).reveal()
        assert names.KEY_PATTERN.fullmatch(text)
        assert text[-6:] == names.key_checksum(text[:-6])
        assert re.match(CONTRACT["components"]["schemas"]["ApiKey"]["pattern"], text)
        assert keys.public_id(text) == names.KEY_PATTERN.fullmatch(text)[2]  # type: ignore[index]  # matched above
