"""Handles of models: signatures, calls, results, many calls at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import inferway
from inferway import AsyncInferway, ConfigurationError, Inferway, InvalidInputError, _inference
from inferway._inference import infer_call, server_timing
from inferway._inputs import fit
from inferway._signature import ModelMetadata, TensorSpec, read_metadata
from scripted import SIMPLE_METADATA, FakeClock, ScriptedServer, Seen, Side, as_error, as_json, as_outputs


def posts(server: ScriptedServer) -> list[Seen]:
    return [seen for seen in server.seen if seen.method == "POST"]


def gets(server: ScriptedServer) -> list[Seen]:
    return [seen for seen in server.seen if seen.method == "GET"]


# --- signatures --------------------------------------------------------------------------------------------------


async def test_a_handle_sends_nothing_until_it_is_used(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    handle = client.model("simple", 3)
    assert repr(handle).endswith("ModelHandle('simple', version='3')")
    assert repr(client.model("simple")).endswith("ModelHandle('simple')")
    assert (handle.name, handle.version) == ("simple", "3")
    assert server.seen == []
    metadata = await side(lambda: handle.signature())
    assert [str(spec) for spec in metadata.inputs] == ["x: FP32 [-1, 2]"]
    assert server.seen[0].path == "/v2/models/simple/versions/3"


async def test_a_signature_is_fetched_once_for_all_handles_of_a_model(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    for one in (client, client.with_options(timeout=5)):
        await side(partial(one.infer, "simple", [1, 2]))
        await side(partial(one.model("simple").predict, [1, 2]))
        await side(one.model("simple").signature)
    assert len(gets(server)) == 1
    await side(lambda: client.infer("simple", [1, 2], version=1))
    assert len(gets(server)) == 2, "a version has a signature of its own"


async def test_inputs_are_checked_before_they_are_sent(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    handle = client.model("simple")
    for wrong, match in (
        ({"z": [1, 2]}, "'z' is no input of simple, expected 'x'"),
        ([1, 2, 3], r"input 'x' expects shape \[-1, 2\], FP32, got shape \[3\]"),
        (["a", "b"], "input 'x' expects FP32"),
        ([1e300, 0], "cannot hold"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            await side(partial(handle.infer, wrong))
    with pytest.raises(InvalidInputError, match="'n' is no output of simple, expected 'y'"):
        await side(lambda: handle.infer([1, 2], outputs=["n"]))
    assert posts(server) == []
    assert len(gets(server)) == 1, "a signature that was just fetched is believed"


async def test_a_signature_that_grew_old_is_fetched_again(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.serve_simple()
    inner = server.otherwise
    client = side.client(server.url, clock=time.clock())
    handle = client.model("simple")
    await side(lambda: handle.infer([1, 2]))
    wider = {**SIMPLE_METADATA, "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]}
    server.otherwise = lambda seen: as_json(wider) if seen.method == "GET" else inner(seen)
    time.now += 5
    result = await side(lambda: handle.infer([1, 2, 3]))
    assert result["y"].tolist() == [[1, 2, 3]]
    assert len(gets(server)) == 2
    time.now += 5
    with pytest.raises(InvalidInputError, match=r"got shape \[2\]"):
        await side(lambda: handle.infer([1, 2]))
    assert len(gets(server)) == 3, "asked once more, and it is still so"


async def test_a_call_starts_over_when_the_gateway_knows_another_signature(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    server.serve_simple()
    inner = server.otherwise
    client = side.client(server.url, clock=time.clock(), timeout=60)
    handle = client.model("simple")
    await side(lambda: handle.infer([1, 2]))
    doubles = {**SIMPLE_METADATA, "inputs": [{"name": "x", "datatype": "INT64", "shape": [-1, 2]}]}

    def now_integers(seen: Seen) -> Any:
        if seen.method == "GET":
            return as_json(doubles)
        if seen.json["inputs"][0]["datatype"] != "INT64":
            return as_error(400, "invalid_tensor", "input 'x' expects INT64")
        return as_outputs(("y", "INT64", [1, 2], np.array([1, 2]).tobytes()))

    server.otherwise = now_integers
    assert (await side(lambda: handle.infer([1, 2])))["y"].dtype == np.int64
    assert (len(gets(server)), len(posts(server))) == (2, 3)
    server.otherwise = inner
    server.script = [as_error(400, "invalid_tensor", "no row fits"), as_json(doubles)]
    with pytest.raises(inferway.InvalidTensorError, match="no row fits"):
        await side(lambda: handle.infer([1, 2]))


async def test_a_model_that_does_not_exist_is_a_typed_error(side: Side, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_error(404, "model_not_found", "Request for unknown model: 'm' is not found")
    client = side.client(server.url)
    with pytest.raises(inferway.ModelNotFoundError, match="unknown model: 'm'"):
        await side(lambda: client.infer("m", [1]))


async def test_refresh_fetches_the_signature_now(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    handle = client.model("simple")
    await side(lambda: handle.signature())
    server.script = [as_json({**SIMPLE_METADATA, "versions": ["2"]})]
    assert (await side(lambda: handle.refresh())).versions == ("2",)
    assert (await side(lambda: client.model("simple").signature())).versions == ("2",)


async def test_very_many_models_do_not_pile_up(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    for number in range(300):
        client.model(f"m{number}")
    assert len(client._handles) <= 128
    signatures = client._engine.signatures
    for number in range(3000):
        signatures.keep((str(number), None), read_metadata(SIMPLE_METADATA), 0.0)
    assert len(signatures) <= 1024


# --- what is sent ------------------------------------------------------------------------------------------------


async def test_options_of_the_protocol_are_sent(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    await side(
        lambda: client.infer(
            "simple", {"x": [[1, 2]]}, outputs=["y"], id="i", parameters={"timeout": 5}, priority=1, version="1"
        )
    )
    seen = posts(server)[0]
    assert seen.path == "/v2/models/simple/versions/1/infer"
    assert seen.json == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": 5, "priority": 1},
        "id": "i",
    }


async def test_outputs_may_have_parameters_of_their_own(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    await side(lambda: client.infer("simple", [1, 2], outputs={"y": {"classification": 2}}))
    assert posts(server)[0].json["outputs"] == [{"name": "y", "parameters": {"binary_data": True, "classification": 2}}]


async def test_json_goes_both_ways_on_request(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    await side(lambda: client.model("simple").signature())
    outputs = [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [float("nan"), 2]}]
    server.script = [as_json({"model_name": "simple", "outputs": outputs})] * 2
    result = await side(lambda: client.infer("simple", [float("inf"), 2], binary=False))
    assert np.isnan(result["y"][0, 0])
    assert result.model_version is None
    seen = posts(server)[0]
    assert seen.body == b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1, 2],"data":[Infinity,2.0]}]}'
    assert seen.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in seen.headers
    await side(lambda: client.infer("simple", [1, 2], binary=False, outputs=["y"]))
    assert posts(server)[1].json["outputs"] == [{"name": "y", "parameters": {"binary_data": False}}]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"outputs": "y"}, "expects a list of names"),
        ({"parameters": {"a": object()}}, "parameters expects"),
    ],
)
async def test_arguments_that_cannot_be_sent_are_refused(
    side: Side, server: ScriptedServer, arguments: dict[str, Any], match: str
) -> None:
    server.serve_simple()
    client = side.client(server.url)
    with pytest.raises(InvalidInputError, match=match):
        await side(lambda: client.infer("simple", [1, 2], **arguments))


async def test_an_output_that_was_asked_for_must_be_there(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    await side(lambda: client.model("simple").signature())
    server.script = [as_outputs(("n", "FP32", [1], b"\x00" * 4))]
    with pytest.raises(inferway.APIResponseValidationError, match="output 'y' was asked for"):
        await side(lambda: client.infer("simple", [1, 2], outputs=["y"]))


def model_of(*specs: TensorSpec) -> ModelMetadata:
    return ModelMetadata("m", ("1",), "test", specs, ())


def call_for(model: ModelMetadata, inputs: object) -> Any:
    return infer_call(
        "/p", model, fit(model, inputs), outputs=None, id=None, parameters=None, priority=None, binary=True
    )


def test_the_json_part_is_aligned_and_names_are_quoted() -> None:
    model = model_of(TensorSpec('a"\\é', "INT8", (-1,)))
    call = call_for(model, {'a"\\é': [1, 2, 3]})
    length = int(dict(call.body_headers)["Inference-Header-Content-Length"])
    assert length % 16 == 0
    assert json.loads(call.body[:length])["inputs"][0]["name"] == 'a"\\é'
    assert call.body[length:] == b"\x01\x02\x03"
    assert dict(call.body_headers)["Content-Length"] == str(len(call.body))


def test_a_request_like_an_earlier_one_is_written_from_memory_to_the_same_bytes() -> None:
    model = model_of(TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,)))
    inputs: dict[str, Any] = {"a": np.ones((3, 2), np.float32), "b": np.arange(3)}
    assert _inference.known_call("/p", model, inputs) is None
    first = call_for(model, inputs)
    again = _inference.known_call("/p", model, inputs)
    assert again is not None
    assert (again.body, again.body_headers) == (first.body, first.body_headers)
    for other in (
        {"a": np.ones((4, 2), np.float32), "b": np.arange(4)},
        {"a": np.ones((3, 2)), "b": np.arange(3)},
        {"b": np.arange(3), "a": np.ones((3, 2), np.float32)},
        {"a": np.ones((2, 3), np.float32).T, "b": np.arange(3)},
        {"a": [[1, 1]] * 3, "b": np.arange(3)},
        {"a": np.ones((3, 2), ">f4"), "b": np.arange(3)},
        [1],
    ):
        assert _inference.known_call("/p", model, other) is None
    text = model_of(TensorSpec("s", "BYTES", (-1,)))
    words = {"s": np.array(["a"], object)}
    call_for(text, words)
    assert _inference.known_call("/p", text, words) is None, "the length of text is not in its shape"


def test_what_is_remembered_has_a_bound() -> None:
    model = model_of(TensorSpec("a", "INT8", (-1,)))
    for size in range(600):
        call_for(model, {"a": np.zeros(size, np.int8)})
    assert len(model.heads) <= 256
    many = model_of(*(TensorSpec(f"input-{n}", "INT8", (-1,)) for n in range(60)))
    call_for(many, {spec.name: np.zeros(1, np.int8) for spec in many.inputs})
    assert many.heads == {}, "a long JSON part is not remembered"


async def test_answers_alike_to_the_byte_are_read_from_memory_with_their_own_values(
    side: Side, server: ScriptedServer
) -> None:
    server.serve_simple()
    client = side.client(server.url)
    results = [await side(partial(client.infer, "simple", [n, -n])) for n in range(3)]
    assert [result["y"].tolist() for result in results] == [[[n, -n]] for n in range(3)]
    assert len({id(result._head) for result in results}) == 1


# --- results -----------------------------------------------------------------------------------------------------


async def test_a_result_of_one_output_can_stand_for_it(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    handle = client.model("simple")
    result = await side(lambda: handle([1, 2]))
    assert result.output.tolist() == [[1, 2]]
    assert np.asarray(result).tolist() == [[1, 2]]
    assert np.asarray(result, np.int64).dtype == np.int64
    assert (np.asarray(result) + 1).tolist() == [[2, 3]]
    bare = await side(lambda: handle.predict([1, 2]))
    assert isinstance(bare, np.ndarray)
    again = await side(lambda: handle.infer({"x": result}))
    assert again.output.tolist() == [[1, 2]], "a result is a value too"


async def test_predict_gives_a_mapping_of_several_outputs(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    await side(lambda: client.model("simple").signature())
    server.script = [as_outputs(("a", "INT8", [1], b"\x01"), ("b", "INT8", [1], b"\x02"))]
    found = await side(lambda: client.model("simple").predict([1, 2]))
    assert {name: array.tolist() for name, array in found.items()} == {"a": [1], "b": [2]}


def test_a_result_is_shown_in_a_notebook_without_trusting_names(server: ScriptedServer) -> None:
    server.serve_simple()
    with Inferway(server.url) as client:
        client.model("simple").signature()
        answer = as_outputs(("<b>", "BYTES", [1], b"\x08\x00\x00\x00<script>"))
        answer.headers = {**answer.headers, "Server-Timing": "run;dur=1.5, <i>;dur=2"}
        server.script = [answer]
        html = client.infer("simple", [1, 2])._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;" in html
    assert "run 1.5 ms" in html
    assert "simple version 1" in html


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", {}),
        ("parse;dur=0.5", {"parse": 0.5}),
        ("a;dur=1, b;desc=x;DUR=2 ,c, d;dur=", {"a": 1.0, "b": 2.0}),
        ("a;dur=nope", {}),
    ],
)
def test_server_timing_is_read(header: str, wanted: dict[str, float]) -> None:
    assert server_timing(header) == wanted


# --- many calls --------------------------------------------------------------------------------------------------


async def test_map_keeps_the_order_of_its_items(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    handle = client.model("simple")
    results = await side.all(handle.map(([n, n] for n in range(100)), concurrency=5))
    assert [result["y"].tolist() for result in results] == [[[n, n]] for n in range(100)]
    array = np.arange(10, dtype=np.float32).reshape(5, 2)
    cut = await side.all(handle.map(array, batch_size=2))
    assert [result["y"].tolist() for result in cut] == [array[0:2].tolist(), array[2:4].tolist(), array[4:].tolist()]
    assert await side.all(handle.map([])) == []


async def test_map_ends_with_the_first_error_in_order(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    found: list[Any] = []
    iterator: Any = client.model("simple").map([[1, 2], [3, 4], [5], [6, 7]], concurrency=2)
    for _ in range(2):
        found.append(await side(lambda: next(iterator) if side.kind == "sync" else anext(iterator)))
    with pytest.raises(InvalidInputError, match=r"got shape \[1\]"):
        await side(lambda: next(iterator) if side.kind == "sync" else anext(iterator))
    assert [result["y"].tolist() for result in found] == [[[1, 2]], [[3, 4]]]


async def test_map_gives_errors_in_the_place_of_results_on_request(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    found = await side.all(client.model("simple").map([[1, 2], [5], [6, 7]], on_error="return"))
    assert [type(one).__name__ for one in found] == ["InferenceResult", "InvalidInputError", "InferenceResult"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"items": [[1, 2]], "concurrency": 0},
        {"items": [[1, 2]], "concurrency": True},
        {"items": [[1, 2]], "on_error": "ignore"},
        {"items": 5},
        {"items": [[1, 2]], "batch_size": 2},
    ],
)
def test_map_refuses_arguments_that_make_no_sense(side: Side, arguments: dict[str, Any]) -> None:
    handle = side.client().model("simple")
    with pytest.raises(ConfigurationError):
        handle.map(**arguments)


async def test_map_takes_asynchronous_items(server: ScriptedServer) -> None:
    server.serve_simple()

    async def items() -> AsyncIterator[list[int]]:
        for number in range(5):
            await asyncio.sleep(0)
            yield [number, number]

    async with AsyncInferway(server.url) as client:
        handle = client.model("simple")
        found = [result["y"][0, 0] async for result in handle.map(items())]
        assert found == [0, 1, 2, 3, 4]
        with pytest.raises(ConfigurationError, match="batch_size"):
            handle.map(items(), batch_size=2)


async def test_map_never_has_more_in_flight_or_begun_than_it_may(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    inner = server.otherwise
    lock = threading.Lock()
    taken = 0

    def items() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            with lock:
                taken += 1
            yield [taken, taken]

    server.otherwise = inner
    client = side.client(server.url)
    handle = client.model("simple")
    await side(lambda: handle.signature())
    iterator: Any = handle.map(items(), concurrency=2)
    if side.kind == "sync":
        for number in range(1, 21):
            assert next(iterator)["y"][0, 0] == number
            assert taken <= number + 8
        iterator.close()
    else:
        for number in range(1, 21):
            assert (await anext(iterator))["y"][0, 0] == number
            assert taken <= number + 8
        await iterator.aclose()
    assert server.connections <= 2


async def test_leaving_map_early_leaves_no_task_behind(server: ScriptedServer) -> None:
    server.serve_simple()
    async with AsyncInferway(server.url) as client:
        before = asyncio.all_tasks()
        iterator: Any = client.model("simple").map([[n, n] for n in range(50)], concurrency=4)
        await anext(iterator)
        await iterator.aclose()
        assert asyncio.all_tasks() == before


async def test_a_cancelled_map_cancels_its_calls(server: ScriptedServer) -> None:
    from scripted import Answer

    server.serve_simple()
    async with AsyncInferway(server.url) as client:
        handle = client.model("simple")
        await handle.signature()
        server.otherwise = lambda _: Answer(hang=True)
        before = asyncio.all_tasks()

        async def consume() -> list[Any]:
            return [result async for result in handle.map([[1, 2]] * 3)]

        task = asyncio.create_task(consume())
        await asyncio.to_thread(server.hanging.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before
        assert await asyncio.to_thread(server.closed.wait, 10)
