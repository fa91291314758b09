"""What is let in and what is not, and that looking at a model opens nothing that is not the model's."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import models
import mutants
from crafted_models import CRAFTED, SECRET
from inferway_gateway.backends.onnx.admission import (
    AdmissionLimits,
    AdmissionReport,
    admit,
    newest_ir_version,
    newest_opset,
)
from inferway_gateway.backends.worker import sandbox
from inferway_gateway.core.errors import ModelRejectedError
from models import F32, add_one, external_data, model, node, value
from mutants import DOOMED, HOW

MIB = 1 << 20

EVERYDAY = {
    "add_sub": models.add_sub(),
    "add_one": add_one(),
    "all_types": models.identity_all(),
    "bf16": models.identity("BF16"),
    "strings": models.identity("BYTES"),
    "matmul": models.matmul(),
    "optional": models.optional_input(),
    "text": models.masked_mean(),
    "scalar": models.scalar_add(),
    "picky": models.fails_on_negative(),
    "slow": models.slow(),
    "quantised": models.dynamic_quantised(),
    "classifier": models.classifier(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for a model, beside ``outside/secret.bin``."""
    (tmp_path / "outside").mkdir()
    (tmp_path / SECRET).write_bytes(bytes(4096))
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def look(folder: Path, content: bytes, **options: Any) -> AdmissionReport:
    (folder / "model.onnx").write_bytes(content)
    return admit(folder / "model.onnx", **options)


@pytest.mark.parametrize("name", sorted(CRAFTED))
def test_a_crafted_model_is_refused_by_its_rule_in_words_that_help(folder: Path, name: str) -> None:
    crafted = CRAFTED[name]
    crafted.build(folder)
    with pytest.raises(ModelRejectedError) as refused:
        admit(folder / "model.onnx")
    message = refused.value.message
    assert message.endswith(f"(rule: {crafted.rule})")
    assert [words for words in crafted.words if words not in message] == []
    assert str(folder) not in message
    assert len(message) < 2000


@pytest.mark.skipif(
    shutil.which("strace") is None and not os.environ.get("INFERWAY_REQUIRE_SERVICES"), reason="strace is not installed"
)
def test_no_file_outside_of_the_model_is_opened_while_crafted_models_are_looked_at(tmp_path: Path) -> None:
    assert len(CRAFTED) >= 40
    for name, crafted in CRAFTED.items():
        (tmp_path / name / "outside").mkdir(parents=True)
        (tmp_path / name / SECRET).write_bytes(bytes(4096))
        (tmp_path / name / "model").mkdir()
        crafted.build(tmp_path / name / "model")
    script = """
        import os, sys
        from pathlib import Path
        from inferway_gateway.backends.onnx.admission import admit, newest_ir_version, newest_opset
        from inferway_gateway.core.errors import ModelRejectedError
        newest_ir_version(), [newest_opset(domain) for domain in ("", "ai.onnx.ml", "com.microsoft")]
        root = Path(sys.argv[1])
        names = sorted(root.iterdir())
        os.access("/begin", os.F_OK)
        refused = 0
        for name in names:
            try:
                admit(name / "model" / "model.onnx")
            except ModelRejectedError:
                refused += 1
        os.access("/end", os.F_OK)
        print(refused)
        """
    log = tmp_path.parent / "calls"
    traced = "trace=open,openat,openat2,open_by_handle_at,execve,connect,access,faccessat,faccessat2"
    done = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-e", traced, "-o", log, sys.executable, "-c", textwrap.dedent(script), tmp_path],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) == len(CRAFTED)
    lines = log.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if '"/begin"' in line)
    last = next(index for index, line in enumerate(lines) if '"/end"' in line)
    calls = [line for line in lines[first + 1 : last] if "= -1 " not in line]
    assert len(calls) >= len(CRAFTED)
    assert [line for line in calls if "open" not in line.split("(")[0]] == []
    # With -y the result shows which file was opened in the end, whatever the name that was asked for.
    opened = [line.rpartition("<")[2].rpartition(">")[0] for line in calls]
    inside = tuple(f"{tmp_path / name / 'model'}" for name in CRAFTED)
    assert [path for path in opened if not path.startswith(inside)] == []


@pytest.mark.parametrize("name", sorted(EVERYDAY))
def test_everyday_models_are_let_in(folder: Path, name: str) -> None:
    report = look(folder, EVERYDAY[name])
    assert report.nodes >= 1
    assert report.file_bytes == len(EVERYDAY[name])
    assert report.external_files == ()


def test_every_way_to_store_numbers_is_let_in(folder: Path) -> None:
    arrays: dict[str, tuple[int, Sequence[Any]]] = {
        "float_data": (TensorProto.FLOAT, [1.0, 2.0, 3.0]),
        "half": (TensorProto.FLOAT16, [1.0, 2.0, 3.0]),
        "int8": (TensorProto.INT8, [1, -2, 3]),
        "int64": (TensorProto.INT64, [1, -2, 1 << 40]),
        "double": (TensorProto.DOUBLE, [1.0, 2.0, 3.0]),
        "uint64": (TensorProto.UINT64, [1, 2, 3]),
        "complex": (TensorProto.COMPLEX64, [1 + 2j, 2j, 3]),
        "int4": (TensorProto.INT4, [1, -2, 3]),
        "strings": (TensorProto.STRING, ["a", "bb", ""]),
    }
    proto = onnx.load_model_from_string(add_one())
    proto.graph.initializer.extend(helper.make_tensor(name, kind, [3], said) for name, (kind, said) in arrays.items())
    raw: dict[str, NDArray[Any]] = {
        "raw": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "nothing": np.zeros((0, 4), np.float32),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in raw.items())
    report = look(folder, proto.SerializeToString())
    assert report.weight_bytes == 16 * 4 + 12 + 6 + 3 + 24 + 24 + 24 + 24 + 2 + 3 + 12
    assert report.half_bytes == 6


def test_functions_of_the_model_itself_are_let_in_and_counted_where_they_are_called(folder: Path) -> None:
    imports = [helper.make_opsetid("", 20)]
    twice = helper.make_function("mine", "twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], imports)
    calls = [node("twice", ["x"], ["m"], domain="mine"), node("twice", ["m"], ["y"], domain="mine")]
    proto = onnx.load_model_from_string(
        model(calls, [value("x", F32, ["n"])], [value("y", F32, ["n"])], domains={"mine": 1})
    )
    proto.functions.append(twice)
    report = look(folder, proto.SerializeToString())
    assert report.domains == {""}
    assert report.nodes == 5  # two calls, a body, and the body where it is called twice
    assert report.operators == {"twice", "Add"}


def test_domains_that_the_operator_allows_are_let_in(folder: Path) -> None:
    content = model(
        [node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")],
        [value("x", TensorProto.STRING, ["n"])],
        [value("y", TensorProto.STRING, ["n"])],
        domains={"ai.onnx.contrib": 1},
    )
    assert look(folder, content, allowed_domains=["ai.onnx.contrib"]).domains == {"ai.onnx.contrib"}


def test_external_data_of_the_version_is_let_in_and_its_size_is_known(folder: Path) -> None:
    content, weights = external_data(64, "parts/weights.bin")
    (folder / "parts").mkdir()
    (folder / "parts" / "weights.bin").write_bytes(weights)
    report = look(folder, content, files=["model.onnx", "parts/weights.bin"])
    assert report.external_files == ("parts/weights.bin",)
    assert report.weight_bytes == len(weights)


def test_external_data_must_be_among_the_files_of_the_version(folder: Path) -> None:
    content, weights = external_data(64)
    (folder / "model.onnx.data").write_bytes(weights)
    with pytest.raises(ModelRejectedError, match="not among the version's files"):
        look(folder, content, files=["model.onnx"])


def test_tensors_may_share_the_same_data_whole(folder: Path) -> None:
    content, weights = external_data(64)
    (folder / "model.onnx.data").write_bytes(weights)
    proto = onnx.load_model_from_string(content)
    tied = proto.graph.initializer.add()
    tied.CopyFrom(proto.graph.initializer[0])
    tied.name = "tied"
    assert look(folder, proto.SerializeToString()).weight_bytes == 2 * len(weights)


def test_a_large_model_is_looked_at_without_being_read(folder: Path) -> None:
    """4 GiB of weights that are holes in a file: reading them would take the memory of this test, and seconds."""
    side = 1 << 15
    proto = onnx.load_model_from_string(external_data(64, "weights.bin")[0])
    tensor = proto.graph.initializer[0]
    tensor.dims[:] = [side, side]
    tensor.external_data[2].value = str(side * side * 4)
    with (folder / "weights.bin").open("wb") as stream:
        stream.truncate(side * side * 4)
    status = Path("/proc/self/io")
    before = int(status.read_text().split()[1])
    report = look(folder, proto.SerializeToString())
    assert report.weight_bytes == 4 << 30
    assert int(status.read_text().split()[1]) - before < MIB


def test_a_large_initialiser_in_the_file_is_skipped(folder: Path) -> None:
    proto = onnx.load_model_from_string(add_one())
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(4 * MIB, np.float32), "large"))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    admit(folder / "model.onnx")  # the runtime's versions are asked for, once a process
    status = Path("/proc/self/io")
    before = int(status.read_text().split()[1])
    assert admit(folder / "model.onnx").weight_bytes > 16 * MIB
    assert int(status.read_text().split()[1]) - before < MIB


def test_lists_with_a_part_per_number_are_passed_over_quickly_and_count(folder: Path) -> None:
    trees = node("TreeEnsemble", ["x"], ["y"], domain="ai.onnx.ml", floats=[1.5] * 300_000, ints=list(range(300_000)))
    content = model([trees], [value("x", F32, ["n"])], [value("y", F32, ["n"])], domains={"ai.onnx.ml": 5})
    assert look(folder, content, limits=AdmissionLimits(fields=20_000)).nodes == 1
    with pytest.raises(ModelRejectedError, match="more parts than are read"):
        look(folder, content, limits=AdmissionLimits(fields=2_000))


def test_what_hides_behind_a_list_of_numbers_is_still_seen(folder: Path) -> None:
    proto = onnx.load_model_from_string(add_one())
    hidden = proto.graph.node[0].attribute.add(name="many", type=onnx.AttributeProto.INTS, ints=range(100_000))
    inner = node("Marker", ["x"], ["r"], domain="evil.example")
    hidden.g.CopyFrom(helper.make_graph([inner], "hidden", [], [value("r", F32, None)]))
    with pytest.raises(ModelRejectedError, match=r"evil\.example::Marker"):
        look(folder, proto.SerializeToString())


def test_the_versions_are_those_that_the_runtime_takes(folder: Path) -> None:
    def loads(ir_version: int, opset: int) -> bool:
        proto = onnx.load_model_from_string(models.identity("FP32"))
        proto.ir_version = ir_version
        proto.opset_import[0].version = opset
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            ort.InferenceSession(proto.SerializeToString(), options)
        except Exception:
            return False
        return True

    assert loads(newest_ir_version(), 20)
    assert not loads(newest_ir_version() + 1, 20)
    assert loads(10, newest_opset(""))
    assert not loads(10, newest_opset("") + 1)
    assert newest_opset("ai.onnx") == newest_opset("") >= 20
    assert newest_opset("com.microsoft") == 1


@pytest.mark.parametrize(
    ("operator", "domain", "opset", "words"),
    [
        ("Mull", "", 18, f"operator ai.onnx::Mull: does not exist in this gateway's ONNX Runtime {ort.__version__}"),
        ("FusedFoo", "com.microsoft", 1, "which has com.microsoft up to version 1"),
        ("Gelu", "", 18, "came with version 20 of ai.onnx, the model imports version 18: export with opset_version=20"),
        ("Upsample", "", 18, "was withdrawn with version 10 of ai.onnx, the model imports version 18"),
    ],
    ids=["unknown", "unknown of Microsoft", "too new", "withdrawn"],
)
def test_an_operator_that_the_runtime_has_not_is_named(
    folder: Path, operator: str, domain: str, opset: int, words: str
) -> None:
    proto = onnx.load_model_from_string(models.identity("FP32"))
    proto.graph.node[0].op_type, proto.graph.node[0].domain = operator, domain
    del proto.opset_import[:]
    proto.opset_import.extend([helper.make_opsetid(domain, opset)])
    with pytest.raises(ModelRejectedError) as refused:
        look(folder, proto.SerializeToString())
    assert words in refused.value.message
    assert refused.value.message.endswith("(rule: operators)")


def test_an_operator_of_an_older_version_is_let_in_where_it_was_not_withdrawn_yet(folder: Path) -> None:
    proto = onnx.load_model_from_string(models.identity("FP32"))
    proto.graph.node[0].op_type = "Upsample"
    proto.opset_import[0].version = 9
    assert look(folder, proto.SerializeToString()).operators == {"Upsample"}


def test_a_missing_file_is_said_to_be_missing(folder: Path) -> None:
    with pytest.raises(ModelRejectedError, match=r"^model\.onnx: the model file is missing"):
        admit(folder / "model.onnx")


def test_the_size_of_an_onnx_file_has_a_bound(folder: Path) -> None:
    with (folder / "model.onnx").open("wb") as stream:
        stream.truncate(1 << 31)
    with pytest.raises(ModelRejectedError, match="save_as_external_data"):
        admit(folder / "model.onnx")


# ---- mutants


_LOADER = """
import json, os, signal, sys
import numpy as np
import numpy.random
import onnxruntime as ort
from inferway_gateway.backends.worker.sandbox import MIB, Limits, confine

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
         "tensor(double)": np.float64, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}

def load(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options)
    feed = {}
    for given in session.get_inputs():
        shape = [d if isinstance(d, int) and 0 < d < 64 else 1 for d in given.shape]
        feed[given.name] = np.ones(shape, TYPES.get(given.type, np.float32))
    session.run(None, feed)

folder, names = sys.argv[1], json.loads(sys.stdin.read())
said, at, deaths = {}, 0, []
while at < len(names):
    incoming, outgoing = os.pipe()
    child = os.fork()
    if not child:
        os.close(incoming)
        directory = os.open(folder, os.O_RDONLY)
        size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        confine([directory], Limits(address_space_bytes=size + 512 * MIB, cpu_s=60))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for name in names[at:]:
            signal.setitimer(signal.ITIMER_REAL, 10)
            try:
                load(f"{folder}/{name}")
                answer = b"r"
            except Exception:
                answer = b"f"
            os.write(outgoing, answer)
        os._exit(0)
    os.close(outgoing)
    with os.fdopen(incoming, "rb") as stream:
        answers = stream.read().decode()
    _, status = os.waitpid(child, 0)
    for answer in answers:
        said[names[at]] = answer
        at += 1
    if status:
        deaths.append(names[at])
        said[names[at]] = "d"
        at += 1
print(json.dumps({"said": said, "deaths": deaths}))
os._exit(0)
"""


@pytest.mark.skipif(bool(sandbox.capabilities().missing), reason="this kernel lacks layers of the sandbox")
def test_no_mutant_hurts_who_looks_at_it_and_no_doomed_one_becomes_ready(tmp_path: Path) -> None:
    """2,000 models, each changed in one place: looked at here, and those that pass loaded and run where it is safe."""
    chance = random.Random(20261123)
    parents = mutants.parents()
    passed: list[str] = []
    how: dict[str, str] = {}
    refused = 0
    count = int(os.environ.get("INFERWAY_TEST_MUTANTS", "2000"))
    for index in range(count):
        name = f"{index}.onnx"
        how[name] = HOW[index % len(HOW)]
        (tmp_path / name).write_bytes(mutants.mutant(chance.choice(parents), how[name], chance))
        try:
            admit(tmp_path / name)
        except ModelRejectedError:
            refused += 1
        else:
            passed.append(name)
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, tmp_path],
        input=json.dumps(passed).encode(),
        capture_output=True,
        timeout=300 + count / 10,
        check=True,
    )
    outcome = json.loads(done.stdout)
    assert set(outcome["said"]) == set(passed)
    ready = [name for name, said in outcome["said"].items() if said == "r"]
    assert [how[name] for name in ready if how[name] in DOOMED] == []
    # Both verdicts have to occur, or the test shows nothing.
    assert refused > len(how) // 4
    assert ready
