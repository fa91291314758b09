from __future__ import annotations

import pytest

from inferway_gateway.core.pipeline import PipelineSpec, StepSpec, StepTarget
from inferway_gateway.core.tensors import TensorSpec
from inferway_gateway.core.upstream import RemoteSpec
from inferway_gateway.store.elsewhere import ensemble_pipeline, parse_pipeline, parse_remote
from inferway_gateway.store.triton_config import ConfigError, parse_text

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
        ('upstream = "a"\nmodel = ".."', "model: expected a name, without '.' or '..'"),
        ('upstream = "a"\nmodel = "b/../../api"', "model: expected a name, without '.' or '..'"),
        (REMOTE + 'version = "."', "version: expected a name, without '.' or '..'"),
        ('upstream = "a"\nmodel = "b\\nc"', "of what can be printed"),
    ],
    ids=["empty", "url", "version", "operation", "stream", "date", "not-toml", "up", "far-up", "dot", "line-break"],
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


ENSEMBLE = """
    platform: "ensemble"
    max_batch_size: 8
    input { name: "RAW" data_type: TYPE_FP32 dims: [4] }
    output { name: "SCORES" data_type: TYPE_FP32 dims: [4] }
    ensemble_scheduling {
      step {
        model_name: "pre.1" model_version: -1
        input_map { key: "x" value: "RAW" } output_map { key: "y" value: "T" }
      }
      step { model_name: "net" model_version: 3 input_map { key: "x" value: "T" } output_map { key: "y" value: "U" } }
      step { model_name: "net" input_map { key: "x" value: "U" } output_map { key: "y" value: "SCORES" } }
    }
"""


def test_an_ensemble_of_triton_is_a_pipeline() -> None:
    assert ensemble_pipeline(parse_text(ENSEMBLE)[0]) == PipelineSpec(
        (
            StepSpec("pre-1", StepTarget("pre.1"), {"x": "RAW"}),
            StepSpec("net", StepTarget("net", version=3), {"x": "pre-1.y"}),
            StepSpec("net-step2", StepTarget("net"), {"x": "net.y"}),
        ),
        None,
        {"SCORES": "net-step2.y"},
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('value: "U" } }', 'value: "T" } }', "tensor 'T' of the ensemble has two sources"),
        ('key: "x" value: "T"', 'key: "x" value: "Q"', "step 'net' reads 'Q', which is no input"),
        ('name: "SCORES"', 'name: "OTHER"', "output 'OTHER' of the ensemble is written by no step"),
        ('"net" model_version', '"" model_version', "must name a model"),
        ('"net" model_version', '"net" model_namespace: "n" model_version', "model_namespace of a step"),
    ],
    ids=["two-sources", "unknown-input", "unknown-output", "no-name", "namespace"],
)
def test_an_ensemble_that_does_not_fit_together_is_told(old: str, new: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ensemble_pipeline(parse_text(ENSEMBLE.replace(old, new))[0])


def test_an_ensemble_has_steps() -> None:
    with pytest.raises(ConfigError, match="must have 1 to 64 steps, got 0"):
        ensemble_pipeline(parse_text('platform: "ensemble" ensemble_scheduling { }')[0])
