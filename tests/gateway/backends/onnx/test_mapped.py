"""Large weights of models that run one row at a time stay in their file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from models import F32, node, value

MIB = 1 << 20

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from inferway_gateway.backends.footprint import MemoryWatch
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.model_config import ModelConfig, SessionOptions

watch = MemoryWatch()
before = watch.read().anonymous
config = ModelConfig(max_batch_size=int(sys.argv[2]), session=SessionOptions(trial=False))
session = OnnxBackend().open(Artifact("m", 1, Path(sys.argv[1]), config))
width = session.signature.inputs[0].shape[-1]
row = np.arange(width, dtype=np.float32)[None]
(found,) = session.run({"x": row}, ["y"])
assert np.array_equal(found, row)
print(watch.read().anonymous - before)
"""


@pytest.mark.parametrize(("rows", "copied"), [(1, False), (4, True)])
def test_weights_are_copied_only_where_several_rows_gain_by_it(tmp_path: Path, rows: int, copied: bool) -> None:
    width = 8192
    nbytes = width * width * 4
    tensor = TensorProto(name="w", dims=[width, width], data_type=F32, data_location=TensorProto.EXTERNAL)
    for key, said in (("location", "weights.bin"), ("offset", "0"), ("length", str(nbytes))):
        tensor.external_data.add(key=key, value=said)
    ends = [value(name, F32, ["batch", width]) for name in ("x", "y")]
    graph = helper.make_graph([node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [tensor])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    weights = np.memmap(tmp_path / "weights.bin", np.float32, "w+", shape=(width, width))
    np.fill_diagonal(weights, 1)
    weights.flush()
    del weights
    command: list[str | Path] = [sys.executable, "-c", SCRIPT, tmp_path / "model.onnx", str(rows)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    grown = int(done.stdout)
    assert (grown > nbytes) is copied
    assert copied or grown < 64 * MIB
