"""The SDK against a real gateway: real models, real keys, real sockets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import polars as pl
import pytest

import inferway
from inferway import AsyncInferway, Inferway
from live import LiveGateway
from scripted import Side


@pytest.fixture(params=["sync", "async"])
async def side(request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    made = Side(request.param)
    yield made
    await made.end()


@pytest.fixture
def client(side: Side, gateway: LiveGateway) -> Any:
    return side.client(gateway.url, api_key=gateway.admin_key)


def table(rows: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    left = np.arange(16 * rows, dtype=np.int32).reshape(rows, 16)
    return {"INPUT0": left, "INPUT1": np.ones_like(left)}


# --- inference ---------------------------------------------------------------------------------------------------


async def test_a_model_answers_with_numpy_by_output_name(side: Side, client: Any) -> None:
    inputs = table()
    result = await side(lambda: client.infer("simple", inputs, id="mine"))
    assert np.array_equal(result["OUTPUT0"], inputs["INPUT0"] + 1)
    assert np.array_equal(result["OUTPUT1"], inputs["INPUT0"] - 1)
    assert (result.model_name, result.model_version, result.id) == ("simple", "2", "mine")
    assert result.request_id
    assert {"parse", "queue", "run", "serialise"} <= set(result.timing)
    older = await side(lambda: client.infer("simple", inputs, version=1))
    assert older.model_version == "1"
    one = await side(lambda: client.infer("simple", inputs, outputs=["OUTPUT1"]))
    assert list(one) == ["OUTPUT1"]
    text = await side(lambda: client.infer("simple", inputs, binary=False))
    assert np.array_equal(text["OUTPUT0"], result["OUTPUT0"])


SAMPLES: dict[str, list[Any]] = {
    "BOOL": [[True, False]],
    "UINT8": [[0, 255]],
    "UINT16": [[0, 65535]],
    "UINT32": [[0, 2**32 - 1]],
    "UINT64": [[0, 2**64 - 1]],
    "INT8": [[-128, 127]],
    "INT16": [[-32768, 32767]],
    "INT32": [[-(2**31), 2**31 - 1]],
    "INT64": [[-(2**63), 2**63 - 1]],
    "FP16": [[0.5, math.inf]],
    "FP32": [[0.5, -math.inf]],
    "FP64": [[0.1, 1e300]],
    "BYTES": [["a\x00b", "é"]],
}


async def test_every_datatype_survives_the_way_there_and_back(side: Side, client: Any) -> None:
    handle = client.model("all_types")
    signature = await side(lambda: handle.signature())
    inputs = {spec.name: SAMPLES[spec.datatype] for spec in signature.inputs}
    result = await side(lambda: handle.infer(inputs))
    for name, value in inputs.items():
        found = result[f"{name}_out"]
        assert found.tolist() == value, name
        assert found.dtype == signature.by_name[name].dtype


async def test_every_datatype_survives_without_rows(side: Side, client: Any) -> None:
    handle = client.model("all_types")
    signature = await side(lambda: handle.signature())
    inputs = {spec.name: np.empty((1, 0), spec.carrier) for spec in signature.inputs}
    result = await side(lambda: handle.infer(inputs))
    assert {name: array.shape for name, array in result.items()} == {f"{name}_out": (1, 0) for name in inputs}


async def test_bf16_survives_from_every_origin(side: Side, client: Any) -> None:
    values = np.array([[1.5, -2.0, math.nan, math.inf]], np.float32)
    brain = values.astype(ml_dtypes.bfloat16)
    for given in (values, values.astype(np.float64), brain, brain.view(np.uint16), values.tolist()):
        found = (await side(partial(client.infer, "bf16", given))).output
        assert found.dtype == np.float32
        assert np.array_equal(found, values, equal_nan=True)


async def test_nan_and_infinities_survive_json(side: Side, client: Any) -> None:
    row = np.zeros((1, 16), np.float32)
    row[0, :3] = [math.nan, math.inf, -math.inf]
    found = (await side(lambda: client.infer("add_one", row, binary=False))).output
    assert np.array_equal(found[0, :3], row[0, :3], equal_nan=True)


async def test_scalars_have_rank_0(side: Side, client: Any) -> None:
    found = await side(lambda: client.model("scalar").predict({"x": 2, "y": 0.5}))
    assert found.shape == ()
    assert float(found) == 2.5


async def test_people_hand_over_what_they_hold(side: Side, client: Any) -> None:
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    names = list("abcd")
    wanted = (await side(lambda: client.model("optional").predict({"x": rows}))).tolist()
    assert wanted == (rows * 2).tolist()
    for given in (rows.tolist(), pd.DataFrame(rows, columns=names), pl.DataFrame(rows, schema=names), rows.astype(int)):
        assert (await side(partial(client.model("optional").predict, given))).tolist() == wanted
    scaled = await side(lambda: client.model("optional").predict({"x": rows[0], "scale": 3}))
    assert scaled.tolist() == [(rows[0] * 3).tolist()]
    words = await side(lambda: client.model("strings").predict([["a\x00", "", "é"]]))
    assert words.tolist() == [["a\x00", "", "é"]]


async def test_the_best_classes_come_with_their_labels(side: Side, client: Any) -> None:
    result = await side(
        lambda: client.infer("classifier", [[1, 2, 3, 4]], outputs={"probabilities": {"classification": 2}})
    )
    found = [text.split(":") for text in result["probabilities"][0]]
    assert len(found) == 2
    assert {label for _, _, label in found} <= {"cat", "dog", "fox"}
    assert float(found[0][0]) >= float(found[1][0])


async def test_a_large_tensor_passes(side: Side, client: Any) -> None:
    rows = np.random.default_rng(0).random((1 << 16, 16), np.float32)
    assert np.array_equal((await side(lambda: client.infer("add_one", rows, timeout=120))).output, rows + 1)


async def test_map_keeps_order_and_neighbours_apart(side: Side, client: Any) -> None:
    handle = client.model("picky")
    items = [[n, n, n, n] if n % 5 else [-1, 0, 0, 0] for n in range(1, 31)]
    found = await side.all(handle.map(items, concurrency=8, on_error="return"))
    for item, result in zip(items, found, strict=True):
        if item[0] < 0:
            assert isinstance(result, inferway.ModelFailedError)
        else:
            assert result.output.tolist() == [item]


# --- errors ------------------------------------------------------------------------------------------------------


async def test_mistakes_are_typed_wherever_they_are_found(side: Side, client: Any, gateway: LiveGateway) -> None:
    with pytest.raises(inferway.InvalidInputError, match="expects shape"):
        await side(lambda: client.infer("add_one", [[1, 2, 3]]))
    with pytest.raises(inferway.ModelNotFoundError) as unknown:
        await side(lambda: client.infer("nobody", [1]))
    assert (unknown.value.status_code, unknown.value.code, unknown.value.retryable) == (404, "model_not_found", False)
    assert unknown.value.request_id
    with pytest.raises(inferway.VersionNotFoundError):
        await side(lambda: client.infer("simple", table(), version=99))
    with pytest.raises(inferway.ModelFailedError):
        await side(lambda: client.infer("picky", [[-1, 0, 0, 0]]))
    with pytest.raises(inferway.AuthenticationError) as stranger:
        await side(lambda: client.with_options(api_key="ifw_test_" + "x" * 62).models.list())
    assert "xxxx" not in str(stranger.value) + repr(stranger.value)
    reader = client.with_options(api_key=gateway.make_key("read"))
    with pytest.raises(inferway.PermissionDeniedError):
        await side(lambda: reader.infer("simple", table()))
    narrow = client.with_options(api_key=gateway.make_key("infer", models=["add_*"]))
    assert await side(lambda: narrow.models.list()) == ["add_one"]
    with pytest.raises(inferway.ModelNotFoundError):
        await side(lambda: narrow.model("simple").refresh())


async def test_the_gateway_finds_what_an_old_signature_let_pass(side: Side, client: Any) -> None:
    handle = client.model("add_one")
    real = await side(lambda: handle.signature())
    [spec] = real.inputs
    stale = inferway.ModelMetadata(
        real.name, real.versions, real.platform, (inferway.TensorSpec(spec.name, "INT64", (-1, 16)),), real.outputs
    )
    client._engine.signatures.keep(("add_one", None), stale, 0.0)
    assert (await side(lambda: handle.infer([[1] * 16]))).output.tolist() == [[2.0] * 16]
    client._engine.signatures.keep(("add_one", None), stale, 0.0)
    with pytest.raises(inferway.InvalidInputError):
        await side(lambda: handle.infer([[1] * 15]))


async def test_the_gateway_keeps_the_callers_deadline(side: Side, client: Any) -> None:
    row = np.zeros((1, 64), np.float32)
    with pytest.raises(inferway.APITimeoutError) as late:
        await side(lambda: client.infer("slow", {"x": row, "steps": 3_000_000}, timeout=0.4))
    assert late.value.elapsed is not None
    assert late.value.elapsed < 5
    assert (await side(lambda: client.infer("slow", {"x": row, "steps": 1}))).output.shape == (1, 64)


# --- models ------------------------------------------------------------------------------------------------------


async def test_models_tell_what_they_are_and_do(side: Side, client: Any) -> None:
    names = await side(lambda: client.models.list())
    assert {"simple", "add_one", "bf16"} <= set(names)
    metadata = await side(lambda: client.models.get("simple"))
    assert str(metadata).startswith("simple(INPUT0: INT32 [-1, 16], INPUT1: INT32 [-1, 16]) -> (OUTPUT0: INT32")
    assert metadata.versions == ("1", "2")
    assert metadata.properties["row_exactness"]
    config = await side(lambda: client.models.config("simple", 2))
    assert (config.name, config.max_batch_size) == ("simple", 8)
    await side(lambda: client.infer("simple", table(3)))
    [stat] = await side(lambda: client.models.stats("simple", 2))
    assert stat.inference_count >= 3
    assert len(await side(lambda: client.models.stats())) >= len(names)
    assert await side(lambda: client.models.ready("simple")) is True
    index = await side(lambda: client.models.index())
    assert {entry.state for entry in index if entry.name == "simple"} == {"READY"}
    server = await side(lambda: client.server())
    assert "binary_tensor_data" in server.extensions


async def test_models_are_unloaded_and_loaded(side: Side, client: Any) -> None:
    try:
        await side(lambda: client.models.unload("matmul"))
        assert await side(lambda: client.models.ready("matmul")) is False
        with pytest.raises(inferway.ModelNotReadyError):
            await side(lambda: client.with_options(retry=None).infer("matmul", np.zeros((1, 64), np.float32)))
    finally:
        await side(lambda: client.models.load("matmul"))
    assert await side(lambda: client.models.ready("matmul")) is True
    with pytest.raises((inferway.ModelLoadError, inferway.ModelNotFoundError)):
        await side(lambda: client.models.load("nobody"))


# --- keys --------------------------------------------------------------------------------------------------------


async def test_a_key_lives_and_ends(side: Side, client: Any) -> None:
    made = await side(lambda: client.keys.create("e2e", ["infer", "read"], models=["add_*"], expires_in_s=600))
    assert made.key not in repr(made)
    mine = client.with_options(api_key=made.key)
    record = await side(lambda: mine.keys.self())
    assert (record.id, record.name, record.scopes) == (made.id, "e2e", ["infer", "read"])
    with pytest.raises(inferway.PermissionDeniedError):
        await side(lambda: mine.keys.get(made.id))
    assert (await side(lambda: client.keys.get(made.id))).id == made.id
    rotated = await side(lambda: client.keys.rotate(made.id, overlap_s=60))
    assert rotated.replaced.id == made.id
    successor = client.with_options(api_key=rotated.key)
    assert (await side(lambda: successor.models.list())) == ["add_one"]
    assert (await side(lambda: mine.models.list())) == ["add_one"], "both are good while they overlap"
    with pytest.raises(inferway.ConflictError):
        await side(lambda: client.keys.rotate(made.id))
    for _ in range(2):
        ended = await side(lambda: client.keys.revoke(made.id))
        assert ended.revoked_at is not None
    with pytest.raises(inferway.AuthenticationError):
        await side(lambda: mine.models.list())
    with pytest.raises(inferway.KeyNotFoundError):
        await side(lambda: client.keys.get("0" * 12))


async def test_the_list_of_keys_has_every_page(side: Side, client: Any) -> None:
    made = {(await side(partial(client.keys.create, f"page-{n}", ["infer"]))).id for n in range(5)}
    listed = [record.id for record in await side.all(client.keys.list(page_size=2))]
    assert made <= set(listed)
    assert len(listed) == len(set(listed))
    for key_id in made:
        await side(partial(client.keys.revoke, key_id))


# --- health ------------------------------------------------------------------------------------------------------


async def test_probes_need_no_key(side: Side, gateway: LiveGateway) -> None:
    client = side.client(gateway.url)
    assert await side(lambda: client.health.live()) is True
    assert await side(lambda: client.health.ready()) is True
    await side(lambda: client.health.wait_until_ready(30))


# --- many at once ------------------------------------------------------------------------------------------------


async def test_a_hundred_and_twenty_eight_in_flight_answer_each_caller(gateway: LiveGateway) -> None:
    async with AsyncInferway(gateway.url, api_key=gateway.admin_key) as client:

        async def call(number: int) -> bool:
            row = np.full((1, 16), number, np.float32)
            return bool(((await client.infer("add_one", {"x": row})).output == number + 1).all())

        assert all(await asyncio.gather(*(call(n) for n in range(128 * 4))))


async def test_a_cancelled_call_leaves_the_client_good(gateway: LiveGateway) -> None:
    async with AsyncInferway(gateway.url, api_key=gateway.admin_key) as client:
        handle = client.model("slow")
        await handle.signature()
        row = np.zeros((1, 64), np.float32)
        task = asyncio.create_task(handle.infer({"x": row, "steps": 3_000_000}))
        done, _ = await asyncio.wait({task}, timeout=0.1)
        assert not done
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await handle.infer({"x": row, "steps": 1})).output.shape == (1, 64)


def test_tensors_of_an_answer_are_aligned_and_writable(gateway: LiveGateway) -> None:
    with Inferway(gateway.url, api_key=gateway.admin_key) as client:
        for rows in (1, 20_000):
            output = client.infer("add_one", np.zeros((rows, 16), np.float32)).output
            assert output.flags.aligned
            output += 1
