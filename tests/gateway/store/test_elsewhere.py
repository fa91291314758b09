from __future__ import annotations

import pytest

from inferway_gateway.core.pipeline import PipelineSpec, StepSpec, StepTarget
from inferway_gateway.core.tensors import TensorSpec
from inferway_gateway.core.upstream import RemoteSpec
from inferway_gateway.store.elsewhere import parse_pipeline, parse_remote
from inferway_gateway.store.triton_config import ConfigError

REMOTE = 'upstream = "a"\nmodel = "m"\n'
STEP = '[[steps]]\nname = "s"\nmodel = "m"\n'


def test_a_remote_model_is_an_upstream_and_a_name() -> None:
    assert parse_remote(REMOTE) == RemoteSpec("a", "m")
    text = REMOTE + 'version = "3"\noperation = "chat"\nbatched = false\n[parameters]\nstop = ["x"]\ntop_p = 0.5\n'
    assert parse_remote(text) == RemoteSpec("a", "m", "3", "chat", False, None, {"stop": ["x"], "top_p": 0.5})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "upstream: Field required"),
        (REMOTE + 'url = "http://x"', "url is not known"),
        (REMOTE + "version = 3", "version: Input should be a valid string"),
        (REMOTE + 'operation = "delete"', "operation"),
        (REMOTE + "[parameters]\nstream = true", "'stream' is set by the gateway"),
        (REMOTE + "[parameters]\nsince = 2026-01-01", "no dates and times"),
        ("=", "not TOML"),
    ],
    ids=["empty", "url", "version", "operation", "stream", "date", "not-toml"],
)
def test_a_wrong_remote_file_names_the_member(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_remote(text)


def test_a_pipeline_is_its_steps_and_what_is_declared() -> None:
    text = (
        '[outputs]\ny = "s.y"\n[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 4]\n'
        + STEP.replace('"m"', '"m@canary"')
        + 'inputs = { x = "x" }\n'
    )
    assert parse_pipeline(text) == PipelineSpec(
        (StepSpec("s", StepTarget("m", "canary"), {"x": "x"}),),
        (TensorSpec("x", "FP32", (-1, 4)),),
        {"y": "s.y"},
    )


@pytest.mark.parametrize(
    ("text", "target"),
    [("m", StepTarget("m")), ("m@stable", StepTarget("m", "stable")), ("m/versions/12", StepTarget("m", None, 12))],
    ids=["name", "alias", "version"],
)
def test_a_step_names_a_model_an_alias_or_a_version(text: str, target: StepTarget) -> None:
    (step,) = parse_pipeline(STEP.replace('"m"', f'"{text}"')).steps
    assert step.target == target
    assert str(target) == text


@pytest.mark.parametrize(
    "text", ["", "@stable", "m@", "m@Stable", "m/versions/0", "m/versions/x", "m@a/versions/1", "../m", "m/3"]
)
def test_anything_else_is_no_model_of_a_step(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected NAME, NAME@ALIAS or NAME/versions/NUMBER"):
        parse_pipeline(STEP.replace('"m"', f'"{text}"'))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "steps: Field required"),
        ("steps = []", "steps"),
        (STEP * 65, "steps"),
        (STEP + "timeout = 3", "steps.0.timeout is not known"),
        (STEP.replace('"s"', '"a.b"'), "steps.0.name"),
        (STEP + '[[inputs]]\nname = "x"\ndatatype = "FP8"\nshape = []', "expected one of BOOL"),
        (STEP + '[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-2]', "inputs.0.shape"),
    ],
    ids=["empty", "no-steps", "too-many", "unknown", "dotted", "datatype", "shape"],
)
def test_a_wrong_pipeline_file_names_the_member(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_pipeline(text)
