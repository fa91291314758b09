"""`inferway.yaml` and the Python half of the contract say the same, in both directions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel, ValidationError

from inferway_contract import codes, document, models, names
from inferway_gateway.core import catalog, errors

CONTRACT: Mapping[str, Any] = document.load()
SCHEMAS: Mapping[str, Any] = CONTRACT["components"]["schemas"]
BODIES: Mapping[str, type[BaseModel]] = {
    name: value
    for name, value in vars(models).items()
    if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == models.__name__
}
ATTITUDES = {"Strict", "Lenient", "Answer"}
# Bodies that the document spells out where they are used, because nothing else refers to them.
INLINE = {
    "RepositoryIndexRequest": CONTRACT["components"]["requestBodies"]["RepositoryIndex"],
    "UnloadRequest": CONTRACT["components"]["requestBodies"]["UnloadModel"],
}
# Parts that pydantic wants a class for and the document does not.
PARTS = {
    "InferenceStats": ("ModelStat", "inference_stats"),
    "BatchStats": ("ModelStat", "batch_stats", "[]"),
    "MemoryUsage": ("ModelStat", "memory_usage", "[]"),
    "LoadParameters": ("LoadRequest", "parameters"),
    "InputParameters": ("InputTensor", "parameters"),
    "OutputParameters": ("RequestedOutput", "parameters"),
    "RequestParameters": ("InferenceRequest", "parameters"),
}
OPERATIONS = [
    (path, method, operation)
    for path, item in CONTRACT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
]


def resolve(node: Any) -> Any:
    while isinstance(node, Mapping) and "$ref" in node:
        found: Any = CONTRACT
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def test_the_document_is_valid_openapi_3_1() -> None:
    errors_found = list(OpenAPIV31SpecValidator(CONTRACT).iter_errors())
    assert errors_found == []


def test_the_document_of_a_wheel_is_found_beside_the_modules(tmp_path: Path) -> None:
    source = Path(document.__file__).parent
    package = tmp_path / "inferway_contract"
    package.mkdir()
    for file in source.glob("*.py"):
        (package / file.name).write_bytes(file.read_bytes())
    (package / "inferway.yaml").write_text("openapi: 3.1.0\n")
    (tmp_path / "inferway.yaml").write_text("never read")
    program = "from inferway_contract import document; print(document.load())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": "."},
    )
    assert done.stdout == "{'openapi': '3.1.0'}\n"


def test_codes_and_names_need_the_standard_library_only() -> None:
    program = (
        "import sys; from inferway_contract import codes, names; "
        "print(sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=Path(document.__file__).parents[1],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "['__main__', 'inferway_contract']"


# ---- closed sets


@pytest.mark.parametrize(
    ("schema", "python"),
    [
        ("ErrorCode", list(codes.ERRORS)),
        ("ErrorCode", list(get_args(codes.ErrorCode))),
        ("Datatype", list(get_args(names.Datatype))),
        ("Datatype", list(names.DATATYPE_BYTES)),
        ("Scope", list(names.SCOPES)),
        ("Scope", list(get_args(names.Scope))),
        ("Environment", list(names.ENVIRONMENTS)),
        ("Environment", list(get_args(names.Environment))),
        ("RowExactness", list(get_args(names.RowExactness))),
        ("Extension", list(names.EXTENSIONS)),
        ("Isolation", list(get_args(names.Isolation))),
        ("Isolation", list(get_args(catalog.Isolation))),
        ("VersionKind", list(get_args(names.VersionKind))),
        ("VersionKind", list(get_args(catalog.Kind))),
        ("VersionState", list(get_args(names.VersionState))),
        ("Step", list(get_args(names.Step))),
        ("Step", [str(step) for step in catalog.Step]),
        ("DeploymentState", list(get_args(names.DeploymentState))),
        ("DeploymentState", list(get_args(catalog.DeploymentState))),
        ("EventKind", list(get_args(names.EventKind))),
        ("EventKind", list(get_args(catalog.EventKind))),
    ],
)
def test_closed_sets_have_the_same_members_in_the_same_order(schema: str, python: list[str]) -> None:
    assert SCHEMAS[schema]["enum"] == python


def test_every_gateway_error_has_its_code_status_and_retryability_in_the_contract() -> None:
    def family(kind: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from family(child)

    # Of this module alone: the edge has errors of its own, whose codes the routes' tests see.
    kinds = [k for k in family(errors.GatewayError) if k.__module__ == errors.__name__ and k is not errors.GatewayError]
    assert {k.code: k.retryable for k in kinds} == {
        code: kind.retryable for code, kind in codes.ERRORS.items() if code in {k.code for k in kinds}
    }
    edge_only = set(codes.ERRORS) - {k.code for k in kinds}
    assert edge_only <= {"method_not_allowed", "request_timeout", "headers_too_large"}


def test_the_table_of_statuses_in_the_introduction_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.*) \|$", CONTRACT["info"]["description"], re.MULTILINE)
    table = {(code, int(status)) for status, text in rows for code in re.findall(r"`([a-z_]+)`", text)}
    assert table == {(k.code, k.status) for k in codes.ERRORS.values() if k.code != "cancelled"}
    retried = {code for _, text in rows if "retry" in text for code in re.findall(r"`([a-z_]+)`", text)}
    assert retried == codes.RETRYABLE


def test_every_error_status_of_an_operation_is_one_that_a_code_has() -> None:
    used = {int(s) for _, _, operation in OPERATIONS for s in operation["responses"] if int(s) >= 400}
    assert used == codes.STATUSES - {499}


# ---- limits and patterns

LIMITS = [
    (names.BODY_LIMIT_BYTES, "body, before and after decompression", f"{names.BODY_LIMIT_BYTES >> 20} MiB"),
    (names.JSON_LIMIT_BYTES, "JSON part of a body", f"{names.JSON_LIMIT_BYTES >> 20} MiB"),
    (names.JSON_STRUCTURE_LIMIT, "arrays and objects in JSON", f"{names.JSON_STRUCTURE_LIMIT:,}"),
    (names.JSON_DEPTH_LIMIT, "nesting of JSON", f"{names.JSON_DEPTH_LIMIT} levels"),
    (names.MAX_RANK, "dimensions of a tensor", f"{names.MAX_RANK}"),
    (names.HEADER_LIMIT_BYTES, "request line and headers", f"{names.HEADER_LIMIT_BYTES >> 10} KiB"),
    (names.HEADER_COUNT_LIMIT, "request line and headers", f"{names.HEADER_COUNT_LIMIT} fields"),
    (names.HEADER_TIMEOUT_S, "request line and headers", f"{names.HEADER_TIMEOUT_S} s"),
    (names.BODY_TIMEOUT_S, "time for a body to arrive", f"{names.BODY_TIMEOUT_S} s"),
    (names.BODY_RATE_BYTES_PER_S, "time for a body to arrive", f"{names.BODY_RATE_BYTES_PER_S >> 10} KiB"),
    (names.DEPLOY_BODY_LIMIT_BYTES, "body of a request for versions or aliases",
     f"{names.DEPLOY_BODY_LIMIT_BYTES >> 20} MiB"),
    (names.UPLOAD_LIMIT_BYTES, "one file of a version", f"{names.UPLOAD_LIMIT_BYTES >> 30} GiB"),
    (names.VERSION_FILES_MAX_ITEMS, "files of a version", f"{names.VERSION_FILES_MAX_ITEMS}"),
    (names.UPLOAD_LIFE_S, "life of an upload that nobody continues", f"{names.UPLOAD_LIFE_S // 3600} h"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "row", "text"), LIMITS)
def test_the_table_of_limits_shows_the_constants(value: int, row: str, text: str) -> None:
    line = next(line for line in CONTRACT["info"]["description"].splitlines() if line.startswith(f"| {row} |"))
    assert text in line, value


def parameter(name: str) -> Any:
    return CONTRACT["components"]["parameters"][name]


def test_headers_have_the_same_names() -> None:
    assert parameter("HeaderLength")["name"] == names.HEADER_LENGTH
    assert parameter("TimeoutMs")["name"] == names.TIMEOUT_MS
    assert parameter("Attempt")["name"] == names.ATTEMPT
    assert parameter("Hops")["name"] == names.HOPS
    assert parameter("IdempotencyKey")["name"] == names.IDEMPOTENCY_KEY
    assert parameter("RequestId")["name"] == names.REQUEST_ID
    assert parameter("UploadOffset")["name"] == names.UPLOAD_OFFSET
    assert parameter("UploadLength")["name"] == names.UPLOAD_LENGTH
    answered = set(CONTRACT["components"]["responses"]["Infer"]["headers"])
    assert {names.MODEL_VERSION, names.FALLBACK, names.UPSTREAM_ATTEMPTS} <= answered
    assert names.UPSTREAM_ATTEMPTS in CONTRACT["components"]["responses"]["UpstreamFailed"]["headers"]
    assert CONTRACT["components"]["securitySchemes"]["apiKey"]["name"] == names.API_KEY_HEADER
    assert {names.SHOULD_RETRY, names.RETRY_AFTER, names.SERVER_TIMING} <= set(CONTRACT["components"]["headers"])
    timing = CONTRACT["components"]["headers"]["Server-Timing"]["example"]
    assert tuple(re.findall(r"(\w+);dur=", timing)) == names.TIMING_STAGES


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        (SCHEMAS["ModelName"], names.MODEL_NAME_PATTERN),
        (parameter("Version")["schema"], names.VERSION_PATTERN),
        (SCHEMAS["KeyId"], names.KEY_ID_PATTERN),
        (SCHEMAS["RequestId"], names.REQUEST_ID_PATTERN),
        (SCHEMAS["ModelGlobs"]["items"], names.MODEL_GLOB_PATTERN),
        (SCHEMAS["ModelTarget"], names.MODEL_TARGET_PATTERN),
        (SCHEMAS["AliasName"], names.ALIAS_PATTERN),
        (SCHEMAS["Digest"], names.DIGEST_PATTERN),
        (SCHEMAS["DeploymentId"], names.DEPLOYMENT_ID_PATTERN),
        (SCHEMAS["FilePath"], names.FILE_PATH_PATTERN),
    ],
)
def test_patterns_are_the_same(schema: Any, pattern: re.Pattern[str]) -> None:
    assert schema["pattern"] == f"^{pattern.pattern}$"


def test_the_three_patterns_of_a_key_agree() -> None:
    unchecked = "ifw_live_" + "a1B2c3D4e5F6" + "_" + "x" * 43
    key = unchecked + names.key_checksum(unchecked)
    assert names.KEY_PATTERN.fullmatch(key)
    assert re.match(SCHEMAS["ApiKey"]["pattern"], key)
    assert names.KEY_IN_TEXT_PATTERN.search(f"the key is '{key}'.")
    for broken in (key[:-1], key + "x", key.replace("live", "prod"), key.replace("_", "-")):
        assert not names.KEY_PATTERN.fullmatch(broken)
        assert not re.match(SCHEMAS["ApiKey"]["pattern"], broken)


def test_a_checksum_is_six_characters_and_sees_every_single_change() -> None:
    unchecked = "ifw_test_" + "0" * 12 + "_" + "Z" * 43
    checksum = names.key_checksum(unchecked)
    assert re.fullmatch(r"[0-9A-Za-z]{6}", checksum)
    changed = {names.key_checksum(unchecked[:i] + "q" + unchecked[i + 1 :]) for i in range(len(unchecked))}
    assert checksum not in changed
    assert len(changed) == len(unchecked)


# ---- bodies


def described(name: str) -> Any:
    """The document's schema of a pydantic model."""
    if name in INLINE:
        return INLINE[name]["content"]["application/json"]["schema"]
    if name == "UnloadParameters":
        return described("UnloadRequest")["properties"]["parameters"]
    if name in PARTS:
        schema, *path = PARTS[name]
        node = SCHEMAS[schema]
        for part in path:
            node = node["items"] if part == "[]" else node["properties"][part]
        return node
    return SCHEMAS[name]


def flat(node: Any) -> dict[str, Any]:
    """A schema without references and ``allOf``, with its kinds as a set; what only documents is dropped."""
    node = dict(resolve(node))
    for base in node.pop("allOf", ()):
        base = flat(base)
        node = {
            **base,
            **node,
            "properties": {**base.get("properties", {}), **node.get("properties", {})},
            "required": [*base.get("required", ()), *node.get("required", ())],
        }
    if "anyOf" in node:
        members = [flat(m) for m in node.pop("anyOf")]
        (main,) = [m for m in members if m["type"] != {"null"}]
        node = {**main, **node, "type": main["type"] | {"null"}}
    kinds = node.get("type")
    if isinstance(kinds, str):
        node["type"] = {kinds}
    elif isinstance(kinds, list):
        node["type"] = set(kinds)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "enum" in node:
        # The members say what kind they are; beside them only null says something.
        node["type"] = set(node.get("type", ())) & {"null"}
    return {k: v for k, v in node.items() if k not in ("description", "title", "examples", "default", "example")}


def python_schema(model: type[BaseModel]) -> Any:
    schema = model.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                rest = {k: v for k, v in node.items() if k != "$ref"}
                return inline({**definitions[node["$ref"].rpartition("/")[2]], **rest})
            return {k: inline(v) for k, v in node.items()}
        return [inline(v) for v in node] if isinstance(node, list) else node

    return inline(schema)


BOUNDS = ("type", "enum", "pattern", "format", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")


def compare(path: str, documented: Any, python: Any, *, answer: bool, optional: bool = False) -> None:
    """Hold one schema against the other.

    Python is looser on purpose in three ways: a plain dictionary stands for any object; an answer takes any text where
    the document has a closed set; and None in Python stands for a member that is absent.
    """
    documented, python = flat(documented), flat(python)
    open_ = python.pop("additionalProperties", None)
    if not python or (python.get("type") == {"object"} and "properties" not in python and open_ is not False):
        return
    if "string" in python.get("type", ()) and "enum" in documented and answer:
        documented = {"type": {"string"} | documented["type"]}
    if optional:
        documented, python = without_null(documented), without_null(python)
    for keyword in BOUNDS:
        said, done = documented.get(keyword), python.get(keyword)
        assert said == done, f"{path}: {keyword} is {said} in the document and {done} in Python"
    if "items" in documented or "items" in python:
        compare(path + "[]", documented["items"], python["items"], answer=answer)
    if "properties" in python:
        assert set(documented["properties"]) == set(python["properties"]), path
        for name, member in python["properties"].items():
            absent = name not in python.get("required", ())
            compare(f"{path}.{name}", documented["properties"][name], member, answer=answer, optional=absent)


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": schema["type"] - {"null"}} if "type" in schema else schema


@pytest.mark.parametrize("name", sorted(set(BODIES) - ATTITUDES))
def test_a_body_has_the_same_members_kinds_and_bounds(name: str) -> None:
    answer = issubclass(BODIES[name], models.Answer)
    compare(name, described(name), python_schema(BODIES[name]), answer=answer, optional=True)


@pytest.mark.parametrize("name", sorted(set(BODIES) - ATTITUDES))
def test_a_body_requires_the_same_members(name: str) -> None:
    constants = {n for n, m in flat(described(name)).get("properties", {}).items() if "const" in resolve(m)}
    python = {n for n, f in BODIES[name].model_fields.items() if f.is_required()}
    assert set(flat(described(name)).get("required", ())) - constants == python - constants


@pytest.mark.parametrize("name", sorted(set(BODIES) - ATTITUDES))
def test_only_bodies_of_our_own_routes_refuse_unknown_members(name: str) -> None:
    strict = issubclass(BODIES[name], models.Strict)
    assert (flat(described(name)).get("additionalProperties") is False) is strict


def test_every_named_schema_of_an_object_has_a_model() -> None:
    objects = {name for name, schema in SCHEMAS.items() if schema.get("type") == "object"}
    # The configuration's smaller parts are for reading; Python keeps them as plain dictionaries.
    assert objects - set(BODIES) == {"QueuePolicy", "Labels", "Metadata", "Weights"}


def test_every_default_is_the_same() -> None:
    create, rotate = SCHEMAS["KeyCreate"]["properties"], SCHEMAS["KeyRotate"]["properties"]
    assert models.KeyCreate.model_fields["models"].default == create["models"]["default"]
    assert models.KeyCreate.model_fields["environment"].default == create["environment"]["default"]
    assert models.KeyRotate.model_fields["overlap_s"].default == rotate["overlap_s"]["default"]
    limit = next(p for p in CONTRACT["paths"]["/api/v1/keys"]["get"]["parameters"] if p["name"] == "limit")["schema"]
    assert (limit["default"], limit["maximum"]) == (names.KEY_LIST_DEFAULT_LIMIT, names.KEY_LIST_MAX_LIMIT)


@pytest.mark.parametrize("name", ["VersionCreate", "ShadowPut", "GuardPut", "AliasPut"])
def test_every_default_of_a_deployment_is_the_same(name: str) -> None:
    documented = {n: p["default"] for n, p in SCHEMAS[name]["properties"].items() if "default" in p}
    assert documented
    assert documented == {n: BODIES[name].model_fields[n].default for n in documented}


@pytest.mark.parametrize(
    ("put", "record", "members"),
    [
        (models.ShadowPut(version=3), catalog.Shadow(3), ("share", "rtol", "atol")),
        (models.GuardPut(), catalog.Guard(), ("window_s", "min_requests", "max_error_rate", "max_p95_ratio")),
        (models.AliasPut(version=3), catalog.AliasSpec({3: 100.0}), ("sticky", "shadow", "guard")),
        (
            models.VersionCreate(files=[models.FileRef(path="m.onnx", digest="0" * 64, size=1)]),
            catalog.VersionSpec("m", "onnx", ()),
            ("version", "config", "isolation", "labels", "metadata", "alias", "pinned"),
        ),
    ],
    ids=["shadow", "guard", "alias", "version"],
)  # fmt: skip
def test_the_core_has_the_defaults_of_the_contract(put: BaseModel, record: object, members: tuple[str, ...]) -> None:
    for name in members:
        assert getattr(put, name) == getattr(record, name), name


def test_lists_of_deployments_and_events_have_the_limits_of_the_constants() -> None:
    for path in ("/api/v1/deployments", "/api/v1/events", "/api/v1/models/{model}/events"):
        (limit,) = [p["schema"] for p in CONTRACT["paths"][path]["get"]["parameters"] if p["name"] == "limit"]
        assert (limit["default"], limit["maximum"]) == (names.LIST_DEFAULT_LIMIT, names.LIST_MAX_LIMIT)
    wait = CONTRACT["paths"]["/api/v1/deployments/{deployment_id}"]["get"]["parameters"][0]
    assert (wait["name"], wait["schema"]["maximum"]) == ("wait", names.DEPLOYMENT_WAIT_MAX_S)
    for name in ("UploadOffset", "UploadLength"):
        assert parameter(name)["schema"]["maximum"] == names.UPLOAD_LIMIT_BYTES


def test_every_example_fits_its_schema() -> None:
    seen = 0
    for body, schema in examples(CONTRACT["paths"]):
        name = schema.get("$ref", "").rpartition("/")[2]
        if name in BODIES:
            BODIES[name].model_validate(body)
            seen += 1
    assert seen > 20


def examples(node: Any) -> Iterator[tuple[Any, Any]]:
    node = resolve(node)
    if isinstance(node, Mapping):
        if isinstance(node.get("schema"), Mapping) and ("example" in node or "examples" in node):
            yield from ((e["value"], node["schema"]) for e in node.get("examples", {}).values())
            if "example" in node:
                yield node["example"], node["schema"]
        for key, value in node.items():
            if key != "schema":
                yield from examples(value)
    elif isinstance(node, list):
        for value in node:
            yield from examples(value)


# ---- models


BLOB = {"path": "model.onnx", "digest": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    "path",
    ["model.onnx", "weights/model.onnx.data", "onnx__MatMul_123", "a b,c=d@e+f-g:h", "_hidden", "0/1/2"],
)
def test_the_path_of_a_file_is_taken(path: str) -> None:
    assert models.FileRef.model_validate({**BLOB, "path": path}).path == path


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../model.onnx", "a/../b", "a//b", "a/", ".hidden", "a/.b", "a\\b", "a\nb", "a\n", "a\0",
     "é", "x" * 513],
    ids=repr,
)  # fmt: skip
def test_a_path_that_could_lead_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        models.FileRef.model_validate({**BLOB, "path": path})
    assert not names.FILE_PATH_PATTERN.fullmatch(path) or len(path) > names.FILE_PATH_MAX_LENGTH


@pytest.mark.parametrize(
    "body",
    [
        {"files": []},
        {"files": [{**BLOB, "digest": "0" * 63}]},
        {"files": [{**BLOB, "digest": "A" * 64}]},
        {"files": [{**BLOB, "size": -1}]},
        {"files": [{**BLOB, "size": 2**34 + 1}]},
        {"files": [{**BLOB, "mode": 7}]},
        {"files": [BLOB], "version": 0},
        {"files": [BLOB], "version": True},
        {"files": [BLOB], "version": 2**31},
        {"files": [BLOB], "isolation": "none"},
        {"files": [BLOB], "alias": "Stable"},
        {"files": [BLOB], "alias": ""},
        {"files": [BLOB], "labels": {"a b": "c"}},
        {"files": [BLOB], "labels": {"a": 1}},
        {"files": [BLOB], "labels": {"a": "x" * 257}},
        {"files": [BLOB], "labels": {f"k{i}": "" for i in range(65)}},
        {"files": [BLOB], "pinned": 1},
        {"files": [BLOB], "aliases": ["stable"]},
    ],
    ids=lambda body: str(body.keys() - {"files"} or body["files"])[:40],
)
def test_a_deployment_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        models.VersionCreate.model_validate(body)


@pytest.mark.parametrize(
    "body",
    [
        {"weights": {}},
        {"weights": {"0": 100}},
        {"weights": {"stable": 100}},
        {"weights": {"1": -1}},
        {"weights": {"1": 101}},
        {"weights": {"1": "100"}},
        {"weights": {"1": True}},
        {"weights": {str(i): 1 for i in range(1, 18)}},
        {"sticky": "header:"},
        {"sticky": "header:a b"},
        {"sticky": "user"},
        {"shadow": {}},
        {"shadow": {"version": 1, "share": 1.1}},
        {"shadow": {"version": 1, "share": float("nan")}},
        {"shadow": {"version": 1, "rtol": float("inf")}},
        {"guard": {"window_s": 0}},
        {"guard": {"min_requests": 0}},
        {"guard": {"max_p95_ratio": 0.5}},
        {"fallback": [1] * 9},
        {"expected_revision": -1},
    ],
    ids=lambda body: str(body)[:40],
)
def test_an_alias_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        models.AliasPut.model_validate(body)


@pytest.mark.parametrize(("given", "taken"), [(60, 60), (60.0, 60), (1e3, 1000)])
def test_a_whole_number_may_be_written_as_a_float(given: float, taken: int) -> None:
    assert models.KeyRotate.model_validate({"overlap_s": given}).overlap_s == taken


@pytest.mark.parametrize("given", [True, "60", 0.5, float("nan"), float("inf"), None, -1, 2_592_001])
def test_nothing_else_is_taken_for_a_whole_number(given: object) -> None:
    with pytest.raises(ValidationError):
        models.KeyRotate.model_validate({"overlap_s": given})


def test_the_repr_of_a_created_key_hides_the_key() -> None:
    unchecked = "ifw_live_" + "A" * 12 + "_" + "s" * 43
    key = unchecked + names.key_checksum(unchecked)
    created = models.KeyCreated.model_validate(
        {
            "id": "A" * 12, "name": "n", "environment": "live", "scopes": ["infer"], "models": ["*"],
            "created_at": "2026-01-01T00:00:00Z", "expires_at": None, "last_used_at": None, "revoked_at": None,
            "replaced_by": None, "key": key,
        }
    )  # fmt: skip
    assert key not in repr(created)
    assert key not in str(created)
    assert created.key == key


# ---- the operations


def test_operation_ids_are_unique_names() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(ids)) == len(ids)
    assert all(i.isidentifier() for i in ids)


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_an_operation_names_its_scopes_or_is_public(path: str, method: str, operation: Any) -> None:
    if operation.get("security") == []:
        assert path.startswith("/v2/health/")
        assert "x-required-scopes" not in operation
    else:
        assert set(operation["x-required-scopes"]) <= set(names.SCOPES)
        # A key that lacks the scope is answered with 403, so a route that asks for one says so.
        assert ("403" in operation["responses"]) == bool(operation["x-required-scopes"])
        assert "401" in operation["responses"]


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_an_answer_has_the_shape_and_headers_of_its_path_family(path: str, method: str, operation: Any) -> None:
    for status, node in operation["responses"].items():
        response = resolve(node)
        headers = {name: resolve(header) for name, header in response["headers"].items()}
        assert headers["X-Request-Id"]["required"] is True
        if int(status) < 400:
            continue
        assert headers["X-Should-Retry"]["required"] is True
        assert ("Retry-After" in headers) == (status in ("429", "503"))
        assert ("Allow" in headers) == (status == "405")
        assert ("WWW-Authenticate" in headers) == (status == "401")
        # What is refused before its path is looked at has the form that every other path has.
        edge = status in ("408", "431")
        shapes = [names.PROBLEM_JSON] if path.startswith("/api/") and not edge else []
        if not shapes or status in ("400", "413", "501", "503"):
            shapes.append(names.JSON)
        assert list(response["content"]) == shapes


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_a_path_describes_each_of_its_parameters(path: str, method: str, operation: Any) -> None:
    described_ = [resolve(p) for p in CONTRACT["paths"][path].get("parameters", ())]
    assert {p["name"] for p in described_ if p["in"] == "path"} == set(re.findall(r"{(\w+)}", path))
