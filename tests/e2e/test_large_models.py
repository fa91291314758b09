"""Models whose weights are larger than anything that is held in memory on their way: sent, loaded, served, shared.

The suite does it with 300 MiB, which is more than a body or a part of one may have. ``INFERWAY_TEST_LARGE=1`` does it
with a billion parameters, 4 GiB, as ``make_models.py --only big-1b`` makes them, and takes minutes.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from inferway import Inferway
from inferway_gateway.backends.footprint import MemoryWatch
from live import LiveGateway, run_gateway
from models import F32, node, value

MIB = 1 << 20
BIG = Path(__file__).parents[2] / ".cache" / "inferway-models" / "big-1b"
LARGE = os.environ.get("INFERWAY_TEST_LARGE") == "1"


def layered(folder: Path, layers: int, width: int, mark: str) -> tuple[Path, int]:
    """``layers`` identities in external data, each ``[width, width]``: the model, and the bytes of its weights."""
    nbytes = width * width * 4
    tensors = []
    for index in range(layers):
        tensor = TensorProto(name=f"w{index}", dims=[width, width], data_type=F32, data_location=TensorProto.EXTERNAL)
        for key, said in (("location", "weights.bin"), ("offset", str(index * nbytes)), ("length", str(nbytes))):
            tensor.external_data.add(key=key, value=said)
        tensors.append(tensor)
    names = ["x", *(f"h{index}" for index in range(1, layers)), "y"]
    nodes = [node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    ends = [value(name, F32, ["batch", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    proto.producer_version = mark
    folder.mkdir()
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx", layers * nbytes


def processes(gateway: LiveGateway) -> Iterator[int]:
    """The gateway's own processes: itself and all that came from it."""
    found = [gateway.process.pid]
    while found:
        pid = found.pop()
        yield pid
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue


class Peaks:
    """The most memory that each process of the gateway was seen to have: ``pid -> bytes``."""

    def __init__(self, gateway: LiveGateway) -> None:
        self._gateway = gateway
        self._stop = threading.Event()
        self._seen: dict[int, int] = {}
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        watches: dict[int, MemoryWatch] = {}
        while not self._stop.wait(0.02):
            for pid in processes(self._gateway):
                try:
                    if pid not in watches:
                        watches[pid] = MemoryWatch(pid)
                    self._seen[pid] = max(self._seen.get(pid, 0), watches[pid].read().peak)
                except OSError:
                    continue
        for watch in watches.values():
            watch.close()

    @property
    def gateway(self) -> int:
        return self._seen[self._gateway.process.pid]

    @property
    def workers(self) -> list[int]:
        """Largest first; the fork server is among them."""
        return sorted((peak for pid, peak in self._seen.items() if pid != self._gateway.process.pid), reverse=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def gateway_of(tmp_path: Path) -> Iterator[tuple[LiveGateway, Inferway]]:
    (tmp_path / "models").mkdir()
    with (
        run_gateway(tmp_path / "models", tmp_path / "state") as gateway,
        Inferway(base_url=gateway.url, api_key=gateway.make_key("deploy", "infer", "read")) as client,
    ):
        yield gateway, client


@pytest.mark.slow
def test_weights_beyond_every_buffer_are_deployed_served_and_shared_by_the_next_version(tmp_path: Path) -> None:
    width = 4096
    first, nbytes = layered(tmp_path / "first", 5, width, "1")
    data = tmp_path / "first" / "weights.bin"
    with data.open("wb") as stream:
        for _ in range(5):
            stream.write(np.eye(width, dtype=np.float32).tobytes())
    second, _ = layered(tmp_path / "second", 5, width, "2")
    (tmp_path / "second" / "weights.bin").hardlink_to(data)
    with gateway_of(tmp_path) as (gateway, client):
        with MemoryWatch(gateway.process.pid) as watch:
            before = watch.read().resident
        with Peaks(gateway) as peaks:
            client.models.deploy(first, name="large", timeout=300)
            rows = np.arange(2 * width, dtype=np.float32).reshape(2, width)
            answer = client.infer("large", {"x": rows})
            assert np.array_equal(answer["y"], rows)
            client.models.deploy(second, name="large", timeout=300)
            assert np.array_equal(client.infer("large", {"x": rows})["y"], rows)
        # What a worker is without a model, and the arena of its largest batch, come on top of the weights.
        base = 160 * MIB
        assert 0.9 * nbytes < peaks.workers[0] < 1.15 * nbytes + base
        assert peaks.gateway < before + 64 * MIB
        _check_sharing(tmp_path / "state", nbytes)


@pytest.mark.slow
@pytest.mark.skipif(not LARGE, reason="INFERWAY_TEST_LARGE=1 asks for it; it takes 5 GB of memory and of disk")
def test_a_billion_parameters_are_deployed_served_and_shared_by_the_next_version(tmp_path: Path) -> None:
    assert BIG.is_dir(), "examples/models/make_models.py --only big-1b makes it"
    data = BIG / "model.onnx.data"
    proto = onnx.load(BIG / "model.onnx", load_external_data=False)
    nbytes = sum(4 * int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    assert nbytes > 4e9
    (tmp_path / "second").mkdir()
    proto.producer_version = "2"
    (tmp_path / "second" / "model.onnx").write_bytes(proto.SerializeToString())
    try:
        (tmp_path / "second" / "model.onnx.data").hardlink_to(data)
    except OSError:  # on another file system
        shutil.copyfile(data, tmp_path / "second" / "model.onnx.data")
    with gateway_of(tmp_path) as (gateway, client):
        with MemoryWatch(gateway.process.pid) as watch:
            before = watch.read().resident
        with Peaks(gateway) as peaks:
            client.models.deploy(BIG / "model.onnx", name="large", timeout=900)
            rows = np.ones((1, 5632), np.float32)
            name = proto.graph.output[0].name
            expected = client.infer("large", {"x": rows}, timeout=60)[name]
            assert np.isfinite(expected).all()
            client.models.deploy(tmp_path / "second" / "model.onnx", name="large", timeout=900)
            assert np.array_equal(client.infer("large", {"x": rows}, timeout=60)[name], expected)
        print(f"peak of a worker: {peaks.workers[0] / nbytes:.3f} of {nbytes} bytes of weights")
        print(f"the gateway grew by {(peaks.gateway - before) / MIB:.1f} MiB")
        assert peaks.workers[0] < 1.15 * nbytes
        assert peaks.gateway < before + 64 * MIB
        _check_sharing(tmp_path / "state", nbytes)


def _check_sharing(state: Path, nbytes: int) -> None:
    """Both versions' weights are one file on disk, and so one set of pages."""
    large = [path.stat() for path in state.rglob("*") if path.is_file() and path.stat().st_size >= nbytes]
    assert len(large) >= 3  # the blob, and a name of it in each version's folder
    assert len({status.st_ino for status in large}) == 1
